//! The repetition penalty of CTRL.

use std::collections::HashSet;
use std::sync::Arc;

use controlgen_core::{Bans, Result, TokenControl};
use tch::Tensor;

use super::{check, scores};

/// Makes tokens that occurred, in the prompt or since, less probable: a positive score is divided by the penalty θ, a
/// negative one multiplied. Keskar, McCann, Varshney, Xiong and Socher, "CTRL: A Conditional Transformer Language
/// Model for Controllable Generation" (2019), section 4.1; the treatment of negative scores is the field's.
///
/// θ above 1 penalises, θ below 1 encourages. How often a token occurred does not matter. Raw scores have no natural
/// zero, so the effect depends on the model; [`normalised`](Self::normalised) takes log-probabilities instead.
///
/// *Cost*: about six small kernels over the distinct tokens of the history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RepetitionPenalty {
    penalty: f64,
    normalised: bool,
    prompt: bool,
}

impl RepetitionPenalty {
    /// `penalty`, the paper's θ, in 1e-30 ..= 1e30; the paper uses 1.2.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(penalty: f64) -> Result<Self> {
        let holds = (1e-30..=1e30).contains(&penalty);
        let penalty = check::number("repetition_penalty", "1e-30 ..= 1e30", penalty, holds)?;
        Ok(Self { penalty, normalised: false, prompt: true })
    }

    /// Acts on log-probabilities: the scores are normalised first, and those that occurred then multiplied by θ, as
    /// none is positive. The effect no longer depends on where the model's scores have their zero.
    ///
    /// *Cost*: a log-sum-exp and one pass over `[B, V]` beside.
    #[must_use]
    pub fn normalised(self) -> Self {
        Self { normalised: true, ..self }
    }

    /// Penalises generated tokens only; what the prompt holds stays free.
    #[must_use]
    pub fn generated_only(self) -> Self {
        Self { prompt: false, ..self }
    }
}

/// The distinct tokens of a history, in order of appearance. Forks share it until they differ.
#[derive(Clone, Default)]
pub struct Seen(Arc<(HashSet<i64>, Vec<i64>)>);

impl Seen {
    fn insert(&mut self, token: i64) {
        if !self.0.0.contains(&token) {
            let (set, list) = Arc::make_mut(&mut self.0);
            set.insert(token);
            list.push(token);
        }
    }
}

impl TokenControl for RepetitionPenalty {
    type State = Vec<Seen>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Vec<Seen>> {
        scores::start_rows(prompts, |prompt| {
            let mut seen = Seen::default();
            prompt.iter().filter(|_| self.prompt).for_each(|&token| seen.insert(token));
            seen
        })
    }

    fn score(&self, state: &mut Vec<Seen>, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.len())?;
        if self.normalised {
            let log_normaliser = logits.f_logsumexp([-1].as_slice(), true)?;
            // A row of which all is banned stays as it is.
            let log_normaliser =
                log_normaliser.f_masked_fill(&log_normaliser.f_eq(f64::NEG_INFINITY)?, 0.0)?;
            let _ = logits.f_sub_(&log_normaliser)?;
        }
        // Tokens beyond the vocabulary, which some models have as inputs, can not be chosen.
        let mut cells = Vec::new();
        for (row, seen) in scores::numbered(state) {
            cells.extend(seen.0.1.iter().filter(|&&token| token < vocab).map(|token| row * vocab + token));
        }
        if cells.is_empty() {
            return Ok(logits);
        }
        let cells = Tensor::f_from_slice(&cells)?.f_to_device(logits.device())?;
        let mut flat = logits.f_view([-1])?;
        let old = flat.f_index_select(0, &cells)?;
        let raised = old.f_mul_scalar(self.penalty)?;
        let lowered = old.f_divide_scalar(self.penalty)?;
        let new = raised.f_where_self(&old.f_lt(0.0)?, &lowered)?;
        let _ = flat.f_index_copy_(0, &cells, &new)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Vec<Seen>, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(state, tokens, Seen::insert)
    }

    fn bans(&self) -> Bans {
        Bans::Nothing
    }
}
