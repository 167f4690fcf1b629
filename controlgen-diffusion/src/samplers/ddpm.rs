//! Denoising diffusion probabilistic models.

use controlgen_core::guidance::{Guided, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, normal_like};

/// The variance Σ of p(x' | x).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variance {
    /// β̃ = β σ'²/σ², the variance of q(x' | x, x₀): diffusers' `fixed_small`. Right if x₀ is one point.
    FixedSmall,
    /// β: diffusers' `fixed_large`. Right if x₀ is standard normal.
    FixedLarge,
    /// exp(f ln β + (1 − f) ln β̃), with f of the model: diffusers' `learned_range`. Nichol & Dhariwal, "Improved
    /// Denoising Diffusion Probabilistic Models" (2021), eq. 15.
    LearnedRange,
}

/// x' = μ + √Σ z with z ~ N(0, 1) and μ = (√(1 − β) σ'²/σ²) x + (α' β/σ²) x̂₀. Ho, Jain & Abbeel, "Denoising Diffusion
/// Probabilistic Models" (2020), eq. 7 and algorithm 2.
///
/// β = σ² − (α/α')² σ'², with which any timesteps may be left out (respacing: Nichol & Dhariwal 2021, section 4). The
/// shift of gradients moves the mean, μ + Σ · shift (Dhariwal & Nichol 2021, algorithm 1). One prediction a step; the
/// last step draws no noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ddpm {
    variance: Variance,
    noise_at_end: bool,
}

impl Ddpm {
    /// With this variance.
    pub fn new(variance: Variance) -> Self {
        Self { variance, noise_at_end: false }
    }

    /// Draws noise in the last step too unless its timestep is 0, as diffusers does: with the large variance and
    /// timesteps that do not end in 0 it stays in the sample.
    #[must_use]
    pub fn with_noise_at_end(self) -> Self {
        Self { noise_at_end: true, ..self }
    }
}

/// β and β̃ of a step.
fn betas(step: &Step) -> Result<(f64, f64)> {
    let (sigma, next) = (step.level.sigma(), step.next);
    let beta = sigma * sigma - (step.level.alpha() / next.alpha() * next.sigma()).powi(2);
    if beta.is_nan() || beta <= 0.0 {
        let (from, to) = (sigma / step.level.alpha(), next.sigma() / next.alpha());
        let what = format!("noise of step {}", step.index);
        return Err(Error::value(what, format!("falling from {from}"), to));
    }
    Ok((beta, beta * (next.sigma() / sigma).powi(2)))
}

impl Ddpm {
    /// μ + Σ · shift, and what multiplies the noise, a number or one for each of x.
    fn step(self, guided: &Guided, step: &Step, (beta, small): (f64, f64)) -> Result<(Tensor, Scale)> {
        let (alpha, sigma) = (step.level.alpha(), step.level.sigma());
        let (of_x, of_x0) = (
            alpha / step.next.alpha() * (step.next.sigma() / sigma).powi(2),
            step.next.alpha() * beta / (sigma * sigma),
        );
        // x = α x₀ + σ ε
        let (clean, noise) = (of_x * alpha + of_x0, of_x * sigma);
        let mean = guided.prediction.mix(&guided.x, step.level, clean, noise)?;
        let small = small.max(1e-20);
        let scale = match self.variance {
            Variance::FixedSmall => Scale::Same(small.sqrt()),
            Variance::FixedLarge => Scale::Same(beta.sqrt()),
            Variance::LearnedRange => {
                let log = guided.prediction.log_variance(small.ln(), beta.ln())?;
                Scale::Each(log.f_mul_scalar(0.5)?.f_exp()?)
            }
        };
        let Some(shift) = &guided.shift else { return Ok((mean, scale)) };
        let mean = match &scale {
            Scale::Same(deviation) => mean.f_add(&shift.f_mul_scalar(deviation * deviation)?)?,
            Scale::Each(deviation) => mean.f_add(&shift.f_mul(&deviation.f_square()?)?)?,
        };
        Ok((mean, scale))
    }
}

enum Scale {
    Same(f64),
    Each(Tensor),
}

impl Sampler for Ddpm {
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
        check_steps(steps)?;
        let betas = steps.iter().map(betas).collect::<Result<Vec<_>>>()?;
        let _no_gradients = tch::no_grad_guard();
        for (i, (step, betas)) in steps.iter().zip(betas).enumerate() {
            let guided = ask(predict, &x, step)?;
            let (mean, scale) = self.step(&guided, step, betas)?;
            let last = i + 1 == steps.len();
            x = if last && (step.timestep <= 0.0 || !self.noise_at_end) {
                mean
            } else {
                let z = normal_like(&mean, noise)?;
                mean.f_add(&match scale {
                    Scale::Same(deviation) => z.f_mul_scalar(deviation)?,
                    Scale::Each(deviation) => z.f_mul(&deviation)?,
                })?
            };
        }
        done(x, steps)
    }
}
