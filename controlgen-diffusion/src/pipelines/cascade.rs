//! A cascade: a small image, made larger stage by stage.

use std::path::Path;

use controlgen_core::progress::Flow;
use controlgen_core::{Denoiser, Error, Placement, Result};
use tch::{Kind, Tensor};

use super::batch::{Batch, Conditions, Denoise};
use super::directory::Directory;
use super::images::{Images, Made};
use super::prompts::Prompts;
use super::run::Run;
use super::stage::Stage;
use super::text_to_image::{Defaults, TextToImage};
use crate::{PromptEncoder, Scheduler};

/// A stage that makes images larger, under the same prompt.
///
/// It sees the image before it, enlarged (bilinear) and noised to a level that it is told: noise-conditioning
/// augmentation (Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2021; Saharia et al.,
/// "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (Imagen), 2022, section 2.3). The
/// denoiser's conditions are the prompt's and the features `concat`, that image, and `class_labels`, the level.
pub struct Upscaler {
    stage: Stage,
    noising: Scheduler,
    level: f64,
}

impl Upscaler {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 1] = ["IFSuperResolutionPipeline"];

    /// With a denoiser and its scheduler, and the one by whose levels the image is noised: in 50 steps, with s = 4, from
    /// timestep 250 of that, as DeepFloyd IF has it.
    ///
    /// # Errors
    /// [`Error::Value`] for a scheduler of noise without a schedule of 251 timesteps.
    pub fn new(denoiser: Box<dyn Denoiser>, scheduler: Scheduler, noising: Scheduler) -> Result<Self> {
        let stage = Stage { denoiser, scheduler, steps: 50, scale: 4.0 };
        Self { stage, noising, level: 0.0 }.with_level(250)
    }

    /// Opens `unet`, `scheduler` and `image_noising_scheduler` of a directory of diffusers.
    ///
    /// # Errors
    /// As [`TextToImage::open`].
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = Directory::open(path.as_ref(), &Self::CLASSES)?;
        directory.require(&["unet", "scheduler", "image_noising_scheduler"])?;
        let scheduler = directory.scheduler()?;
        let file = directory.folder("image_noising_scheduler").join("scheduler_config.json");
        let denoiser = directory.denoiser_of(2, "unet", &scheduler, placement)?;
        Self::new(denoiser, scheduler, Scheduler::open(file)?)
    }

    /// From this timestep of the noising scheduler: diffusers' `noise_level`.
    ///
    /// # Errors
    /// [`Error::Value`] for one that it does not have.
    pub fn with_level(self, timestep: u32) -> Result<Self> {
        let Some(schedule) = self.noising.schedule() else {
            return Err(Error::value("the noising scheduler", "one with a schedule of betas", "a flow"));
        };
        let level = f64::from(timestep);
        schedule.level(level)?;
        Ok(Self { level, ..self })
    }

    /// In so many steps.
    #[must_use]
    pub fn with_steps(self, steps: usize) -> Self {
        Self { stage: Stage { steps, ..self.stage }, ..self }
    }

    /// With this s of classifier-free guidance; 1 is none.
    #[must_use]
    pub fn with_guidance_scale(self, scale: f64) -> Self {
        Self { stage: Stage { scale, ..self.stage }, ..self }
    }

    fn share(&self) -> Self {
        Self { stage: self.stage.share(), noising: self.noising.handle(), ..*self }
    }

    /// Images `[B, C, H, W]` of a batch, enlarged to what the stage was made for.
    fn run(
        &self,
        batch: &mut Batch<'_, '_>,
        way: &Denoise<'_>,
        conditions: &Conditions,
        images: &Tensor,
    ) -> Result<Tensor> {
        let spec = self.stage.denoiser.spec();
        let deviation = self.stage.scheduler.initial_deviation(&way.steps);
        let x = self.stage.noise(batch)?.f_mul_scalar(deviation)?;
        let large = enlarged(&images.f_to_device(spec.placement.device)?, spec.size)?;
        let noise = batch.normal(&large.size()[1..], spec.placement)?;
        let Some(schedule) = self.noising.schedule() else {
            return Err(Error::value("the noising scheduler", "one with a schedule of betas", "a flow"));
        };
        let level = schedule.level(self.level)?;
        let noised = large.f_mul_scalar(level.alpha())?.f_add(&noise.f_mul_scalar(level.sigma())?)?;
        let levels = Tensor::f_full([batch.len()], self.level, (Kind::Float, spec.placement.device))?;
        let conditions = conditions.with("concat", &noised)?.with("class_labels", &levels)?;
        batch.denoise(way, &conditions, x)
    }
}

/// Bilinear, the corners aligned.
fn enlarged(images: &Tensor, size: [i64; 2]) -> Result<Tensor> {
    Ok(images.f_upsample_bilinear2d(size, true, None, None)?)
}

