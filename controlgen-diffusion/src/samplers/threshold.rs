//! Clipping and dynamic thresholding of x̂₀.

use controlgen_core::guidance::{Guided, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Parameterisation, Prediction, Result};
use tch::{Kind, Tensor};

use super::{Predict, Sampler};

/// What keeps x̂₀ in the range of pixels. Not for latents, which have no such range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold(How);

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Clip { range: f64 },
    Dynamic { quantile: f64, most: f64 },
}

impl Threshold {
    /// x̂₀ within −`range` ..= `range`: Ho et al. 2020 clip to ±1.
    ///
    /// # Errors
    /// [`Error::Value`] unless `range` is a finite number above 0.
    pub fn clip(range: f64) -> Result<Self> {
        if !(range.is_finite() && range > 0.0) {
            return Err(Error::value("range of clipping", "a finite number > 0", range));
        }
        Ok(Self(How::Clip { range }))
    }

    /// x̂₀ within ±s, divided by s, where s is the `quantile` of |x̂₀| of the sample, but at least 1 and at most
    /// `most`. Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding"
    /// (Imagen, 2022), section 2.3, with the quantile 0.995 and no `most` (infinity). With `most` = 1, the default of
    /// diffusers' `sample_max_value`, it is clipping to ±1; DeepFloyd IF has 1.5.
    ///
    /// # Errors
    /// [`Error::Value`] unless `quantile` is in 0 ..= 1 and `most` at least 1.
    pub fn dynamic(quantile: f64, most: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&quantile) {
            return Err(Error::value("quantile of thresholding", "0 ..= 1", quantile));
        }
        if most.is_nan() || most < 1.0 {
            return Err(Error::value("greatest threshold", ">= 1", most));
        }
        Ok(Self(How::Dynamic { quantile, most }))
    }

    /// x̂₀ `[B, ..]` within its range, of its element type.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn apply(self, x0: &Tensor) -> Result<Tensor> {
        match self.0 {
            How::Clip { range } => Ok(x0.f_clamp(-range, range)?),
            How::Dynamic { quantile, most } => {
                let kind = x0.f_kind()?;
                let wide = if kind == Kind::Double { kind } else { Kind::Float };
                let x = x0.f_to_kind(wide)?;
                let s = x.f_abs()?.f_flatten(1, -1)?.f_quantile_scalar(quantile, 1, true, "linear")?; // (B, 1)
                let ones = vec![1; x.dim().saturating_sub(1)];
                let shape = [&[x.size().first().copied().unwrap_or(1)][..], &ones].concat();
                let s = s.f_clamp(1.0, most)?.f_view(&shape[..])?; // (B, 1, ..)
                let clamped = x.f_clamp_tensor(Some(&s.f_neg()?), Some(&s))?;
                Ok(clamped.f_div(&s)?.f_to_kind(kind)?)
            }
        }
    }
}

/// A sampler whose predictions are thresholded: it sees x̂₀ within its range, and ε̂ that leads from there to x. The
/// shift of gradients stays apart.
pub struct Thresholded {
    sampler: Box<dyn Sampler>,
    threshold: Threshold,
}

impl Thresholded {
    /// `sampler` under `threshold`.
    pub fn new(sampler: impl Sampler + 'static, threshold: Threshold) -> Self {
        Self { sampler: Box::new(sampler), threshold }
    }
}

impl Sampler for Thresholded {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(Self { sampler: (*self.sampler).handle(), threshold: self.threshold })
    }

    fn sample(
        &self,
        predict: &mut Predict<'_>,
        x: Tensor,
        steps: &[Step],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        let mut within = |x: &Tensor, step: &Step| {
            let Guided { x, prediction, shift } = predict(x, step)?;
            let value = self.threshold.apply(&prediction.x0(&x, step.level)?)?;
            let prediction = Prediction { value, parameterisation: Parameterisation::Sample, ..prediction };
            Ok(Guided { x, prediction, shift })
        };
        (*self.sampler).sample(&mut within, x, steps, noise)
    }
}
