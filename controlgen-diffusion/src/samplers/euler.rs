//! Euler's method.

use controlgen_core::Result;
use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done};

/// x'/α' = x/α + (σ'/α' − σ/α) ε̂: Euler's method on dx̄/dσ̄ = ε̂, x̄ = x/α, σ̄ = σ/α. Karras et al., "Elucidating the
/// Design Space of Diffusion-Based Generative Models" (2022), algorithm 1 without line 7, and algorithm 2 without
/// churn.
///
/// One prediction a step, of first order. It is [`Ddim`](super::Ddim) with η = 0, written in other variables; which
/// steps are taken is what tells diffusers' two schedulers apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Euler;

impl Sampler for Euler {
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
        let _no_gradients = tch::no_grad_guard();
        for step in steps {
            // α' (x̄ + (σ̄' − σ̄) ε̂) = α' x̂₀ + σ' ε̂
            x = ask(predict, &x, step)?.mix(step.level, step.next.alpha(), step.next.sigma())?;
        }
        done(x, steps)
    }
}
