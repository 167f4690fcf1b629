//! Euler's method along rectified flow.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, normal_like};

/// x' = x + (σ' − σ) û, the velocity û = ε̂ − x̂₀, where x = (1 − σ) x₀ + σ ε. Liu et al., "Flow Straight and Fast"
/// (2022), and Lipman et al., "Flow Matching for Generative Modeling" (2022); Esser et al. (2024) for images.
///
/// One prediction a step, of first order. With [`Self::stochastic`] x' = (1 − σ') x̂₀ + σ' z instead, z ~ N(0, 1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowMatchEuler {
    stochastic: bool,
}

impl FlowMatchEuler {
    /// With new noise in every step: diffusers' `stochastic_sampling`.
    pub fn stochastic() -> Self {
        Self { stochastic: true }
    }
}

impl Sampler for FlowMatchEuler {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(*self)
    }

    /// # Errors
    /// Also [`Error::Value`] for a level that is not of rectified flow, α + σ = 1.
    fn sample(
        &self,
        predict: &mut Predict<'_>,
        mut x: Tensor,
        steps: &[Step],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        check_steps(steps)?;
        for step in steps {
            for level in [step.level, step.next] {
                let sum = level.alpha() + level.sigma();
                if (sum - 1.0).abs() > 1e-6 {
                    let what = format!("alpha + sigma at step {}", step.index);
                    return Err(Error::value(what, "1, as of rectified flow", sum));
                }
            }
        }
        let _no_gradients = tch::no_grad_guard();
        for step in steps {
            let guided = ask(predict, &x, step)?;
            let (alpha, sigma) = (step.next.alpha(), step.next.sigma());
            if self.stochastic && sigma > 0.0 {
                let clean = guided.x0(step.level)?.f_mul_scalar(alpha)?;
                x = clean.f_add(&normal_like(&clean, noise)?.f_mul_scalar(sigma)?)?;
            } else {
                // x + (σ' − σ) (ε̂ − x̂₀) = (1 − σ') x̂₀ + σ' ε̂
                x = guided.mix(step.level, alpha, sigma)?;
            }
        }
        done(x, steps)
    }
}
