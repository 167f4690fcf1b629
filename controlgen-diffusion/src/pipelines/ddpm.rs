//! Unconditional images.

use std::path::Path;

use controlgen_core::{Condition, Denoiser, Error, Placement, Result};

use super::batch::Conditions;
use super::directory::Directory;
use super::images::{Images, Made};
use super::run::Run;
use crate::Scheduler;

/// Images of nothing in particular, by a model of pixels. Ho et al., "Denoising Diffusion Probabilistic Models" (2020),
/// algorithm 2: x ~ N(0, 1), denoised step by step.
pub struct DdpmPipeline {
    denoiser: Box<dyn Denoiser>,
    scheduler: Scheduler,
    steps: usize,
    name: Option<String>,
}

impl DdpmPipeline {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 2] = ["DDPMPipeline", "DDIMPipeline"];

    /// Opens a directory of diffusers.
    ///
    /// # Errors
    /// As [`TextToImage::open`](super::TextToImage::open).
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = Directory::open(path.as_ref(), &Self::CLASSES)?;
        directory.require(&["unet", "scheduler"])?;
        let scheduler = directory.scheduler()?;
        let denoiser = directory.denoiser("unet", &scheduler, placement)?;
        let steps = if directory.class() == "DDIMPipeline" { 50 } else { 1000 };
        Ok(Self { name: Some(directory.name()), steps, ..Self::new(denoiser, scheduler) })
    }

    /// Puts components together.
    pub fn new(denoiser: Box<dyn Denoiser>, scheduler: Scheduler) -> Self {
        Self { denoiser, scheduler, steps: 1000, name: None }
    }

    /// With another scheduler. What the denoiser predicts is what it was opened with, whatever the scheduler says.
    #[must_use]
    pub fn with_scheduler(self, scheduler: Scheduler) -> Self {
        Self { scheduler, ..self }
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        let (denoiser, scheduler) = ((*self.denoiser).handle(), self.scheduler.handle());
        Self { denoiser, scheduler, steps: self.steps, name: self.name.clone() }
    }

    /// The denoiser, to whose sites controls are bound.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// So many images; in 1000 steps (50 of a `DDIMPipeline`), of the size that the model was made for, unless the run says otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a guidance scale, as there is no condition; else as
    /// [`TextToImage::run`](super::TextToImage::run).
    pub fn run(&self, images: usize, mut run: Run<'_>) -> Result<Images> {
        let watch = run.watch();
        if let Some(scale) = run.guidance_scale.filter(|scale| *scale != 1.0) {
            return Err(Error::unsupported(
                format!("a guidance scale of {scale}"),
                "1: there is no condition",
            ));
        }
        let spec = self.denoiser.spec();
        let shape = super::sample_shape(&*self.denoiser, None, run.size.unwrap_or(spec.size))?;
        let way = run.way(&self.scheduler, self.steps)?;
        let way = run.denoise(&*self.denoiser, way, 1.0);
        let null = || vec![Condition::Null];
        // A stage of guidance may name both of its conditions.
        let conditions = Conditions { negative: way.needs_negative().then(null), prompt: null() };
        let deviation = self.scheduler.initial_deviation(&way.steps);
        let made = watch.batches(&run, images, way.steps.len(), |batch| {
            let x = batch.noise(images, shape, &run, spec.placement)?.f_mul_scalar(deviation)?;
            let x = batch.denoise(&way, &conditions, x)?;
            Made::new(batch, x, None, run.decode)
        })?;
        let parameters = |image| run.parameters(image, &way, &self.scheduler, self.name.as_deref());
        Images::gather(&made, (0..images).map(parameters).collect(), vec![None; images])
    }
}
