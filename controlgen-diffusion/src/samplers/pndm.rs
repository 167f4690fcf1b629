//! Pseudo linear multistep.

use controlgen_core::guidance::{Guided, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{NoiseLevel, Parameterisation, Prediction, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done};

/// DDIM's step along a mean of predictions, x' = α' x̂₀ + σ' ε̂ with
///
/// ε̂ = (55 ε₀ − 59 ε₋₁ + 37 ε₋₂ − 9 ε₋₃) / 24
///
/// (Adams and Bashforth's). Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds" (2022), eq. 11
/// and 12: F-PNDM without its Runge-Kutta start, as Stable Diffusion ran first (PLMS). The first step is Heun's, its
/// second prediction asked under the step that follows; the next two are of orders 2 and 3.
///
/// n steps are n + 1 predictions. The weights take the steps as equally long, which makes it of second order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pndm {
    of_v: bool,
}

impl Pndm {
    /// Takes the mean of v where the model predicts v, at levels that differ, as diffusers does: of first order only.
    #[must_use]
    pub fn with_means_of_v(self) -> Self {
        Self { of_v: true }
    }
}

/// The weights of predictions, the newest first, by how many there are before.
const WEIGHTS: [&[f64]; 4] = [
    &[1.0],
    &[1.5, -0.5],
    &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
    &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
];

impl Pndm {
    /// What means are taken of.
    fn form(self, guided: &Guided, level: NoiseLevel) -> Result<Prediction> {
        if self.of_v && guided.shift.is_none() && guided.prediction.parameterisation == Parameterisation::V {
            return Ok(guided.prediction.handle());
        }
        Ok(Prediction::new(guided.epsilon(level)?, Parameterisation::Epsilon))
    }
}

impl Sampler for Pndm {
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
        let mut past = Vec::<Prediction>::new(); // the newest first
        for (i, step) in steps.iter().enumerate() {
            let guided = ask(predict, &x, step)?;
            past.insert(0, self.form(&guided, step.level)?);
            past.truncate(WEIGHTS.len());
            let to_next =
                |mean: &Prediction| mean.mix(&guided.x, step.level, step.next.alpha(), step.next.sigma());
            let parts: Vec<_> = WEIGHTS[past.len() - 1].iter().copied().zip(&past).collect();
            x = to_next(&Prediction::combine(&parts)?)?;
            if let (0, Some(following)) = (i, steps.get(1)) {
                let ahead = self.form(&ask(predict, &x, following)?, following.level)?;
                x = to_next(&Prediction::combine(&[(0.5, &past[0]), (0.5, &ahead)])?)?;
            }
        }
        done(x, steps)
    }
}
