//! Temperature.

use controlgen_core::Result;
use tch::Tensor;

use super::check;

/// Divides the scores by a temperature T: p(x)^(1/T), normalised.
///
/// Below 1 probable tokens gain, above 1 improbable ones; towards 0 it becomes greedy, at 1 it changes nothing.
/// Ackley, Hinton and Sejnowski, "A learning algorithm for Boltzmann machines" (1985).
///
/// *Cost*: one pass over `[B, V]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    temperature: f64,
}

impl Temperature {
    /// `temperature` in 1e-30 ..= 1e30: quotients stay within f32. For 0 ask for greedy decoding.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(temperature: f64) -> Result<Self> {
        let holds = (1e-30..=1e30).contains(&temperature);
        let expected = "1e-30 ..= 1e30 (for 0, decode greedily)";
        Ok(Self { temperature: check::number("temperature", expected, temperature, holds)? })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        let _ = logits.f_divide_scalar_(self.temperature)?;
        Ok(logits)
    }
}

proposal!(Temperature);
