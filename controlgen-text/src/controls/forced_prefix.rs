//! Forced first tokens.

use std::sync::Arc;

use controlgen_core::{Result, TokenControl};
use tch::Tensor;

use super::{check, scores};

/// Forces the first tokens of the completion: in step i all tokens are banned but the i-th.
///
/// The forced token keeps its score, so that what the model thinks of it still counts where completions are ranked
/// or resampled. If another control has banned it, nothing is left.
///
/// *Cost*: one pass over `[B, V]` in the steps that are forced, nothing after.
#[derive(Clone, Debug)]
pub struct ForcedPrefix {
    prefix: Arc<[i64]>,
}

impl ForcedPrefix {
    /// One or more token ids.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for none and for negative ids; `score` returns it for ids that the vocabulary lacks.
    pub fn new(prefix: impl IntoIterator<Item = i64>) -> Result<Self> {
        let prefix: Arc<[i64]> = prefix.into_iter().collect();
        check::sequence("forced prefix", &prefix)?;
        Ok(Self { prefix })
    }
}

impl TokenControl for ForcedPrefix {
    /// How many tokens each row has.
    type State = Vec<usize>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Vec<usize>> {
        Ok(vec![0; prompts.len()])
    }

    fn score(&self, state: &mut Vec<usize>, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.len())?;
        let (mut rows, mut cells) = (Vec::new(), Vec::new());
        for (row, &length) in scores::numbered(state) {
            if let Some(&token) = self.prefix.get(length) {
                scores::in_vocabulary("forced prefix", token, vocab)?;
                rows.push(row);
                cells.push(row * vocab + token);
            }
        }
        if rows.is_empty() {
            return Ok(logits);
        }
        let cells = Tensor::f_from_slice(&cells)?.f_to_device(logits.device())?;
        let mut flat = logits.f_view([-1])?;
        let forced = flat.f_index_select(0, &cells)?;
        if rows.len() == state.len() {
            let _ = logits.f_fill_(f64::NEG_INFINITY)?;
        } else {
            let rows = Tensor::f_from_slice(&rows)?.f_to_device(logits.device())?;
            let _ = logits.f_index_fill_(0, &rows, f64::NEG_INFINITY)?;
        }
        let _ = flat.f_index_copy_(0, &cells, &forced)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Vec<usize>, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(state, tokens, |length, _| *length += 1)
    }
}
