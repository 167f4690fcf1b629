//! Denoising diffusion implicit models.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, Threshold, ask, check_any, check_steps, done, normal_like};

/// x' = α' x̂₀ + √(σ'² − s²) ε̂ + s z, z ~ N(0, 1). Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2020),
/// eq. 12.
///
/// s = η (σ'/σ) √(σ² − (α/α')² σ'²), their eq. 16, which is η times the deviation of p(x' | x, x₀) for any α and σ
/// (Kingma et al. 2021). η = 0 is a solver of the probability-flow equation of first order, the same for
/// rectified flow as Euler's; η = 1 is ancestral sampling, DDPM with the small variance. With η = 0 the steps may also
/// add noise: inversion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ddim {
    eta: f64,
    threshold: Option<Threshold>,
    gaps: bool,
}

impl Ddim {
    /// η in 0 ..= 1.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn new(eta: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&eta) {
            return Err(Error::value("eta", "0 ..= 1", eta));
        }
        Ok(Self { eta, threshold: None, gaps: false })
    }

    /// The same with another η.
    pub(crate) fn with_eta(self, eta: f64) -> Result<Self> {
        Ok(Self { eta: Self::new(eta)?.eta, ..self })
    }

    /// Clips x̂₀ and leaves ε̂ as it was predicted, which is diffusers' default. Under
    /// [`Thresholded`](super::Thresholded) both are of the clipped x̂₀, as Dhariwal & Nichol 2021 have it.
    #[must_use]
    pub fn with_threshold(self, threshold: Threshold) -> Self {
        Self { threshold: Some(threshold), ..self }
    }

    /// Takes steps that do not begin where the one before ended: diffusers' fixed stride, where it does not divide T.
    pub(crate) fn with_gaps(self) -> Self {
        Self { gaps: true, ..self }
    }

    /// s: how much new noise a step brings.
    fn deviation(self, step: &Step) -> Result<f64> {
        let (alpha, sigma) = (step.level.alpha(), step.level.sigma());
        let (alpha_next, sigma_next) = (step.next.alpha(), step.next.sigma());
        if self.eta == 0.0 || sigma_next == 0.0 {
            return Ok(0.0);
        }
        let between = sigma * sigma - (alpha / alpha_next * sigma_next).powi(2);
        if !(between >= 0.0 && sigma > 0.0) {
            let expected = "falling from step to step, as eta is above 0";
            let found = format!("{} after {}", sigma_next / alpha_next, sigma / alpha);
            return Err(Error::value(format!("noise of step {}", step.index), expected, found));
        }
        Ok(self.eta * sigma_next / sigma * between.sqrt())
    }
}

impl Sampler for Ddim {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(*self)
    }

    fn sample(
        &self,
        predict: &mut Predict<'_>,
        mut x: Tensor,
        steps: &[Step],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        if self.gaps {
            check_any(steps)?;
        } else {
            check_steps(steps)?;
        }
        let deviations = steps.iter().map(|step| self.deviation(step)).collect::<Result<Vec<_>>>()?;
        let _no_gradients = tch::no_grad_guard();
        for (step, s) in steps.iter().zip(deviations) {
            let guided = ask(predict, &x, step)?;
            let (alpha, sigma) = (step.next.alpha(), step.next.sigma());
            let direction = (sigma * sigma - s * s).max(0.0).sqrt();
            x = match self.threshold {
                None => guided.mix(step.level, alpha, direction)?,
                Some(threshold) => {
                    let x0 = threshold.apply(&guided.x0(step.level)?)?;
                    let epsilon = guided.epsilon(step.level)?;
                    x0.f_mul_scalar(alpha)?.f_add(&epsilon.f_mul_scalar(direction)?)?
                }
            };
            if s > 0.0 {
                x = x.f_add(&normal_like(&x, noise)?.f_mul_scalar(s)?)?;
            }
        }
        done(x, steps)
    }
}
