//! Embeddings of timesteps and other numbers.

use controlgen_core::layers::{Activation, Linear};
use controlgen_core::{Error, Pass, Result, WeightMap};
use tch::{Device, Kind, Tensor};

use super::Scope;

/// Sines and cosines of a number at geometric frequencies (Vaswani et al. 2017; Ho et al. 2020):
/// ωᵢ = 10000^(−i / (n/2 − shift)), i = 0 .. n/2. In f32, as diffusers computes them.
pub struct Sinusoid {
    /// ω, `[n/2]`
    frequencies: Tensor,
    width: i64,
    flip_sin_to_cos: bool,
}

impl Sinusoid {
    /// Embeddings of width n. They are sines, then cosines; the other way round if flipped.
    ///
    /// # Errors
    /// [`Error::Value`] where n/2 is not more than the shift.
    pub fn new(width: i64, flip_sin_to_cos: bool, freq_shift: f64, device: Device) -> Result<Self> {
        let half = width.div_euclid(2);
        let divisor = half as f64 - freq_shift;
        if half < 1 || divisor <= 0.0 {
            return Err(Error::value("width of a sinusoid", format!("> 2 (1 + {freq_shift})"), width));
        }
        let exponent = Tensor::f_arange(half, (Kind::Float, device))?.f_mul_scalar(-(10_000f64.ln()))?;
        Ok(Self { frequencies: exponent.f_div_scalar(divisor)?.f_exp()?, width, flip_sin_to_cos })
    }

    /// Another handle over the same frequencies.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { frequencies: self.frequencies.shallow_clone(), ..*self }
    }

    /// Numbers `[..]` to f32 `[.., n]`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn forward(&self, t: &Tensor) -> Result<Tensor> {
        let t = t.f_to_device(self.frequencies.device())?.f_to_kind(Kind::Float)?;
        let angles = t.f_unsqueeze(-1)?.f_mul(&self.frequencies)?; // (.., n/2)
        let (sin, cos) = (angles.f_sin()?, angles.f_cos()?);
        let both = Tensor::f_cat(&if self.flip_sin_to_cos { [cos, sin] } else { [sin, cos] }, -1)?;
        Ok(if self.width % 2 == 1 { both.f_constant_pad_nd([0, 1])? } else { both })
    }
}

/// W₂ a(W₁ x + b₁) + b₂, and perhaps an activation after it: what a sinusoid, or a vector of features, goes through.
pub struct TimestepEmbedding {
    linear_1: Linear,
    act: Activation,
    linear_2: Linear,
    post_act: Option<Activation>,
}

impl TimestepEmbedding {
    /// Loads it from `inputs` to `width`.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(
        mut scope: Scope<'_, '_>,
        (inputs, width): (i64, i64),
        act: Activation,
        post_act: Option<Activation>,
    ) -> Result<Self> {
        Ok(Self {
            linear_1: scope.linear("linear_1", (inputs, width), true)?,
            act,
            linear_2: scope.linear("linear_2", (width, width), true)?,
            post_act,
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { linear_1: self.linear_1.handle(), linear_2: self.linear_2.handle(), ..*self }
    }

    /// Width of what it takes.
    pub fn inputs(&self) -> i64 {
        self.linear_1.weight().size()[1]
    }

    /// `[B, inputs] → [B, width]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let x = x.f_to_kind(self.linear_1.weight().f_kind()?)?;
        let y = self.linear_2.forward(&self.act.forward(&self.linear_1.forward(&x, pass)?)?, pass)?;
        self.post_act.map_or(Ok(y.shallow_clone()), |act| act.forward(&y))
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { linear_1: self.linear_1.map_weights(f)?, linear_2: self.linear_2.map_weights(f)?, ..*self })
    }
}
