//! One model of a pipeline of several, and how it is run.

use controlgen_core::{Denoiser, Result};
use tch::Tensor;

use super::batch::{Batch, Denoise};
use crate::Scheduler;

/// A model and how it is run where a run does not say.
pub(super) struct Stage {
    pub(super) denoiser: Box<dyn Denoiser>,
    pub(super) scheduler: Scheduler,
    pub(super) steps: usize,
    /// s of classifier-free guidance; 1 is none.
    pub(super) scale: f64,
}

impl Stage {
    pub(super) fn share(&self) -> Self {
        Self { denoiser: (*self.denoiser).handle(), scheduler: self.scheduler.handle(), ..*self }
    }

    /// Through the scheduler's steps, by its sampler, without stages of guidance or controls.
    pub(super) fn way(&self) -> Result<Denoise<'_>> {
        Ok(Denoise {
            denoiser: &*self.denoiser,
            sampler: self.scheduler.sampler(),
            steps: self.scheduler.steps(self.steps)?,
            scale: self.scale,
            stages: Vec::new(),
            controls: None,
        })
    }

    /// Noise `[B, C, H, W]` of deviation 1, of the size that the model was made for.
    pub(super) fn noise(&self, batch: &mut Batch<'_, '_>) -> Result<Tensor> {
        let spec = self.denoiser.spec();
        batch.normal(&[spec.channels, spec.size[0], spec.size[1]], spec.placement)
    }
}
