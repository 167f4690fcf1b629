//! Feature scores: what words are worth, added to what the model thinks of them.

mod alliteration;
mod lexicon;
mod repetition;
mod syllables;
mod vocabulary;
mod word_length;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::Tensor;

use super::check;
use super::scores::{self, Prepared};
use crate::words::TokenTrie;
use vocabulary::{Kind, Text, Vocabulary};

pub use alliteration::Alliteration;
pub use lexicon::{Lexicon, WordList};
pub use repetition::Repetition;
pub use syllables::{Monosyllabic, Syllables};
pub use word_length::WordLength;

/// f(word | words before it): what a word is worth. A closure `|word, before| …` is a feature too.
///
/// Words are runs of word characters (Unicode's `\w`: letters, marks, digits, `_`), in lower case.
pub trait Feature: Send + Sync + 'static {
    /// The value of a word after these, the prompt's included. A finite number.
    fn value(&self, word: &str, before: &[Arc<str>]) -> f64;

    /// What the value depends on beside the word: after words of the same key, every word has the same value. It lets
    /// values be kept. `None`, unless said: it may depend on all words before.
    fn key(&self, before: &[Arc<str>]) -> Option<u64> {
        let _ = before;
        None
    }

    /// All words beginning with `prefix`, of whatever length, of which the value is not 0; more words do no harm. It
    /// saves asking for those of which it is. `None`, unless said: it may be any.
    fn beginning_with(&self, prefix: &str, before: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
        let _ = (prefix, before);
        None
    }
}

impl<F: Fn(&str, &[Arc<str>]) -> f64 + Send + Sync + 'static> Feature for F {
    fn value(&self, word: &str, before: &[Arc<str>]) -> f64 {
        self(word, before)
    }
}

/// Scores Σₜ log p(xₜ) + Σᵢ αᵢ Σ_w fᵢ(w | words before it), over the words w of the text and any [`Feature`]s fᵢ: word
/// lists, lexicons, repetition, alliteration, length, syllables, closures. Ghazvininejad, Shi, Priyadarshi and Knight,
/// "Hafez: an interactive poetry generation system" (ACL 2017), section 4, where tokens are words.
///
/// Here words span tokens. A token gets what the sum over words changes by, if the text were to end after it: ` ocean`
/// gets α, and `ography` after it takes α back, as the word is another then. So a word counts at once, which sampling
/// needs, and a text's sum is exact whichever way it is split into tokens. There is no log-weight at the end.
///
/// The words of the prompt are among those before; its last word may go on in the text.
///
/// *Cost*: for each row two or three passes over its vocabulary. Values are kept by the last word and by what features say
/// they depend on ([`Feature::key`]). For a last word not met before, features that cannot list their words
/// ([`Feature::beginning_with`]: length, syllables) are asked for every token that may go on with it: about a
/// millisecond for 49k tokens, and so is a closure, at every step.
///
/// ```no_run
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::controls::Features;
/// use controlgen_text::controls::features::{Alliteration, Repetition, WordList};
/// use controlgen_text::search::{BeamSearch, EarlyStopping};
/// use controlgen_text::words::TokenTrie;
///
/// # fn main() -> Result<()> {
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let features = Features::new(&TokenTrie::new(model.tokenizer())?)
///     .with(6.0, WordList::new(["waves", "salt", "gulls", "sails", "storm"])?)?
///     .with(-3.0, Repetition::new().except(["the", "a", "of", "and", "to", "is"]))?
///     .with(3.0, Alliteration)?;
/// let beams = BeamSearch::new(5)?.length_penalty(0.0)?.early_stopping(EarlyStopping::Exhausted);
/// let generate = || model.generate("The best thing about the sea is").search(beams).max_new_tokens(24);
/// println!("{}\n{}", generate().run()?.text(), generate().with(features).run()?.text());
/// // that it's a place where people can come together and share their love for the ocean.
/// // that there's still so much to see. Storm sails through the waves, waves wash away the salt. Storm sails through
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Features {
    vocabulary: Arc<Vocabulary>,
    features: Arc<Vec<Weighted>>,
    kept: Arc<Mutex<Kept>>,
}

/// A feature with its weight α.
type Weighted = (f64, Box<dyn Feature>);

