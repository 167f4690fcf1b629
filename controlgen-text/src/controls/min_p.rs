//! Min-p.

use controlgen_core::Result;
use tch::Tensor;

use super::{check, scores};

/// Keeps the tokens that are at least p times as probable as the most probable one. Nguyen et al., "Turning Up the
/// Heat: Min-p Sampling for Creative and Coherent LLM Outputs" (ICLR 2025).
///
/// In scores: x ≥ max x + ln p. At p = 0 nothing changes; at 1 the best stay, all of them if tied.
///
/// *Cost*: two passes over `[B, V]`; nothing is sorted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinP {
    p: f64,
    keep: usize,
}

impl MinP {
    /// `p` in 0 ..= 1.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(p: f64) -> Result<Self> {
        Ok(Self { p: check::number("min_p", "0 ..= 1", p, (0.0..=1.0).contains(&p))?, keep: 1 })
    }

    /// Keeps at least the `n` most probable tokens, and those tied with the n-th; 1 by default.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { keep: check::count("min_tokens_to_keep", n)?, ..self })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        if self.p == 0.0 {
            return Ok(logits);
        }
        let mut cuts = scores::kth_largest(&logits, 1)?.f_add_scalar(self.p.ln())?;
        if self.keep > 1 {
            cuts = cuts.f_minimum(&scores::kth_largest(&logits, self.keep)?)?;
        }
        scores::ban_below_tensor(&mut logits, &cuts)?;
        Ok(logits)
    }
}

proposal!(MinP);