/// Images of prompts by a cascade of models of pixels: DeepFloyd IF, Imagen. What a [`Run`] says of steps, guidance,
/// size, latents and controls it says of the first stage; the others say it of themselves.
///
/// ```no_run
/// # use controlgen_core::{Placement, Result};
/// # use controlgen_diffusion::PromptEncoder;
/// use controlgen_diffusion::pipelines::{Cascade, Run, Upscaler};
///
/// # fn example(t5: Box<dyn PromptEncoder>) -> Result<()> {
/// let cascade = Cascade::open("IF-I-XL-v1.0", t5, Placement::CPU)?
///     .with_upscaler(Upscaler::open("IF-II-L-v1.0", Placement::CPU)?)?;
/// cascade.run("a lighthouse at dawn", Run::new().seed(42))?.save(&["lighthouse.png"])?;
/// # Ok(())
/// # }
/// ```
pub struct Cascade {
    first: TextToImage,
    upscalers: Vec<Upscaler>,
}

impl Cascade {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 1] = ["IFPipeline"];

    /// A cascade of one stage: in 100 steps, with s = 7, of the size that the denoiser was made for.
    ///
    /// # Errors
    /// Those of [`TextToImage::new`].
    pub fn new(
        denoiser: Box<dyn Denoiser>,
        scheduler: Scheduler,
        prompts: Box<dyn PromptEncoder>,
    ) -> Result<Self> {
        let first = TextToImage::new(denoiser, scheduler, None, prompts)?;
        let defaults = Defaults { steps: 100, guidance_scale: 7.0, ..first.defaults() };
        Ok(Self { first: first.with_defaults(defaults), upscalers: Vec::new() })
    }

    /// Opens `unet` and `scheduler` of a directory of diffusers. What encodes prompts is given: T5 is large, and serves
    /// all stages.
    ///
    /// # Errors
    /// As [`TextToImage::open`].
    pub fn open(
        path: impl AsRef<Path>,
        prompts: Box<dyn PromptEncoder>,
        placement: Placement,
    ) -> Result<Self> {
        let directory = Directory::open(path.as_ref(), &Self::CLASSES)?;
        directory.require(&["unet", "scheduler"])?;
        let scheduler = directory.scheduler()?;
        Self::new(directory.denoiser("unet", &scheduler, placement)?, scheduler, prompts)
    }

    /// Adds a stage.
    ///
    /// # Errors
    /// [`Error::Value`] for one of images with other channels than the stage before it makes.
    pub fn with_upscaler(mut self, upscaler: Upscaler) -> Result<Self> {
        let (own, found) = (self.first.denoiser().spec().channels, upscaler.stage.denoiser.spec().channels);
        if own != found {
            return Err(Error::value("channels of an upscaler", own, found));
        }
        self.upscalers.push(upscaler);
        Ok(self)
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { first: self.first.share(), upscalers: self.upscalers.iter().map(Upscaler::share).collect() }
    }

    /// The first stage.
    pub fn first(&self) -> &TextToImage {
        &self.first
    }

    /// Images of prompts. A run that is stopped in a stage has its last estimates, enlarged to the size of the last.
    ///
    /// # Errors
    /// As [`TextToImage::run`]; [`Error::Unsupported`] for an upscaler with guidance where the run has none.
    pub fn run(&self, prompts: impl Into<Prompts>, mut run: Run<'_>) -> Result<Images> {
        let watch = run.watch();
        let job = self.first.job(&prompts.into(), &run)?;
        let ways = self.upscalers.iter().map(|upscaler| upscaler.stage.way()).collect::<Result<Vec<_>>>()?;
        if job.conditions.negative.is_none() && ways.iter().any(Denoise::needs_negative) {
            let what = "guidance of an upscaler without guidance of the first stage";
            return Err(Error::unsupported(what, "guidance of all stages, or of the first"));
        }
        let deviation = self.first.scheduler().initial_deviation(&job.way.steps);
        let steps = ways.iter().chain([&job.way]).map(|way| way.steps.len()).sum();
        let made = watch.batches(&run, job.images, steps, |batch| {
            let conditions = job.conditions.rows(&batch.rows())?;
            let x = job.noise(batch, &run)?.f_mul_scalar(deviation)?;
            let mut x = batch.denoise(&job.way, &conditions, x)?;
            for (upscaler, way) in self.upscalers.iter().zip(&ways) {
                x = match batch.flow() {
                    Flow::Continue => upscaler.run(batch, way, &conditions, &x)?,
                    Flow::Stop => enlarged(&x, upscaler.stage.denoiser.spec().size)?,
                };
            }
            Made::new(batch, x, None, run.decode)
        })?;
        job.done(&made)
    }
}
