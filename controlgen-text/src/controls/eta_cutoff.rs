//! Eta sampling.

use controlgen_core::Result;
use tch::Tensor;

use super::entropy::negative_entropy;
use super::{check, scores};

/// Keeps the tokens of probability η = min(ε, √ε · exp(−H)) or more, where H is the entropy: epsilon sampling that
/// cuts less where the model is unsure. Hewitt, Manning and Liang, "Truncation Sampling as Language Model Desmoothing"
/// (Findings of EMNLP 2022).
///
/// The most probable token always stays, with those tied with it.
///
/// *Cost*: a softmax and about six passes over `[B, V]`; nothing is sorted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EtaCutoff {
    epsilon: f64,
    keep: usize,
}

impl EtaCutoff {
    /// `epsilon` above 0 and below 1; the paper uses 3e-4 to 4e-3.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(epsilon: f64) -> Result<Self> {
        let holds = epsilon > 0.0 && epsilon < 1.0;
        Ok(Self { epsilon: check::number("eta_cutoff", "above 0 and below 1", epsilon, holds)?, keep: 1 })
    }

    /// Keeps at least the `n` most probable tokens, and those tied with the n-th; 1 by default.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { keep: check::count("min_tokens_to_keep", n)?, ..self })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        let (log_probs, _, negative) = negative_entropy(&logits)?;
        // ln η, and the log-normaliser as the difference of a row's best score and its log-probability.
        let log_eta = negative.f_add_scalar(0.5 * self.epsilon.ln())?.f_clamp_max(self.epsilon.ln())?;
        let log_normaliser = scores::kth_largest(&logits, 1)?.f_sub(&scores::kth_largest(&log_probs, 1)?)?;
        let cuts = log_eta.f_add(&log_normaliser)?;
        let cuts = cuts.f_minimum(&scores::kth_largest(&logits, self.keep)?)?;
        scores::ban_below_tensor(&mut logits, &cuts)?;
        Ok(logits)
    }
}

proposal!(EtaCutoff);
