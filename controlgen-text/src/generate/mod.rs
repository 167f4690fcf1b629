//! Generation: prompts in, text out, under any stack of controls.

mod arithmetic;
mod config;
mod structured;
mod texts;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::{
    Controls, Error, Lanes, LanguageModel, Pass, Placement, Result, TokenControl, TokenControls,
};

use crate::chat::{ChatOptions, ChatTemplate, Message};
use crate::grammar::{Grammar, Vocabulary};
use crate::models;
use crate::search::{self, Choice, Finish, Search, Task};
use crate::tokenizer::{Special, StopStrings, Tokenizer};
use crate::words::TokenTrie;
use arithmetic::Guidance;
use texts::{ForkingTexts, Texts, Watch};

pub use arithmetic::TextTerms;
pub use config::{GenerationConfig, Method, OneOrMany, WatermarkConfig, WordFeature};

/// A language model with its tokenizer.
pub struct TextModel {
    lm: Box<dyn LanguageModel>,
    tokenizer: Tokenizer,
    eos: Vec<i64>,
    /// For grammars; handles share it.
    vocabulary: Arc<OnceLock<Vocabulary>>,
    /// For words; handles share it.
    trie: Arc<OnceLock<TokenTrie>>,
}

impl TextModel {
    /// Opens a Hugging Face directory (config.json, tokenizer.json, safetensors) or, with the feature `gguf`, a GGUF
    /// file.
    ///
    /// # Errors
    /// What is wrong with the files, as [`models::open`] and [`Tokenizer::open`] say it.
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let path = path.as_ref();
        #[cfg(feature = "gguf")]
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return crate::gguf::open(path, placement);
        }
        Self::new(models::open(path, placement)?, Tokenizer::open(path)?)
    }

    /// Puts a model and its tokenizer together. A sequence ends at any of the tokens that either calls its end.
    ///
    /// # Errors
    /// [`Error::Value`] where the tokenizer knows more tokens than the model.
    pub fn new(lm: Box<dyn LanguageModel>, tokenizer: Tokenizer) -> Result<Self> {
        let vocab = lm.spec().vocab;
        if tokenizer.vocab_size() > vocab {
            let expected = format!("at most the model's {vocab}");
            return Err(Error::value("tokens of the tokenizer", expected, tokenizer.vocab_size()));
        }
        let mut eos = lm.spec().eos.clone();
        eos.extend(tokenizer.eos());
        eos.sort_unstable();
        eos.dedup();
        Ok(Self { lm, tokenizer, eos, vocabulary: Arc::default(), trie: Arc::default() })
    }

    /// The language model.
    pub fn lm(&self) -> &dyn LanguageModel {
        &*self.lm
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens that end a sequence.
    pub fn eos(&self) -> &[i64] {
        &self.eos
    }

    /// The bytes of the tokenizer's tokens, which words and clauses are compiled for; made at the first call and kept.
    ///
    /// # Errors
    /// Those of [`TokenTrie::new`].
    pub fn token_trie(&self) -> Result<TokenTrie> {
        if let Some(made) = self.trie.get() {
            return Ok(made.clone());
        }
        let made = TokenTrie::new(&self.tokenizer)?;
        Ok(self.trie.get_or_init(|| made).clone())
    }

    /// Another handle over the same weights, for another thread.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            lm: self.lm.handle(),
            tokenizer: self.tokenizer.handle(),
            eos: self.eos.clone(),
            vocabulary: Arc::clone(&self.vocabulary),
            trie: Arc::clone(&self.trie),
        }
    }

    /// The model's first `layers` blocks as a model of their own, over the same weights: [`models::first_layers`].
    ///
    /// # Errors
    /// As there.
    pub fn first_layers(&self, layers: usize) -> Result<Box<dyn LanguageModel>> {
        models::first_layers(&*self.lm, layers)
    }

    /// The chat template that came with the tokenizer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where none did; the template's own.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        self.tokenizer.chat_template()?.ok_or_else(|| {
            Error::unsupported("chat without a chat template", "models whose tokenizer has a chat_template")
        })
    }

    /// Completes a text.
    pub fn generate(&self, prompt: impl Into<String>) -> Generate<'_> {
        Generate::new(self, vec![Prompt::Text(prompt.into())])
    }

    /// Completes several texts in one batch.
    pub fn generate_batch<S: Into<String>>(&self, prompts: impl IntoIterator<Item = S>) -> Generate<'_> {
        Generate::new(self, prompts.into_iter().map(|prompt| Prompt::Text(prompt.into())).collect())
    }

    /// Completes token ids.
    pub fn generate_ids(&self, prompts: impl IntoIterator<Item = Vec<i64>>) -> Generate<'_> {
        Generate::new(self, prompts.into_iter().map(Prompt::Ids).collect())
    }

    /// Answers a conversation, through the model's chat template.
    ///
    /// # Errors
    /// Those of [`TextModel::chat_template`] and of the template.
    pub fn chat(&self, messages: &[Message]) -> Result<Generate<'_>> {
        let text = self.chat_template()?.render(messages, &ChatOptions::new().generation_prompt(true))?;
        Ok(Generate::new(self, vec![Prompt::Rendered(text)]))
    }
}

