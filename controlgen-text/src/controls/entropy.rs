//! The entropy of the next token.

use controlgen_core::Result;
use tch::{Kind, Tensor};

/// Log-probabilities, probabilities (both `[B, V]`) and minus the entropy in nats (`[B, 1]`), a banned token counting
/// nothing. A row of which all is banned gives NaN.
pub(super) fn negative_entropy(logits: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let log_probs = logits.f_log_softmax(-1, Kind::Float)?;
    let probs = log_probs.f_exp()?;
    // 0 · −∞ is NaN; a row that is NaN throughout must stay so.
    let sum = probs.f_mul(&log_probs)?.f_nansum([-1].as_slice(), true, Kind::Float)?;
    let nan = log_probs.f_amax([-1].as_slice(), true)?.f_isnan()?;
    let sum = sum.f_masked_fill(&nan, f64::NAN)?;
    Ok((log_probs, probs, sum))
}