/// Values that are kept.
#[derive(Default)]
struct Kept {
    /// Of words that begin with a token, by the features' keys: for all tokens, and for those that begin outside a word.
    begun: HashMap<Vec<u64>, Arc<Begun>>,
    /// Of a word that goes on, by the word and the keys: for the tokens of [`Vocabulary::continuing`].
    continued: HashMap<(String, Vec<u64>), Arc<Vec<f32>>>,
}

struct Begun {
    all: Vec<f32>,
    outside: Vec<f32>,
}

/// More are not kept: some 25 MB for a vocabulary of 49k.
const KEPT: usize = 256;

impl Features {
    /// No features yet, over this vocabulary.
    pub fn new(trie: &TokenTrie) -> Self {
        let vocabulary = Arc::new(Vocabulary::new(trie));
        Self { vocabulary, features: Arc::default(), kept: Arc::default() }
    }

    /// Adds a feature with its weight α, in −1e6 ..= 1e6.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn with(self, weight: f64, feature: impl Feature) -> Result<Self> {
        let holds = (-1e6..=1e6).contains(&weight);
        let weight = check::number("weight of a feature", "-1e6 ..= 1e6", weight, holds)?;
        let mut features = Arc::try_unwrap(self.features)
            .map_err(|_| Error::value("features", "none added to a control that was cloned", "a clone"))?;
        features.push((weight, Box::new(feature)));
        Ok(Self { features: Arc::new(features), kept: Arc::default(), ..self })
    }

    /// Σᵢ αᵢ fᵢ of a word.
    fn worth(&self, word: &str, before: &[Arc<str>]) -> Result<f64> {
        self.features.iter().map(|feature| worth(feature, word, before)).sum()
    }

    /// The sum over the words that a token's text adds, with the one that it goes on with.
    fn change(&self, text: &Text, bytes: &[u8]) -> Result<f64> {
        let mut after = text.clone();
        after.push(bytes);
        let first = text.before.len();
        let mut sum = 0.0;
        for (i, word) in after.before.iter().enumerate().skip(first) {
            sum += self.worth(word, &after.before[..i])?;
        }
        if !after.word.is_empty() {
            sum += self.worth(&after.word, &after.before)?;
        }
        if !text.word.is_empty() {
            sum -= self.worth(&text.word, &text.before)?;
        }
        Ok(sum)
    }

    /// What each token adds to a row's score, `[V]`, of the vocabulary's tokens.
    fn changes(&self, text: &Text) -> Result<Vec<f32>> {
        let vocabulary = &*self.vocabulary;
        // What stands before a word that the next token begins. A character that is cut off is none of a word.
        let ended = text.ended();
        let inside = !text.word.is_empty() && text.pending.is_empty();
        let keyed = |feature: &Weighted| feature.1.key(&ended.before).is_some();
        let begun = self.begun(&ended.before, &keyed)?;
        let mut out = if inside { begun.outside.clone() } else { begun.all.clone() };
        for feature in self.features.iter().filter(|feature| !keyed(feature)) {
            match feature.1.beginning_with("", &ended.before) {
                Some(words) => {
                    for word in words {
                        let value = worth(feature, &word, &ended.before)? as f32;
                        vocabulary.fresh(&word).iter().for_each(|&token| out[token as usize] += value);
                        if !inside {
                            vocabulary.heads(&word).iter().for_each(|&token| out[token as usize] += value);
                        }
                    }
                }
                None => {
                    for (token, kind) in vocabulary.kinds.iter().enumerate() {
                        match kind {
                            Kind::Fresh(word) => out[token] += worth(feature, word, &ended.before)? as f32,
                            Kind::Head(word) if !inside => {
                                out[token] += worth(feature, word, &ended.before)? as f32;
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
        if inside {
            let continued = self.continued(text)?;
            vocabulary.continuing.iter().zip(&*continued).for_each(|(&at, value)| out[at as usize] += value);
        }
        for &token in &vocabulary.odd {
            out[token as usize] = self.change(text, vocabulary.bytes(token))? as f32;
        }
        Ok(out)
    }

    /// What keyed features give to words that a token begins.
    fn begun(&self, before: &[Arc<str>], keyed: &dyn Fn(&Weighted) -> bool) -> Result<Arc<Begun>> {
        let keys: Vec<u64> =
            self.features.iter().map(|(_, feature)| feature.key(before).unwrap_or(u64::MAX)).collect();
        if let Some(found) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).begun.get(&keys) {
            return Ok(found.clone());
        }
        let vocabulary = &*self.vocabulary;
        let (mut all, mut outside) = (vec![0f32; vocabulary.kinds.len()], vec![0f32; vocabulary.kinds.len()]);
        let worth = |word: &str| -> Result<f32> {
            let of = self.features.iter().filter(|feature| keyed(feature));
            Ok(of.map(|feature| worth(feature, word, before)).sum::<Result<f64>>()? as f32)
        };
        for (token, kind) in vocabulary.kinds.iter().enumerate() {
            match kind {
                Kind::Head(word) => all[token] = worth(word)?,
                Kind::Fresh(word) => {
                    all[token] = worth(word)?;
                    outside[token] = all[token];
                }
                Kind::Silent | Kind::Odd => {}
            }
        }
        let made = Arc::new(Begun { all, outside });
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.begun.len() >= KEPT {
            kept.begun.clear();
        }
        kept.begun.insert(keys, made.clone());
        Ok(made)
    }

    /// What all features give to the tokens that go on with the last word.
    fn continued(&self, text: &Text) -> Result<Arc<Vec<f32>>> {
        let Text { word, before, .. } = text;
        let keys: Option<Vec<u64>> = self.features.iter().map(|(_, feature)| feature.key(before)).collect();
        let key = keys.map(|keys| (word.clone(), keys));
        if let Some(key) = &key
            && let Some(found) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).continued.get(key)
        {
            return Ok(found.clone());
        }
        let vocabulary = &*self.vocabulary;
        let base = self.worth(word, before)?;
        let mut out = vec![-base as f32; vocabulary.continuing.len()];
        let mut longer = word.clone();
        for feature in self.features.iter() {
            if let Some(words) = feature.1.beginning_with(word, before) {
                for whole in &words {
                    let Some(rest) = whole.strip_prefix(word.as_str()).filter(|rest| !rest.is_empty()) else {
                        continue;
                    };
                    let value = worth(feature, whole, before)? as f32;
                    for token in vocabulary.heads(rest) {
                        if let Ok(at) = vocabulary.continuing.binary_search(token) {
                            out[at] += value;
                        }
                    }
                }
            } else {
                for (out, &token) in out.iter_mut().zip(&vocabulary.continuing) {
                    if let Kind::Head(head) = &vocabulary.kinds[token as usize] {
                        longer.truncate(word.len());
                        longer.push_str(head);
                        *out += worth(feature, &longer, before)? as f32;
                    }
                }
            }
        }
        let made = Arc::new(out);
        if let Some(key) = key {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.continued.len() >= KEPT {
                kept.continued.clear();
            }
            kept.continued.insert(key, made.clone());
        }
        Ok(made)
    }
}

/// α f of a word.
fn worth((weight, feature): &Weighted, word: &str, before: &[Arc<str>]) -> Result<f64> {
    let value = feature.value(word, before);
    if value.is_finite() {
        return Ok(weight * value);
    }
    let found = if value.is_nan() { "NaN" } else { "infinity" };
    Err(Error::NotFinite { what: "value of a feature".into(), at: format!("{word:?}"), found: found.into() })
}

/// The rows' texts.
pub struct FeaturesState(Vec<Text>);

impl Rows for FeaturesState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder(rows)
    }
}

impl TokenControl for Features {
    type State = FeaturesState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<FeaturesState> {
        check::at_least_one("features", "feature", self.features.len())?;
        let start = |prompt: &[i64]| {
            let mut text = Text::default();
            prompt.iter().for_each(|&token| text.push(self.vocabulary.bytes_of(token)));
            text
        };
        Ok(FeaturesState(scores::start_rows(prompts, start)?))
    }

    fn score(&self, state: &mut FeaturesState, logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.0.len())?;
        let known = self.vocabulary.kinds.len() as i64;
        if known > vocab {
            return Err(Error::value(
                "tokens of the features' vocabulary",
                format!("at most {vocab}"),
                known,
            ));
        }
        let mut values = Vec::with_capacity(logits.numel());
        for text in &state.0 {
            values.extend(self.changes(text)?);
            // What a model has beyond its tokenizer says nothing.
            values.extend((known..vocab).map(|_| 0.0));
        }
        let mut prepared = Prepared::default();
        let values =
            prepared.get(logits.device(), || Ok(Tensor::f_from_slice(&values)?.f_view_as(&logits)?))?;
        let mut logits = logits;
        let _ = logits.f_add_(values)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut FeaturesState, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.0, tokens, |text, token| text.push(self.vocabulary.bytes_of(token)))
    }
}
