//! Frequency and presence penalties.

use std::collections::HashMap;
use std::sync::Arc;

use controlgen_core::{Bans, Result, TokenControl};
use tch::Tensor;

use super::{check, scores};

/// Lowers the scores of generated tokens, by their count and for having occurred at all:
/// x − frequency · count − presence, the last where the count is not 0.
///
/// OpenAI's API reference, "Frequency and presence penalties". The prompt does not count. Negative penalties
/// encourage.
///
/// *Cost*: one addition to the cells of the distinct generated tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FrequencyPresence {
    frequency: f64,
    presence: f64,
}

impl FrequencyPresence {
    /// `frequency` and `presence`, each −1e30 ..= 1e30; OpenAI allows −2 to 2, and 0 is without effect.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(frequency: f64, presence: f64) -> Result<Self> {
        let check =
            |what, value| check::number(what, "-1e30 ..= 1e30", value, (-1e30..=1e30).contains(&value));
        Ok(Self {
            frequency: check("frequency_penalty", frequency)?,
            presence: check("presence_penalty", presence)?,
        })
    }
}

/// How often each token was generated. Forks share it until they differ.
#[derive(Clone, Default)]
pub struct Counts(Arc<HashMap<i64, u32>>);

impl TokenControl for FrequencyPresence {
    type State = Vec<Counts>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Vec<Counts>> {
        Ok(vec![Counts::default(); prompts.len()])
    }

    fn score(&self, state: &mut Vec<Counts>, logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.len())?;
        let (mut cells, mut changes) = (Vec::new(), Vec::new());
        for (row, counts) in scores::numbered(state) {
            for (&token, &count) in counts.0.iter().filter(|&(&token, _)| token < vocab) {
                cells.push(row * vocab + token);
                changes.push(-(self.frequency * f64::from(count) + self.presence) as f32);
            }
        }
        scores::add_to_cells(&logits, &cells, &changes)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Vec<Counts>, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(state, tokens, |counts, token| {
            *Arc::make_mut(&mut counts.0).entry(token).or_default() += 1;
        })
    }

    fn bans(&self) -> Bans {
        Bans::Nothing
    }
}
