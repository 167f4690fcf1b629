//! Samplers, one a file: from noise to a sample, step by step.

mod ddim;

pub use ddim::Ddim;

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Result};
use tch::Tensor;

/// What a sampler asks at each step: the guided prediction for x `[B, C, H, W]`. A [`Guider`], or any function.
pub type Predict<'a> = dyn FnMut(&Tensor, &Step) -> Result<Guided> + 'a;

/// From noise to a sample: a solver of the reverse process (Song et al. 2021; Karras et al. 2022).
///
/// It is a value without state; what solvers of several steps remember lives in `sample`. It reads of a prediction what
/// its paper is written in, ε or x₀ ([`Guided::epsilon`], [`Guided::x0`]), which have the gradients' shift in them; a
/// sampler that moves a mean takes [`Guided::shift`] itself.
pub trait Sampler: Send {
    /// Another handle.
    fn handle(&self) -> Box<dyn Sampler>;

    /// x `[B, C, H, W]` at the last level, from x at the first. Noise is drawn for whole batches: with a stream a
    /// sample (a `Vec` of streams) no sample depends on its batch. Nothing is recorded for the caller's gradients.
    ///
    /// # Errors
    /// [`Error::Value`] for no steps, or steps that do not begin where the one before ended; `predict`'s; those of
    /// [`Guided::epsilon`] and [`Guided::x0`] where the level does not determine them.
    fn sample(
        &self,
        predict: &mut Predict<'_>,
        x: Tensor,
        steps: &[Step],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor>;
}

/// Runs a sampler around a guider: one [`GuiderRun`](controlgen_core::guidance::GuiderRun), planned before the first
/// prediction.
///
/// # Errors
/// Those of [`Guider::start`], [`Guider::predict`] and [`Sampler::sample`].
pub fn sample(
    sampler: &dyn Sampler,
    guider: &Guider,
    x: Tensor,
    steps: &[Step],
    noise: &mut dyn NoiseSource,
) -> Result<Tensor> {
    let mut run = guider.start(steps)?;
    sampler.sample(&mut |x, step| guider.predict(x, step, &mut run), x, steps, noise)
}

/// Refuses steps that are no way.
fn check_steps(steps: &[Step]) -> Result<()> {
    if steps.is_empty() {
        return Err(Error::value("steps", "at least one", 0));
    }
    for pair in steps.windows(2) {
        if pair[0].next != pair[1].level {
            let what = format!("the level of step {}", pair[1].index);
            let level = |level: controlgen_core::NoiseLevel| {
                format!("alpha {}, sigma {}", level.alpha(), level.sigma())
            };
            let expected = format!("{}, where the step before ends", level(pair[0].next));
            return Err(Error::value(what, expected, level(pair[1].level)));
        }
    }
    Ok(())
}