enum Prompt {
    /// Special tokens are added as the tokenizer does.
    Text(String),
    /// Special tokens are in the text.
    Rendered(String),
    Ids(Vec<i64>),
}

type OnText<'a> = Box<dyn FnMut(Piece<'_>) + 'a>;

/// A piece of text that is final: whole characters, and no part of a stop string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'p> {
    /// Which completion it belongs to: prompt by prompt, sample by sample.
    pub completion: usize,
    /// The text.
    pub text: &'p str,
}

/// A generation being described; [`Generate::run`] starts it.
pub struct Generate<'a> {
    model: &'a TextModel,
    prompts: Vec<Prompt>,
    controls: TokenControls,
    grammar: Option<Grammar>,
    guidance: Option<Guidance>,
    site_controls: Option<&'a Controls>,
    lanes: Option<Lanes>,
    search: Box<dyn Search + 'a>,
    seed: u64,
    n: usize,
    max_new_tokens: usize,
    /// The same, the prompt's tokens counted in, or the token that a decoder starts with.
    max_length: Option<usize>,
    eos: Option<Vec<i64>>,
    stop: Vec<String>,
    on_text: Option<OnText<'a>>,
    on_step: Option<Box<dyn FnMut(u64) -> Flow + 'a>>,
    cancel: Option<CancelToken>,
    failed: Option<Error>,
}

impl<'a> Generate<'a> {
    fn new(model: &'a TextModel, prompts: Vec<Prompt>) -> Self {
        Self {
            model,
            prompts,
            controls: TokenControls::new(),
            grammar: None,
            guidance: None,
            site_controls: None,
            lanes: None,
            search: Box::new(Choice::Greedy),
            seed: 0,
            n: 1,
            max_new_tokens: 128,
            max_length: None,
            eos: None,
            stop: Vec::new(),
            on_text: None,
            on_step: None,
            cancel: None,
            failed: None,
        }
    }

    /// Adds a control over the next token; it acts after those already there.
    #[must_use]
    pub fn with(mut self, control: impl TokenControl) -> Self {
        self.controls.push(control);
        self
    }

    /// Runs the model under controls at its sites: adapters, edits, taps.
    #[must_use]
    pub fn controls(mut self, controls: &'a Controls) -> Self {
        self.site_controls = Some(controls);
        self
    }

    /// Tells those controls what each prompt is, one lane a prompt: which adapter acts on it, for one. Its completions
    /// keep the lane.
    #[must_use]
    pub fn lanes(mut self, lanes: Lanes) -> Self {
        self.lanes = Some(lanes);
        self
    }

    /// Takes the most probable token each time. The default.
    #[must_use]
    pub fn greedy(self) -> Self {
        self.search(Choice::Greedy)
    }

    /// Draws tokens from the controlled distribution; see [`Choice::Sample`] for what the seed fixes.
    #[must_use]
    pub fn sample(mut self, seed: u64) -> Self {
        self.seed = seed;
        self.search(Choice::Sample { seed, first: 0 })
    }

    /// Searches as it is told: `BeamSearch::new(4)?` keeps the best few hypotheses of each prompt, of which
    /// [`n`](Self::n) are given, best first. All searches are in [`search`].
    #[must_use]
    pub fn search(mut self, search: impl Search + 'a) -> Self {
        self.search = Box::new(search);
        self
    }

    /// Completions of each prompt; 1 unless said. A search by beams has no more than beams.
    #[must_use]
    pub fn n(mut self, n: usize) -> Self {
        self.n = n;
        self
    }

    /// How many tokens may be generated; 128 unless said.
    #[must_use]
    pub fn max_new_tokens(mut self, max_new_tokens: usize) -> Self {
        self.max_new_tokens = max_new_tokens;
        self.max_length = None;
        self
    }

    /// The tokens that end a completion, instead of the model's. None: it ends by length only.
    #[must_use]
    pub fn eos(mut self, eos: impl Into<Vec<i64>>) -> Self {
        self.eos = Some(eos.into());
        self
    }

    /// Texts that end a completion; the text that is given back ends before them.
    #[must_use]
    pub fn stop<S: Into<String>>(mut self, stop: impl IntoIterator<Item = S>) -> Self {
        self.stop.extend(stop.into_iter().map(Into::into));
        self
    }

