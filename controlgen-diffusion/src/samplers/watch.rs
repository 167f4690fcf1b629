//! A sampler's run that is watched and may be stopped.

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::progress::{Flow, Ticker};
use controlgen_core::{Error, Result};
use tch::Tensor;

use super::Sampler;

/// What a watched run came to.
pub struct Sampled {
    /// The sample `[B, C, H, W]`; of a run that was stopped the last x̂₀.
    pub x: Tensor,
    /// Whether every step was taken.
    pub finished: bool,
    /// Whether the watch wants to go on: it may want to stop after the last step.
    pub flow: Flow,
}

/// [`sample`](super::sample), counting its steps: the ticker is told of each step when the next one asks for its first
/// prediction, and of the last one at the end. Where it says to stop, no more is predicted, and the sample is x̂₀ of the
/// last prediction. Any sampler is stopped so, as all ask before they step.
///
/// # Errors
/// Those of [`sample`](super::sample).
pub fn sample_watched(
    sampler: &dyn Sampler,
    guider: &Guider,
    x: Tensor,
    steps: &[Step],
    noise: &mut dyn NoiseSource,
    ticker: &mut Ticker<'_>,
) -> Result<Sampled> {
    let mut run = guider.start(steps)?;
    let mut last: Option<(Guided, Step)> = None;
    let mut stopped = false;
    let mut watched = |x: &Tensor, step: &Step| {
        let next = last.as_ref().is_some_and(|(_, last)| last.index < step.index);
        if next && ticker.advance(1) == Flow::Stop {
            stopped = true;
            return Err(Error::value("watch", "to go on", "stopped")); // only to leave the sampler's loop
        }
        let guided = guider.predict(x, step, &mut run)?;
        let (x, prediction) = (guided.x.shallow_clone(), guided.prediction.handle());
        let shift = guided.shift.as_ref().map(Tensor::shallow_clone);
        last = Some((Guided { x, prediction, shift }, *step));
        Ok(guided)
    };
    let sampled = sampler.sample(&mut watched, x, steps, noise);
    match (sampled, last) {
        (Ok(x), _) => Ok(Sampled { x, finished: true, flow: ticker.advance(1) }),
        (Err(_), Some((guided, step))) if stopped => {
            let _no_gradients = tch::no_grad_guard();
            // At pure noise there may be no estimate yet.
            let x = guided.x0(step.level).unwrap_or(guided.x);
            Ok(Sampled { x, finished: false, flow: Flow::Stop })
        }
        (Err(error), _) => Err(error),
    }
}
