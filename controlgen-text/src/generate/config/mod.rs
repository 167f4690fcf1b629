//! Generation described by a file: the field names of transformers' GenerationConfig.

mod constraints;
mod method;

use std::path::Path;

use controlgen_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::Generate;
use crate::controls::{
    BannedWords, EpsilonCutoff, EtaCutoff, ForcedPrefix, FrequencyPresence, LogitBias, MinLength, MinP,
    NoRepeatNgram, Regulariser, RepetitionPenalty, Suppress, Temperature, TopK, TopP, Typical,
};
use crate::search::EarlyStopping;
use crate::tokenizer::Special;

pub use constraints::{WatermarkConfig, WordFeature};
pub use method::Method;

/// What to generate with, under the field names of transformers' GenerationConfig, and fields of our own for what it has
/// not.
///
/// A field that is absent leaves its control off: there are no hidden defaults (`top_k` included). Controls act in
/// this order, after guidance: regulariser, features, watermark; transformers' penalties, bans and lengths; grammar and clauses; then
/// temperature, top-k, top-p, min-p, typical, epsilon, eta. The latter, from `temperature` on, act only where tokens
/// are drawn, as there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationConfig {
    /// How many tokens may be generated.
    pub max_new_tokens: Option<usize>,
    /// The same, the prompt's tokens counted in; `max_new_tokens` wins.
    pub max_length: Option<usize>,
    /// How many tokens are generated before one may end the sequence.
    pub min_new_tokens: Option<usize>,
    /// The same, the prompt's tokens counted in.
    pub min_length: Option<usize>,
    /// Draw tokens, or take the most probable.
    pub do_sample: bool,
    /// > 0
    pub temperature: Option<f64>,
    /// How many tokens remain; 0 leaves all.
    pub top_k: Option<usize>,
    /// How much probability remains, in (0, 1].
    pub top_p: Option<f64>,
    /// The least share of the best token's probability, in [0, 1].
    pub min_p: Option<f64>,
    /// Mass of locally typical sampling, in (0, 1].
    pub typical_p: Option<f64>,
    /// The least probability, in (0, 1).
    pub epsilon_cutoff: Option<f64>,
    /// ε of eta sampling, in (0, 1).
    pub eta_cutoff: Option<f64>,
    /// CTRL's penalty, > 0; 1 is none.
    pub repetition_penalty: Option<f64>,
    /// The same on log-probabilities.
    pub normalised_repetition_penalty: Option<f64>,
    /// Subtracted from a token's score for each time it was generated.
    pub frequency_penalty: Option<f64>,
    /// Subtracted from a token's score if it was generated.
    pub presence_penalty: Option<f64>,
    /// No n-gram of this size twice; 0 is off.
    pub no_repeat_ngram_size: Option<usize>,
    /// Texts that must not occur: each both at the start of a text and after a space.
    pub bad_words: Option<Vec<String>>,
    /// Token sequences that must not occur.
    pub bad_words_ids: Option<Vec<Vec<i64>>>,
    /// Tokens that must not occur.
    pub suppress_tokens: Option<Vec<i64>>,
    /// The text that the completion must begin with.
    pub forced_prefix: Option<String>,
    /// Added to scores: `[token ids, bias]`, as transformers writes it.
    pub sequence_bias: Option<Vec<(Vec<i64>, f64)>>,
    /// Completions of each prompt.
    pub num_return_sequences: Option<usize>,
    /// Hypotheses of each prompt that are kept; 1 is no search by beams, unless `method` names one, which has 4 where this
    /// is absent. Beams are not sampled: not with `do_sample`.
    pub num_beams: Option<usize>,
    /// The power of the length that a beam's score is divided by.
    pub length_penalty: Option<f64>,
    /// When a search by beams is over: `true`, `false` or `"never"`.
    pub early_stopping: Option<EarlyStopping>,
    /// Groups of beams that avoid each other, a divisor of `num_beams`; 1 is none.
    pub num_beam_groups: Option<usize>,
    /// What a token costs for each beam of an earlier group that says it, > 0; 0 where there are no groups.
    pub diversity_penalty: Option<f64>,
    /// How tokens are searched for; where it is absent, what `do_sample`, `num_beams` and `num_beam_groups` say.
    pub method: Option<Method>,
    /// Samples of `method = "best_of"`; 8 unless said.
    pub num_samples: Option<usize>,
    /// Particles of `method = "smc"`; 32 unless said.
    pub num_particles: Option<usize>,
    /// α of `method = "contrastive"`, in [0, 1], which then needs `top_k`; the paper's are 0.6 and 4, which are taken where
    /// neither is said.
    pub penalty_alpha: Option<f64>,
    /// Tokens that `method = "prompt_lookup"` drafts at most; 10 unless said.
    pub prompt_lookup_num_tokens: Option<usize>,
    /// Tokens that `method = "neurologic"` looks ahead; 0 is none.
    pub look_ahead: Option<usize>,
    /// Clauses that are all to hold, each a list of words or phrases of which one is to be said; `"!word"` is one that
    /// is not to be said. Whole words, of either case. Met by the search where `method` is `"neurologic"` or
    /// `"grid_beam"` (then with `num_beams` 20 unless said), by a control under all others.
    pub clauses: Option<Vec<Vec<String>>>,
    /// What a clause is worth to the control, in nats, while it leads to the words; see
    /// [`LexicalConstraints::reward`](crate::controls::LexicalConstraints::reward).
    pub clause_reward: Option<f64>,
    /// The JSON Schema that the completion is to follow.
    pub json_schema: Option<serde_json::Value>,
    /// The regular expression that the whole completion is to match.
    pub regex: Option<String>,
    /// The context-free grammar that the completion is to follow, in Lark's syntax.
    pub lark: Option<String>,
    /// The texts of which the completion is to be one.
    pub choices: Option<Vec<String>>,
    /// How evenly surprisal is to be spread.
    pub regularizer: Option<Regulariser>,
    /// λ of the regulariser, ≥ 0.
    pub regularizer_weight: Option<f64>,
    /// Words that are worth something.
    pub features: Option<Vec<WordFeature>>,
    /// A mark that a detector finds.
    pub watermarking_config: Option<WatermarkConfig>,
    /// γ of classifier-free guidance; 1 is none.
    pub guidance_scale: Option<f64>,
    /// What is said in the prompts' place to be led away from; where neither this nor `negative_prompt_ids` is there, the
    /// prompt's last token.
    pub negative_prompt: Option<String>,
    /// The same in token ids: one text for all prompts.
    pub negative_prompt_ids: Option<Vec<i64>>,
    /// Texts that end a completion.
    pub stop: Option<Vec<String>>,
    /// The same, by transformers' name.
    pub stop_strings: Option<OneOrMany<String>>,
    /// Tokens that end a completion, instead of the model's; an empty list: none does.
    pub eos_token_id: Option<OneOrMany<i64>>,
    /// Read and not used: the model's own counts.
    pub bos_token_id: Option<i64>,
    /// Read and not used: padding is masked.
    pub pad_token_id: Option<OneOrMany<i64>>,
    /// Read and not used: the cache is always on.
    pub use_cache: Option<bool>,
    /// Read and not used.
    pub transformers_version: Option<String>,
    /// Read and not used.
    #[serde(rename = "_from_model_config")]
    pub from_model_config: Option<bool>,
}

