//! Forward universal guidance.

use controlgen_core::energy::Image;
use controlgen_core::guidance::{Grad, Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{Energy, EnergyFn, Guidance, Result};

use crate::check;

/// Adds −s ∇ E(x̂₀(x_t)) to the score, for an energy of clean images: no network has to be trained on noise. The
/// gradient goes through the denoiser and all stages before this one. Bansal et al., "Universal Guidance for Diffusion
/// Models" (2023), the forward part; clean CLIP guidance, diffusion posterior sampling (Chung et al. 2023) and FreeDoM (Yu
/// et al. 2023) are of this form.
///
/// x̂₀ is the mean of what x₀ may be. Hence this is −s ∇ E(E\[x₀ | x_t\]), while samples of p(x) exp(−s E(x)) want
/// ∇ ln E\[exp(−s E(x₀)) | x_t\]: equal for a linear energy of Gaussian data, and nearly so where there is little noise.
///
/// Where there is only noise (α = 0) x̂₀ must come from a model that predicts it, v, or a velocity.
///
/// *Cost*: the denoiser records its graph, and runs backwards once a stage.
#[derive(Clone)]
pub struct UniversalGuidance {
    energy: Energy<Image>,
    scale: f64,
}

impl UniversalGuidance {
    /// Downhill in `energy`, one number a row, s times as fast.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for a scale that is no finite number.
    pub fn new(energy: Energy<Image>, scale: f64) -> Result<Self> {
        Ok(Self { energy, scale: check::finite("guidance scale", scale)? })
    }
}

impl Guidance for UniversalGuidance {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }

    fn name(&self) -> &'static str {
        "universal guidance"
    }

    fn needs(&self, _step: &Step) -> Needs {
        Needs::grad(Grad::ThroughDenoiser)
    }

    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let energy = self.energy.energy(&Image(so_far.prediction.x0(out.x(), step.level)?))?;
        let gradient = out.grad(&energy)?;
        so_far.shifted(gradient.f_mul_scalar(-self.scale)?)
    }
}
