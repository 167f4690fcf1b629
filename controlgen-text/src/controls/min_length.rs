//! Minimum length.

use controlgen_core::{Result, Rows, TokenControl};
use tch::Tensor;

use super::scores::{self, Prepared, TokenSet};

/// Bans the tokens that end the text until there are enough tokens: new ones, or with the prompt's.
///
/// *Cost*: one write to the banned cells until then, nothing after.
#[derive(Clone, Debug)]
pub struct MinLength {
    tokens: usize,
    with_prompt: bool,
    eos: TokenSet,
}

impl MinLength {
    /// At least `new_tokens` tokens before one of `eos`, the ids that end a text. The ending token itself does not
    /// count.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for no ids and for negative ones; `score` returns it for ids
    /// that the vocabulary lacks.
    pub fn new(new_tokens: usize, eos: impl IntoIterator<Item = i64>) -> Result<Self> {
        Ok(Self { tokens: new_tokens, with_prompt: false, eos: TokenSet::new("end-of-text tokens", eos)? })
    }

    /// At least `tokens` tokens, the prompt's included, before one of `eos`.
    ///
    /// # Errors
    /// As [`MinLength::new`].
    pub fn total(tokens: usize, eos: impl IntoIterator<Item = i64>) -> Result<Self> {
        Ok(Self { with_prompt: true, ..Self::new(tokens, eos)? })
    }
}

/// How many tokens each row lacks.
pub struct MinLengthState {
    missing: Vec<usize>,
    eos: Prepared,
}

impl Rows for MinLengthState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.missing.reorder(rows)
    }
}

impl TokenControl for MinLength {
    type State = MinLengthState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<MinLengthState> {
        let had = |prompt: &Vec<i64>| if self.with_prompt { prompt.len() } else { 0 };
        let missing = prompts.iter().map(|prompt| self.tokens.saturating_sub(had(prompt))).collect();
        Ok(MinLengthState { missing, eos: Prepared::default() })
    }

    fn score(&self, state: &mut MinLengthState, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.missing.len())?;
        self.eos.check(vocab)?;
        if state.missing.iter().all(|&missing| missing > 0) {
            self.eos.ban(&mut state.eos, &mut logits)?;
        } else {
            let short = scores::numbered(&state.missing).filter(|&(_, &missing)| missing > 0);
            let cells: Vec<i64> =
                short.flat_map(|(row, _)| self.eos.ids().iter().map(move |id| row * vocab + id)).collect();
            scores::ban_cells(&logits, &cells)?;
        }
        Ok(logits)
    }

    fn advance(&self, state: &mut MinLengthState, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.missing, tokens, |missing, _| *missing = missing.saturating_sub(1))
    }
}
