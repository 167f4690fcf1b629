//! Soft tokens by their logits, which are free to move anywhere.

use controlgen_core::energy::{Energy, EnergyFn, Point, Text};
use controlgen_core::{Error, Result, Rows};
use tch::Tensor;

/// Soft tokens π = softmax(ỹ), by ỹ: what a gradient step may move without leaving the distributions (COLD, Qin et
/// al. 2022).
pub struct TokenLogits {
    /// ỹ, `[B, T, V]`.
    pub logits: Tensor,
    /// Boolean `[B, T]`, false for padding; all true where `None`.
    pub keep: Option<Tensor>,
}

impl TokenLogits {
    /// Logits `[B, T, V]`, without padding.
    pub fn new(logits: Tensor) -> Self {
        Self { logits, keep: None }
    }

    /// The soft tokens softmax(ỹ / τ), for a temperature τ above 0.
    ///
    /// # Errors
    /// [`Error::Value`] for another temperature; [`Error::Shape`].
    pub fn soft(&self, temperature: f64) -> Result<Text> {
        if !temperature.is_finite() || temperature <= 0.0 {
            return Err(Error::value("temperature of soft tokens", "> 0", temperature));
        }
        self.check()?;
        let probs = self.logits.f_div_scalar(temperature)?.f_softmax(-1, None)?;
        Ok(Text::Soft { probs, keep: self.keep.as_ref().map(Tensor::shallow_clone) })
    }

    /// The best token at each position.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn hard(&self) -> Result<Text> {
        self.check()?;
        let ids = self.logits.f_argmax(-1, false)?;
        Ok(Text::Hard { ids, keep: self.keep.as_ref().map(Tensor::shallow_clone) })
    }

    fn check(&self) -> Result<()> {
        match self.logits.size().as_slice() {
            [_, _, vocab] if *vocab > 0 => Ok(()),
            other => Err(Error::shape("logits of soft tokens", "[B, T, V]", other)),
        }
    }
}

/// Another handle over the same storage.
impl Clone for TokenLogits {
    fn clone(&self) -> Self {
        Self { logits: self.logits.shallow_clone(), keep: self.keep.as_ref().map(Tensor::shallow_clone) }
    }
}

impl Rows for TokenLogits {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.logits.reorder(rows)?;
        self.keep.as_mut().map_or(Ok(()), |keep| keep.reorder(rows))
    }
}

impl Point for TokenLogits {
    fn free(&self) -> Result<&Tensor> {
        Ok(&self.logits)
    }

    fn rebuilt(&self, free: Tensor) -> Self {
        Self { logits: free, keep: self.keep.as_ref().map(Tensor::shallow_clone) }
    }
}

/// E(softmax(ỹ / τ)): an energy of texts as one of logits.
pub fn over_logits(energy: Energy<Text>, temperature: f64) -> Energy<TokenLogits> {
    Energy::from_fn(move |x: &TokenLogits| energy.energy(&x.soft(temperature)?))
}
