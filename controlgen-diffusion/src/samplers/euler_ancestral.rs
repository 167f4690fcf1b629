//! Euler's method with ancestral noise.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, normal_like, ratio};

/// x'/α' = x/α + (σ_down − σ̄) ε̂ + σ_up z with z ~ N(0, 1), σ̄ = σ/α, and
///
/// σ_up = min(σ̄', η σ̄' √(1 − (σ̄'/σ̄)²)), σ_down = √(σ̄'² − σ_up²):
///
/// Euler's method to less noise than asked for, and the rest drawn anew. k-diffusion's `sample_euler_ancestral`
/// (Crowson 2022); with η = 1 the noise is that of p(x' | x, x₀), Song et al., "Score-Based Generative Modeling through
/// Stochastic Differential Equations" (2021), appendix F. One prediction a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EulerAncestral {
    eta: f64,
}

impl EulerAncestral {
    /// η ≥ 0; 1 is usual, 0 is [`Euler`](super::Euler).
    ///
    /// # Errors
    /// [`Error::Value`] for other numbers.
    pub fn new(eta: f64) -> Result<Self> {
        if !(eta.is_finite() && eta >= 0.0) {
            return Err(Error::value("eta", "a finite number >= 0", eta));
        }
        Ok(Self { eta })
    }

    /// σ_down and σ_up.
    fn deviations(self, step: &Step) -> Result<(f64, f64)> {
        let (from, to) = (ratio(step.level), ratio(step.next));
        if to.is_nan() || to >= from {
            let what = format!("noise of step {}", step.index);
            return Err(Error::value(what, format!("below {from}, that of the step before"), to));
        }
        let up = to.min(self.eta * to * (1.0 - (to / from).powi(2)).sqrt());
        Ok(((to * to - up * up).sqrt(), up))
    }
}

impl Default for EulerAncestral {
    fn default() -> Self {
        Self { eta: 1.0 }
    }
}

impl Sampler for EulerAncestral {
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
        let deviations = steps.iter().map(|step| self.deviations(step)).collect::<Result<Vec<_>>>()?;
        let _no_gradients = tch::no_grad_guard();
        for (step, (down, up)) in steps.iter().zip(deviations) {
            let alpha = step.next.alpha();
            x = ask(predict, &x, step)?.mix(step.level, alpha, alpha * down)?;
            if up > 0.0 {
                x = x.f_add(&normal_like(&x, noise)?.f_mul_scalar(alpha * up)?)?;
            }
        }
        done(x, steps)
    }
}
