//! Classifier guidance.

use controlgen_core::energy::Noised;
use controlgen_core::guidance::{Grad, Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{Energy, EnergyFn, Guidance, Result};

use crate::check;

/// Adds s ∇ ln p(y | x_t) to the score, of a classifier that reads noised samples: an energy E(x_t) = −ln p(y | x_t),
/// such as [`class_energy`](crate::class_energy).
/// Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), algorithms 1 and 2.
///
/// With the exact classifier and s = 1 samples are of the posterior p(x | y) of the model that is guided. Several
/// stages are the product of their classifiers, at every level; that is the posterior of all labels where these are
/// independent given x_t. The gradient is taken at x_t, as in the paper's code (its algorithm 1 says μ), of the sum over
/// the batch; the denoiser has no part in it.
///
/// Samplers apply it each in its own way: ε − σ s ∇ ln p for DDIM and the solvers, μ + Σ s ∇ ln p for DDPM
/// ([`Guided::shift`]). Where there is only noise (α = 0, where rectified flow starts) x₀ cannot be shifted; let the
/// stage rest there ([`GuidanceInterval`](crate::GuidanceInterval)).
///
/// *Cost*: the classifier forwards and backwards; no prediction of its own.
#[derive(Clone)]
pub struct ClassifierGuidance {
    energy: Energy<Noised>,
    scale: f64,
}

impl ClassifierGuidance {
    /// Downhill in `energy`, one number a row, s times as fast. Usual scales of ImageNet classifiers are 0.5 to 10.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for a scale that is no finite number.
    pub fn new(energy: Energy<Noised>, scale: f64) -> Result<Self> {
        Ok(Self { energy, scale: check::finite("guidance scale", scale)? })
    }
}

impl Guidance for ClassifierGuidance {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }

    fn name(&self) -> &'static str {
        "classifier guidance"
    }

    fn needs(&self, _step: &Step) -> Needs {
        Needs::grad(Grad::AtX)
    }

    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let energy = self.energy.energy(&Noised { x: out.x().shallow_clone(), level: step.level })?;
        let gradient = out.grad(&energy)?;
        so_far.shifted(gradient.f_mul_scalar(-self.scale)?)
    }
}