    /// Gives out the text as it comes, in pieces that are whole characters and no part of a stop string. Not for
    /// searches that take text back, as those by beams do.
    #[must_use]
    pub fn on_text(mut self, on_text: impl FnMut(Piece<'_>) + 'a) -> Self {
        self.on_text = Some(Box::new(on_text));
        self
    }

    /// Is told after each step how many tokens it chose, and says whether to go on.
    #[must_use]
    pub fn on_step(mut self, on_step: impl FnMut(u64) -> Flow + 'a) -> Self {
        self.on_step = Some(Box::new(on_step));
        self
    }

    /// Stops, with what there is, once the token is cancelled.
    #[must_use]
    pub fn cancel(mut self, cancel: &CancelToken) -> Self {
        self.cancel = Some(cancel.clone());
        self
    }

    /// Takes controls, search and lengths from a configuration with the field names of transformers.
    #[must_use]
    pub fn config(mut self, config: &GenerationConfig) -> Self {
        if let Err(error) = config.apply(&mut self) {
            self.failed.get_or_insert(error);
        }
        self
    }

    /// Generates.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Context`] for what cannot be run; [`Error::AllBanned`] where the controls leave no
    /// token; the model's and the controls'.
    pub fn run(mut self) -> Result<Generation> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let controls = self.all_controls()?;
        let started = Instant::now();
        let tokenizer = &self.model.tokenizer;
        let prompts = self.prompts.iter().map(|prompt| prompt.ids(self.model)).collect::<Result<Vec<_>>>()?;
        let guided = self.guidance.as_ref().map(|guidance| guidance.over(self.model)).transpose()?;
        if let Some(max_length) = self.max_length {
            let openings = search::openings(&*self.model.lm, &prompts);
            let longest = openings.iter().map(Vec::len).max().unwrap_or(0);
            if max_length <= longest {
                let expected = format!("more than the prompt's {longest} tokens");
                return Err(Error::value("max_length", expected, max_length));
            }
            self.max_new_tokens = max_length - longest;
        }
        let stop = StopStrings::new(&self.stop)?;
        let mut watch = Watch { on_step: self.on_step, cancel: self.cancel, prefilled: None };
        let task = Task {
            lm: guided.as_deref().unwrap_or(&*self.model.lm),
            prompts: &prompts,
            controls: &controls,
            pass: Pass { controls: self.site_controls, lanes: self.lanes.as_ref(), ..Pass::default() },
            max_new_tokens: self.max_new_tokens,
            eos: self.eos.as_deref().unwrap_or(&self.model.eos),
            n: self.n,
        };
        let completions = if self.search.takes_back() {
            if self.on_text.is_some() {
                let supported = "sampling and greedy search; other text may be taken back until the end";
                return Err(Error::unsupported("on_text in a search that takes text back", supported));
            }
            let mut texts = ForkingTexts::new(prompts.len(), tokenizer, &stop, &self.stop, &mut watch);
            let hypotheses = self.search.run(&task, &mut texts)?;
            texts.complete(hypotheses, &self.stop)?
        } else {
            let count = search::completions(prompts.len(), self.n)?;
            let mut texts = Texts::new(count, tokenizer, &stop, self.on_text, &mut watch);
            let hypotheses = self.search.run(&task, &mut texts)?;
            texts.complete(hypotheses, &self.stop)?
        };
        let finished = Instant::now();
        let prefilled = watch.prefilled.unwrap_or(finished);
        Ok(Generation {
            completions,
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            prefill: prefilled - started,
            decode: finished - prefilled,
        })
    }
}

impl TextModel {
    /// A raw text's ids; the model's first token where there would be none.
    fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let ids = self.tokenizer.encode(text, Special::Add)?;
        if !ids.is_empty() {
            return Ok(ids);
        }
        let bos = self.tokenizer.bos().or(self.lm.spec().bos);
        bos.map(|bos| vec![bos]).ok_or_else(|| {
            Error::value("prompt", "at least one token, the model having none that starts a sequence", "none")
        })
    }
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The completions: prompt by prompt, sample by sample, or best first. A search by beams may find fewer than `n`
    /// of a prompt, where the controls leave fewer.
    pub completions: Vec<Completion>,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Time from the call to the first tokens.
    pub prefill: Duration,
    /// Time from the first tokens to the last.
    pub decode: Duration,
}

impl Generation {
    /// The first completion's text.
    pub fn text(&self) -> &str {
        self.completions.first().map_or("", |completion| &completion.text)
    }

    /// Tokens generated, in all completions.
    pub fn new_tokens(&self) -> usize {
        self.completions.iter().map(|completion| completion.ids.len()).sum()
    }

    /// Tokens generated a second, reading the prompts included.
    pub fn tokens_per_second(&self) -> f64 {
        self.new_tokens() as f64 / (self.prefill + self.decode).as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// One completion.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Index of its prompt.
    pub prompt: usize,
    /// The new tokens, without the one that ended them.
    pub ids: Vec<i64>,
    /// Their text, without special tokens; it ends before the stop string that ended it.
    pub text: String,
    /// log p(token | tokens before it) under the model alone, of each of `ids`.
    pub logprobs: Vec<f64>,
    /// The sum of log-probabilities under the model and its controls, the ending token's included; what it is in a
    /// search by beams, [`BeamSearch`](search::BeamSearch) says.
    pub score: f64,
    /// Why it ended.
    pub finish: Finish,
    /// The clauses that the search was to meet and this does not, by number; none in a search without clauses.
    pub unmet: Vec<usize>,
    /// The stop string that ended it.
    pub stopped_by: Option<String>,
}
