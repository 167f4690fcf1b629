//! Guidance in a limited interval.

use controlgen_core::guidance::{Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{Error, Guidance, Result};
use tch::Tensor;

/// A stage that acts where low < σ/α ≤ high, and rests elsewhere: what it alone needs is then not computed.
/// Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
/// Models" (2024).
///
/// σ/α is the noise in the units of the clean sample, the paper's σ: √((1 − ᾱ) / ᾱ) of a diffusion level.
pub struct GuidanceInterval {
    stage: Box<dyn Guidance>,
    low: f64,
    high: f64,
}

impl GuidanceInterval {
    /// `stage` within low < σ/α ≤ high; high may be infinite.
    ///
    /// # Errors
    /// [`Error::Value`] unless 0 ≤ low < high.
    pub fn new(stage: impl Guidance + 'static, low: f64, high: f64) -> Result<Self> {
        if !(0.0..f64::INFINITY).contains(&low) || high.is_nan() || high <= low {
            let found = format!("{low} and {high}");
            return Err(Error::value("guidance interval", "0 <= low < high", found));
        }
        Ok(Self { stage: Box::new(stage), low, high })
    }

    fn acts(&self, step: &Step) -> bool {
        let noise = step.level.sigma() / step.level.alpha();
        noise > self.low && noise <= self.high
    }
}

impl Guidance for GuidanceInterval {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(Self { stage: self.stage.handle(), ..*self })
    }

    fn name(&self) -> &'static str {
        self.stage.name()
    }

    fn needs(&self, step: &Step) -> Needs {
        if self.acts(step) { self.stage.needs(step) } else { Needs::default() }
    }

    fn before(&self, step: &Step, x: Tensor) -> Result<Tensor> {
        if self.acts(step) { self.stage.before(step, x) } else { Ok(x) }
    }

    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, memory: &mut Memory) -> Result<Guided> {
        if self.acts(step) { self.stage.guide(step, out, so_far, memory) } else { Ok(so_far) }
    }
}
