//! Samplers, one a file: from noise to a sample, step by step.

mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod euler_ancestral;
mod flow_match_euler;
mod heun;
mod lcm;
mod pndm;
mod threshold;
mod unipc;
mod watch;

pub use ddim::Ddim;
pub use ddpm::{Ddpm, Variance};
pub use dpm_solver::{DpmSolver, DpmSolverType};
pub use euler::Euler;
pub use euler_ancestral::EulerAncestral;
pub use flow_match_euler::FlowMatchEuler;
pub use heun::Heun;
pub use lcm::Lcm;
pub use pndm::Pndm;
pub use threshold::{Threshold, Thresholded};
pub use unipc::{UniPc, UniPcType};
pub use watch::{Sampled, sample_watched};

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, NoiseLevel, Result};
use tch::{Kind, Tensor};

/// What a sampler asks at each step: the guided prediction for x `[B, C, H, W]`. A [`Guider`], or any function.
pub type Predict<'a> = dyn FnMut(&Tensor, &Step) -> Result<Guided> + 'a;

/// From noise to a sample: a solver of the reverse process (Song et al. 2021; Karras et al. 2022).
///
/// It is a value without state; what solvers of several steps remember lives in `sample`. It reads of a prediction what
/// its paper is written in, ε or x₀ ([`Guided::epsilon`], [`Guided::x0`]), which have the gradients' shift in them; a
/// sampler that moves a mean takes [`Guided::shift`] itself.
///
/// Samplers are written for any α and σ. k-diffusion's coordinates, α = 1, are not needed for models of α² + σ² = 1:
/// x / α there is x here, and the model is given x as it was trained, unscaled.
pub trait Sampler: Send {
    /// Another handle.
    fn handle(&self) -> Box<dyn Sampler>;

    /// x `[B, C, H, W]` at the last level, from x at the first. Noise is drawn for whole batches: with a stream a
    /// sample (a `Vec` of streams) no sample depends on its batch. Nothing is recorded for the caller's gradients.
    ///
    /// # Errors
    /// [`Error::Value`] for no steps, or steps that do not begin where the one before ended; `predict`'s; those of
    /// [`Guided::epsilon`] and [`Guided::x0`] where the level does not determine them; [`Error::NotFinite`] for a
    /// sample or prediction that is no number, naming the row and the step.
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

/// Begins a run: refuses steps that are no way.
fn check_steps(steps: &[Step]) -> Result<()> {
    check_any(steps)?;
    for pair in steps.windows(2) {
        if pair[0].next != pair[1].level {
            let what = format!("the level of step {}", pair[1].index);
            let level = |level: NoiseLevel| format!("alpha {}, sigma {}", level.alpha(), level.sigma());
            let expected = format!("{}, where the step before ends", level(pair[0].next));
            return Err(Error::value(what, expected, level(pair[1].level)));
        }
    }
    Ok(())
}

fn check_any(steps: &[Step]) -> Result<()> {
    if steps.is_empty() { Err(Error::value("steps", "at least one", 0)) } else { Ok(()) }
}

/// One prediction, of a sample that is a number and itself one.
fn ask(predict: &mut Predict<'_>, x: &Tensor, step: &Step) -> Result<Guided> {
    finite("the sample", x, step)?;
    let guided = predict(x, step)?;
    finite("the prediction", &guided.prediction.value, step)?;
    Ok(guided)
}

/// Ends a run whose last step was this one.
fn done(x: Tensor, steps: &[Step]) -> Result<Tensor> {
    if let Some(step) = steps.last() {
        finite("the sample after the last step", &x, step)?;
    }
    Ok(x)
}

/// Refuses NaN and infinities, naming the first row that has one and the step. A sum is the cheapest look at all.
fn finite(what: &str, x: &Tensor, step: &Step) -> Result<()> {
    let kind = if x.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
    if x.f_sum(kind)?.f_double_value(&[])?.is_finite() {
        return Ok(());
    }
    let rows = x.size().first().copied().unwrap_or(0).max(1);
    let bad = x.f_isfinite()?.f_logical_not()?.f_reshape([rows, -1])?.f_any_dim(1, false)?;
    if bad.f_any()?.f_int64_value(&[])? == 0 {
        return Ok(()); // finite numbers whose sum is not
    }
    let row = bad.f_to_kind(Kind::Int64)?.f_argmax(0, false)?.f_int64_value(&[])?;
    let nan = x.f_isnan()?.f_any()?.f_int64_value(&[])? != 0;
    Err(Error::NotFinite {
        what: what.to_owned(),
        at: format!("row {row}, step {} of {}", step.index, step.of),
        found: if nan { "NaN" } else { "infinity" }.into(),
    })
}

/// σ/α, the sigma of Karras et al. 2022.
fn ratio(level: NoiseLevel) -> f64 {
    level.sigma() / level.alpha()
}

/// Standard normals like x.
fn normal_like(x: &Tensor, noise: &mut dyn NoiseSource) -> Result<Tensor> {
    noise.normal(&x.size(), x.f_kind()?, x.device())
}
