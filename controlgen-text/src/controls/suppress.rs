//! Banned tokens.

use controlgen_core::{Result, TokenControl};
use tch::Tensor;

use super::scores::{Prepared, TokenSet};

/// Bans tokens, always.
///
/// *Cost*: one write to the banned cells; the ids are put on the device once a run.
#[derive(Clone, Debug)]
pub struct Suppress {
    tokens: TokenSet,
}

impl Suppress {
    /// One or more token ids. Repeated ids count once.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for none and for negative ids; `score` returns it for ids that
    /// the vocabulary lacks.
    pub fn new(tokens: impl IntoIterator<Item = i64>) -> Result<Self> {
        Ok(Self { tokens: TokenSet::new("suppressed tokens", tokens)? })
    }
}

impl TokenControl for Suppress {
    type State = Prepared;

    fn start(&self, _prompts: &[Vec<i64>]) -> Result<Prepared> {
        Ok(Prepared::default())
    }

    fn score(&self, state: &mut Prepared, mut logits: Tensor) -> Result<Tensor> {
        self.tokens.ban(state, &mut logits)?;
        Ok(logits)
    }

    fn advance(&self, _state: &mut Prepared, _tokens: &[i64]) -> Result<()> {
        Ok(())
    }
}