/// One value, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Any number.
    Many(Vec<T>),
}

impl<T: Clone> OneOrMany<T> {
    fn to_vec(&self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value.clone()],
            Self::Many(values) => values.clone(),
        }
    }
}

impl GenerationConfig {
    /// Reads a JSON file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a field that is not known, or a value of another type.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        // A list would be taken for the values of the fields in their order.
        if !text.trim_start().starts_with('{') {
            return Err(Error::format(path, "expected a JSON object"));
        }
        serde_json::from_str(&text).map_err(|error| Error::format(path, error))
    }

    /// Adds what is asked for to a generation.
    pub(super) fn apply(&self, to: &mut Generate<'_>) -> Result<()> {
        if let Some(ids) = &self.eos_token_id {
            to.eos = Some(ids.to_vec());
        }
        let eos = to.eos.clone().unwrap_or_else(|| to.model.eos().to_vec());
        self.guided(to)?;
        self.scored(to)?;
        self.bans(to, &eos)?;
        let clauses = self.constraints(to, &eos)?;
        self.warps(to)?;
        to.search = self.search(to, clauses.as_ref())?;
        if let Some(n) = self.num_return_sequences {
            to.n = n;
        }
        match (self.max_new_tokens, self.max_length) {
            (Some(tokens), _) => to.max_new_tokens = tokens,
            (None, Some(length)) => to.max_length = Some(length),
            (None, None) => {}
        }
        to.stop.extend(self.stop.iter().flatten().cloned());
        to.stop.extend(self.stop_strings.iter().flat_map(OneOrMany::to_vec));
        Ok(())
    }

    /// Penalties, bans and lengths.
    fn bans(&self, to: &mut Generate<'_>, eos: &[i64]) -> Result<()> {
        let tokenizer = to.model.tokenizer().handle();
        let controls = &mut to.controls;
        if let Some(biases) = self.sequence_bias.as_ref().filter(|biases| !biases.is_empty()) {
            controls.push(LogitBias::sequences(biases.iter().map(|(ids, bias)| (ids.as_slice(), *bias)))?);
        }
        if let Some(penalty) = self.repetition_penalty {
            controls.push(RepetitionPenalty::new(penalty)?);
        }
        if let Some(penalty) = self.normalised_repetition_penalty {
            controls.push(RepetitionPenalty::new(penalty)?.normalised());
        }
        if self.frequency_penalty.is_some() || self.presence_penalty.is_some() {
            let (frequency, presence) = (self.frequency_penalty, self.presence_penalty);
            controls.push(FrequencyPresence::new(frequency.unwrap_or(0.0), presence.unwrap_or(0.0))?);
        }
        if let Some(n) = self.no_repeat_ngram_size.filter(|&n| n > 0) {
            controls.push(NoRepeatNgram::new(n)?);
        }
        if let Some(words) = self.bad_words_ids.as_ref().filter(|words| !words.is_empty()) {
            controls.push(BannedWords::new(words)?);
        }
        if let Some(words) = self.bad_words.as_ref().filter(|words| !words.is_empty()) {
            controls.push(BannedWords::words(&tokenizer, words)?);
        }
        if let Some(tokens) = self.min_length {
            controls.push(MinLength::total(tokens, eos.iter().copied())?);
        }
        if let Some(tokens) = self.min_new_tokens {
            controls.push(MinLength::new(tokens, eos.iter().copied())?);
        }
        if let Some(tokens) = self.suppress_tokens.as_ref().filter(|tokens| !tokens.is_empty()) {
            controls.push(Suppress::new(tokens.iter().copied())?);
        }
        if let Some(prefix) = &self.forced_prefix {
            controls.push(ForcedPrefix::new(tokenizer.encode(prefix, Special::Keep)?)?);
        }
        Ok(())
    }

    /// What shapes the distribution that is sampled.
    fn warps(&self, to: &mut Generate<'_>) -> Result<()> {
        if !self.draws()? {
            return Ok(());
        }
        let controls = &mut to.controls;
        if let Some(temperature) = self.temperature {
            controls.push(Temperature::new(temperature)?);
        }
        if let Some(k) = self.top_k.filter(|&k| k > 0) {
            controls.push(TopK::new(k)?);
        }
        if let Some(p) = self.top_p {
            controls.push(TopP::new(p)?);
        }
        if let Some(p) = self.min_p {
            controls.push(MinP::new(p)?);
        }
        if let Some(mass) = self.typical_p {
            controls.push(Typical::new(mass)?);
        }
        if let Some(epsilon) = self.epsilon_cutoff.filter(|&epsilon| epsilon > 0.0) {
            controls.push(EpsilonCutoff::new(epsilon)?);
        }
        if let Some(epsilon) = self.eta_cutoff.filter(|&epsilon| epsilon > 0.0) {
            controls.push(EtaCutoff::new(epsilon)?);
        }
        Ok(())
    }
}
