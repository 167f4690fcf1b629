//! Fluency: how likely a language model finds texts.

use controlgen_core::{Pass, Result};

use super::some;
use crate::TextModel;
use crate::score::score_completions;
use crate::tokenizer::Special;

/// Scores this many texts at once.
const BATCH: usize = 16;

/// What a judge says of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// log p(text | prompt), in nats; the end of the text is not scored.
    pub log_prob: f64,
    /// How many of the judge's tokens the text is.
    pub tokens: usize,
}

/// A language model that judges texts, of another's making for one: it splits them into tokens in its own way.
pub struct Judge {
    model: TextModel,
}

impl Judge {
    /// By this model, in its own element type: f32 for figures that are to be compared.
    pub fn new(model: &TextModel) -> Self {
        Self { model: model.handle() }
    }

    /// The likelihood of each text as a continuation of the prompt.
    ///
    /// Prompt and text are split into tokens as one. Where that changes the prompt's last tokens, as where a text goes on
    /// within a word, those count as the text's. An empty text has no tokens and a log-probability of 0.
    ///
    /// *Cost*: a pass over the prompt for 16 texts, and one over the texts.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for a prompt without tokens;
    /// [`Error::Context`](controlgen_core::Error::Context) for a text that does not fit; the model's.
    pub fn likelihoods(&self, prompt: &str, texts: &[impl AsRef<str>]) -> Result<Vec<Likelihood>> {
        let encode = |text: &str| self.model.tokenizer().encode(text, Special::Add);
        let before = encode(prompt)?;
        let mut found = vec![Likelihood { log_prob: 0.0, tokens: 0 }; texts.len()];
        // By how much of the prompt they share.
        let mut after: Vec<(usize, usize, Vec<i64>)> = Vec::with_capacity(texts.len());
        for (i, text) in texts.iter().enumerate() {
            let whole = encode(&[prompt, text.as_ref()].concat())?;
            let shared = whole.iter().zip(&before).take_while(|(a, b)| a == b).count();
            if !text.as_ref().is_empty() && whole.len() > shared {
                after.push((shared, i, whole[shared..].to_vec()));
            }
        }
        after.sort_by_key(|(shared, ..)| *shared);
        for alike in after.chunk_by(|a, b| a.0 == b.0) {
            for batch in alike.chunks(BATCH) {
                let ids: Vec<Vec<i64>> = batch.iter().map(|(_, _, ids)| ids.clone()).collect();
                let prompt = before.get(..alike[0].0).unwrap_or_default();
                let scored = score_completions(self.model.lm(), prompt, &ids, &Pass::default())?;
                for ((_, i, _), scored) in batch.iter().zip(scored) {
                    found[*i] = Likelihood { log_prob: scored.total(), tokens: scored.logprobs.len() };
                }
            }
        }
        Ok(found)
    }
}

/// The perplexity of texts together: exp(−Σ log p / Σ tokens), so that a token weighs the same in a short text and in a
/// long one. NaN where no text has a token.
///
/// # Errors
/// [`Error::Value`](controlgen_core::Error::Value) for no texts.
pub fn perplexity(texts: &[Likelihood]) -> Result<f64> {
    some(texts)?;
    let (log_prob, tokens) =
        texts.iter().fold((0.0, 0usize), |(sum, n), text| (sum + text.log_prob, n + text.tokens));
    Ok((-log_prob / tokens as f64).exp())
}

/// The mean of the texts' own perplexities, those without tokens left out: what one bad text raises without bound.
///
/// # Errors
/// [`Error::Value`](controlgen_core::Error::Value) for no texts.
pub fn mean_perplexity(texts: &[Likelihood]) -> Result<f64> {
    some(texts)?;
    let each: Vec<f64> = texts
        .iter()
        .filter(|text| text.tokens > 0)
        .map(|text| (-text.log_prob / text.tokens as f64).exp())
        .collect();
    Ok(each.iter().sum::<f64>() / each.len() as f64)
}
