//! Epsilon sampling.

use controlgen_core::Result;
use tch::Tensor;

use super::{check, scores};

/// Keeps the tokens of probability ε or more. Hewitt, Manning and Liang, "Truncation Sampling as Language Model
/// Desmoothing" (Findings of EMNLP 2022).
///
/// The most probable token always stays, with those tied with it.
///
/// *Cost*: a log-sum-exp and two passes over `[B, V]`; nothing is sorted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EpsilonCutoff {
    epsilon: f64,
    keep: usize,
}

impl EpsilonCutoff {
    /// `epsilon` above 0 and below 1; the paper uses 3e-4 to 9e-4.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(epsilon: f64) -> Result<Self> {
        let holds = epsilon > 0.0 && epsilon < 1.0;
        Ok(Self { epsilon: check::number("epsilon_cutoff", "above 0 and below 1", epsilon, holds)?, keep: 1 })
    }

    /// Keeps at least the `n` most probable tokens, and those tied with the n-th; 1 by default.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { keep: check::count("min_tokens_to_keep", n)?, ..self })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        let cuts = logits.f_logsumexp([-1].as_slice(), true)?.f_add_scalar(self.epsilon.ln())?;
        let cuts = cuts.f_minimum(&scores::kth_largest(&logits, self.keep)?)?;
        scores::ban_below_tensor(&mut logits, &cuts)?;
        Ok(logits)
    }
}

proposal!(EpsilonCutoff);
