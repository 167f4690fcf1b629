//! Latent consistency models.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, normal_like};

/// x' = α' f + σ' z with z ~ N(0, 1) and f = c_skip x + c_out x̂₀, where c_skip = ¼ / (s² + ¼), c_out = s / √(s² + ¼)
/// and s is 10 times the timestep. Luo et al., "Latent Consistency Models: Synthesizing High-Resolution Images with
/// Few-Step Inference" (2023), algorithm 3; boundary conditions of Song et al., "Consistency Models" (2023), appendix
/// C, with σ_data = ½.
///
/// For models distilled to predict x₀ at once: 1 to 8 steps. The last step ends in f.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lcm {
    timestep_scaling: f64,
}

impl Lcm {
    /// s is `timestep_scaling` times the timestep; 10 is usual.
    ///
    /// # Errors
    /// [`Error::Value`] unless it is a finite number above 0.
    pub fn new(timestep_scaling: f64) -> Result<Self> {
        if !(timestep_scaling.is_finite() && timestep_scaling > 0.0) {
            return Err(Error::value("timestep scaling", "a finite number > 0", timestep_scaling));
        }
        Ok(Self { timestep_scaling })
    }
}

impl Default for Lcm {
    fn default() -> Self {
        Self { timestep_scaling: 10.0 }
    }
}

impl Sampler for Lcm {
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
        let _no_gradients = tch::no_grad_guard();
        for (i, step) in steps.iter().enumerate() {
            let s = step.timestep * self.timestep_scaling;
            let (skip, out) = (0.25 / (s * s + 0.25), s / (s * s + 0.25).sqrt());
            let (alpha, sigma) = (step.level.alpha(), step.level.sigma());
            // x = α x₀ + σ ε
            let clean = ask(predict, &x, step)?.mix(step.level, skip * alpha + out, skip * sigma)?;
            x = if i + 1 == steps.len() {
                clean
            } else {
                let z = normal_like(&clean, noise)?;
                clean.f_mul_scalar(step.next.alpha())?.f_add(&z.f_mul_scalar(step.next.sigma())?)?
            };
        }
        done(x, steps)
    }
}
