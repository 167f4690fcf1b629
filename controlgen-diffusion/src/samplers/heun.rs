//! Heun's method.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, ratio};

/// x̄' = x̄ + (σ̄' − σ̄) (ε̂(x, σ) + ε̂(x_E, σ')) / 2, where x_E is what [`Euler`](super::Euler) makes of x, x̄ = x/α and
/// σ̄ = σ/α. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), algorithm 1.
///
/// Of second order, with two predictions a step, the second asked under the step that follows; the last step is
/// Euler's. n steps are 2 n − 1 predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heun;

impl Sampler for Heun {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(*self)
    }

    fn sample(
        &self,
        predict: &mut Predict<'_>,
        mut x: Tensor,
        steps: &[Step],
        _noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        check_steps(steps)?;
        if let Some(step) = steps.iter().find(|step| step.level.alpha() == 0.0) {
            return Err(Error::value(format!("alpha at step {}", step.index), "> 0", 0));
        }
        let _no_gradients = tch::no_grad_guard();
        for (i, step) in steps.iter().enumerate() {
            let here = ask(predict, &x, step)?;
            x = here.mix(step.level, step.next.alpha(), step.next.sigma())?;
            let Some(following) = steps.get(i + 1) else { break };
            let slope = here.epsilon(step.level)?;
            let ahead = ask(predict, &x, following)?.epsilon(following.level)?;
            let half = 0.5 * step.next.alpha() * (ratio(step.next) - ratio(step.level));
            x = x.f_add(&ahead.f_sub(&slope)?.f_mul_scalar(half)?)?;
        }
        done(x, steps)
    }
}
