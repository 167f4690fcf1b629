//! Jump-forward: tokens that the controls leave no choice over are taken without asking the model.
//!
//! Where each row's next token is forced ([`TokenControl::forced`]), the search takes it; the model reads all tokens so
//! taken in one pass, once a choice is to be made. Text and distribution are what they are token by token, since a
//! forced token has probability 1 under the controls; log-probabilities under the model come with that pass. (A pass
//! over several tokens rounds otherwise than one after the other: in bf16, now and then, another token is drawn.)
//!
//! The rows of a batch go in step: a token is taken without the model where *all* of them have it forced.

use std::iter;

use controlgen_core::{Result, TokenControl};
use tch::Tensor;

use super::{Hypothesis, Live, Task};
use crate::sample;

/// The most tokens that wait: their logits `[B, T, V]` are in memory at once.
const MOST: usize = 32;

/// The tokens that were chosen since the model was last asked, step by step.
#[derive(Default)]
pub(super) struct Unread(Vec<Vec<i64>>);

impl Unread {
    pub(super) fn push(&mut self, tokens: Vec<i64>) {
        self.0.push(tokens);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The tokens of all rows, if the controls force them; else, the model has read all tokens before.
    pub(super) fn forced(
        &mut self,
        task: &Task<'_>,
        live: &mut Live,
        rows: &[usize],
        hypotheses: &mut [Hypothesis],
    ) -> Result<Option<Vec<i64>>> {
        let forced = (0..rows.len()).map(|row| task.controls.forced(&mut live.controls, row));
        let forced = forced.collect::<Result<Option<Vec<i64>>>>()?;
        if forced.is_none() || self.len() >= MOST {
            self.read(task, live, rows, hypotheses)?;
        }
        Ok(forced)
    }

    /// Lets the model read, and notes the log-probabilities that this tells.
    pub(super) fn read(
        &mut self,
        task: &Task<'_>,
        live: &mut Live,
        rows: &[usize],
        hypotheses: &mut [Hypothesis],
    ) -> Result<()> {
        let steps = std::mem::take(&mut self.0);
        if steps.is_empty() {
            return Ok(());
        }
        // The first step's were known when it was chosen.
        let logits = live.extend_by(task, &steps)?;
        iter::zip(&logits, &steps[1..])
            .try_for_each(|(logits, tokens)| note(logits, tokens, rows, hypotheses))
    }
}

/// Notes the tokens' log-probabilities under the model, of those that are among their completion's.
pub(super) fn note(
    logits: &Tensor,
    tokens: &[i64],
    rows: &[usize],
    hypotheses: &mut [Hypothesis],
) -> Result<()> {
    for (&row, logprob) in iter::zip(rows, sample::log_prob_of(logits, tokens)?) {
        let hypothesis = &mut hypotheses[row];
        if hypothesis.logprobs.len() < hypothesis.ids.len() {
            hypothesis.logprobs.push(logprob);
        }
    }
    Ok(())
}
