//! Top-k.

use controlgen_core::Result;
use tch::Tensor;

use super::{check, scores};

/// Keeps the k most probable tokens. Fan, Lewis and Dauphin, "Hierarchical Neural Story Generation" (ACL 2018).
///
/// All tokens tied with the k-th are kept. Where k exceeds V nothing changes.
///
/// *Cost*: a selection of k among V in each row and one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopK {
    k: usize,
}

impl TopK {
    /// `k` of at least 1.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn new(k: usize) -> Result<Self> {
        Ok(Self { k: check::count("top_k", k)? })
    }

    /// Keeps at least `n` tokens, as if k were the greater of the two.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { k: self.k.max(check::count("min_tokens_to_keep", n)?) })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        let (_, vocab) = scores::dims(&logits)?;
        if i64::try_from(self.k).is_ok_and(|k| k < vocab) {
            let cuts = scores::kth_largest(&logits, self.k)?;
            scores::ban_below_tensor(&mut logits, &cuts)?;
        }
        Ok(logits)
    }
}

proposal!(TopK);
