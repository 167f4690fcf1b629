//! Text to image.

use std::path::Path;

use controlgen_core::energy::Image;
use controlgen_core::{
    Autoencoder, Condition, Denoiser, Error, ImageRequest, ImageSampler, Placement, Result,
};
use tch::{Kind, Tensor};

use super::batch::{Batch, Conditions, Denoise};
use super::directory::Directory;
use super::images::{Images, Made};
use super::prompts::{Distinct, Prompts};
use super::run::{Run, Seeds};
use crate::Scheduler;
use crate::image::Parameters;
use crate::prompt::{ClipPairPrompt, ClipPrompt, EncodedPrompt, PromptEncoder};

/// What a pipeline does where a run does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// How many steps the sampler takes.
    pub steps: usize,
    /// s of classifier-free guidance.
    pub guidance_scale: f64,
    /// Height and width, in pixels.
    pub size: [i64; 2],
}

/// Images of prompts, by a model of latents or of pixels. Rombach et al., "High-Resolution Image Synthesis with Latent
/// Diffusion Models" (2022): x ~ N(0, 1), denoised step by step under the prompt's features and classifier-free
/// guidance, and decoded.
///
/// It is Stable Diffusion 1.x, 2.x and XL; with the same components it changes images ([`Self::image_to_image`]) and parts
/// of them ([`Self::inpaint`]).
pub struct TextToImage {
    pub(super) denoiser: Box<dyn Denoiser>,
    pub(super) scheduler: Scheduler,
    pub(super) autoencoder: Option<Box<dyn Autoencoder>>,
    pub(super) prompts: Box<dyn PromptEncoder>,
    defaults: Defaults,
    name: Option<String>,
    /// Channels that the denoiser takes beside the sample's.
    pub(super) beside: i64,
    time_ids: bool,
    zeros_for_none: bool,
}

/// The pipelines of diffusers that are these components.
const CLASSES: [&str; 6] = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
];

impl TextToImage {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 6] = CLASSES;

    /// Opens a directory of diffusers: model_index.json and a folder for each component. Weights are safetensors. What
    /// watches over the images there (`safety_checker`) is not run. Where the index has `"vae": [null, null]`, the
    /// denoiser's samples are pixels.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`]; [`Error::Unsupported`] for a pipeline, scheduler or model that is not known,
    /// naming those that are; [`Error::Keys`], naming all components that are missing; the components' own.
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let path = path.as_ref();
        let directory = Directory::open(path, &CLASSES)?;
        let xl = directory.class().starts_with("StableDiffusionXL");
        if directory.index().bool("requires_aesthetics_score", false)? {
            let what = "a refiner of Stable Diffusion XL (`requires_aesthetics_score`)";
            return Err(Error::unsupported(what, "its base models"));
        }
        let pixels = directory.does_without("vae");
        let required = ["unet", "scheduler", "vae", "tokenizer", "text_encoder"];
        let required: Vec<&str> = required.into_iter().filter(|&name| !(pixels && name == "vae")).collect();
        directory.require(&required)?;
        if xl {
            directory.require(&["tokenizer_2", "text_encoder_2"])?;
        }
        let scheduler = directory.scheduler()?;
        let denoiser = directory.denoiser("unet", &scheduler, placement)?;
        let prompts: Box<dyn PromptEncoder> = if xl {
            Box::new(ClipPairPrompt::open(path, placement)?)
        } else {
            Box::new(ClipPrompt::open(path, placement)?)
        };
        let taken = directory.config("unet")?.int("in_channels", 1, i64::MAX)?;
        let beside = taken - denoiser.spec().channels;
        let autoencoder = if pixels { None } else { Some(directory.autoencoder(placement)?) };
        let mut pipeline = Self::new(denoiser, scheduler, autoencoder, prompts)?;
        pipeline.name = Some(directory.name());
        pipeline.beside = beside;
        if xl {
            pipeline.time_ids = true;
            pipeline.zeros_for_none = directory.index().bool("force_zeros_for_empty_prompt", true)?;
            pipeline.defaults.guidance_scale = 5.0;
        }
        Ok(pipeline)
    }

    /// Puts components together: 50 steps, s = 7.5, the size that the denoiser was made for, unless
    /// [`Self::with_defaults`] says otherwise. Without an autoencoder the denoiser's samples are pixels.
    ///
    /// # Errors
    /// [`Error::Value`] where the autoencoder's latents have other channels than the denoiser's samples.
    pub fn new(
        denoiser: Box<dyn Denoiser>,
        scheduler: Scheduler,
        autoencoder: Option<Box<dyn Autoencoder>>,
        prompts: Box<dyn PromptEncoder>,
    ) -> Result<Self> {
        let size = super::default_size(&*denoiser, autoencoder.as_deref())?;
        Ok(Self {
            denoiser,
            scheduler,
            autoencoder,
            prompts,
            defaults: Defaults { steps: 50, guidance_scale: 7.5, size },
            name: None,
            beside: 0,
            time_ids: false,
            zeros_for_none: false,
        })
    }

    /// With other defaults.
    #[must_use]
    pub fn with_defaults(self, defaults: Defaults) -> Self {
        Self { defaults, ..self }
    }

    /// With another scheduler. What the denoiser predicts is what it was opened with, whatever the scheduler says.
    #[must_use]
    pub fn with_scheduler(self, scheduler: Scheduler) -> Self {
        Self { scheduler, ..self }
    }

    /// With another autoencoder: the same in tiles, for one.
    ///
    /// # Errors
    /// [`Error::Value`] where its latents have other channels than the denoiser's samples.
    pub fn with_autoencoder(self, autoencoder: Box<dyn Autoencoder>) -> Result<Self> {
        super::default_size(&*self.denoiser, Some(&*autoencoder))?;
        Ok(Self { autoencoder: Some(autoencoder), ..self })
    }

    /// With another encoder of prompts: the same that reads weights of words, for one.
    #[must_use]
    pub fn with_prompts(self, prompts: Box<dyn PromptEncoder>) -> Self {
        Self { prompts, ..self }
    }

    /// With another denoiser: the same with merged weights, for one. It takes the same channels beside its samples, unless
    /// [`Self::for_inpainting`] says otherwise.
    ///
    /// # Errors
    /// [`Error::Value`] where its samples have other channels than the latents of the autoencoder.
    pub fn with_denoiser(self, denoiser: Box<dyn Denoiser>) -> Result<Self> {
        super::default_size(&*denoiser, self.autoencoder.as_deref())?;
        Ok(Self { denoiser, ..self })
    }

    /// With the micro-conditioning of SDXL (Podell et al. 2023, section 2.2): the feature `time_ids`, six numbers.
    #[must_use]
    pub fn with_time_ids(self) -> Self {
        Self { time_ids: true, ..self }
    }

    /// With a denoiser of inpainting: it takes the mask and the masked image beside its sample.
    #[must_use]
    pub fn for_inpainting(self) -> Self {
        Self { beside: self.denoiser.spec().channels + 1, ..self }
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            denoiser: (*self.denoiser).handle(),
            scheduler: self.scheduler.handle(),
            autoencoder: self.autoencoder.as_deref().map(Autoencoder::handle),
            prompts: self.prompts.handle(),
            name: self.name.clone(),
            ..*self
        }
    }

    /// What is done where a run does not say.
    pub fn defaults(&self) -> Defaults {
        self.defaults
    }

    /// The denoiser, to whose sites controls are bound.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// The scheduler.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The autoencoder of a model of latents.
    pub fn autoencoder(&self) -> Option<&dyn Autoencoder> {
        self.autoencoder.as_deref()
    }

    /// What encodes prompts.
    pub fn prompt_encoder(&self) -> &dyn PromptEncoder {
        &*self.prompts
    }

    /// Images of prompts.
    ///
    /// # Errors
    /// [`Error::Value`] for no prompts, a size that the models cannot take, steps beyond training, seeds that are not
    /// one an image; [`Error::Unsupported`] for a denoiser of inpainting; those of the components, of guidance and
    /// controls; [`Error::NotFinite`] for a NaN, naming the step.
    pub fn run(&self, prompts: impl Into<Prompts>, mut run: Run<'_>) -> Result<Images> {
        let watch = run.watch();
        let job = self.job(&prompts.into(), &run)?;
        self.refuse_beside()?;
        let deviation = self.scheduler.initial_deviation(&job.way.steps);
        let made = watch.batches(&run, job.images, job.way.steps.len(), |batch| {
            let x = job.noise(batch, &run)?.f_mul_scalar(deviation)?;
            let x = batch.denoise(&job.way, &job.conditions.rows(&batch.rows())?, x)?;
            Made::new(batch, x, self.autoencoder.as_deref(), run.decode)
        })?;
        job.done(&made)
    }

    /// Refuses a denoiser that takes more than its samples.
    pub(super) fn refuse_beside(&self) -> Result<()> {
        if self.beside == 0 {
            return Ok(());
        }
        let what = format!("a denoiser of {} more channels than its samples", self.beside);
        Err(Error::unsupported(what, "inpainting with it"))
    }

    /// What all runs begin with: the prompts read, the size and the steps known to be possible.
    pub(super) fn job<'d>(&'d self, prompts: &Prompts, run: &'d Run<'_>) -> Result<Job<'d>> {
        let images = prompts.count()?;
        let size = run.size.unwrap_or(self.defaults.size);
        let shape = super::sample_shape(&*self.denoiser, self.autoencoder.as_deref(), size)?;
        let scale = run.guidance_scale.unwrap_or(self.defaults.guidance_scale);
        let way = run.way(&self.scheduler, self.defaults.steps)?;
        let way = run.denoise(&*self.denoiser, way, scale);
        let (conditions, truncated) = self.conditions(prompts, size, way.needs_negative())?;
        let parameters = |image: usize| Parameters {
            prompt: Some(prompts.prompt(image).to_owned()),
            negative_prompt: prompts.negative_of(image).map(str::to_owned),
            guidance_scale: Some(scale),
            ..run.parameters(image, &way, &self.scheduler, self.name.as_deref())
        };
        let parameters = (0..images).map(parameters).collect();
        Ok(Job { images, size, shape, way, conditions, truncated, parameters })
    }

    /// The features of each image's prompt, one for all where all are the same, and what was not read of them.
    fn conditions(
        &self,
        prompts: &Prompts,
        size: [i64; 2],
        negative: bool,
    ) -> Result<(Conditions, Vec<Option<String>>)> {
        let _no_gradients = tch::no_grad_guard();
        let images = prompts.count()?;
        let mut texts = Distinct::default();
        let of: Vec<usize> = (0..images).map(|image| texts.place(prompts.prompt(image))).collect();
        // The text to lead away from; none stands for zeros.
        let mut away_from = |image| match prompts.negative_of(image) {
            None if self.zeros_for_none => None,
            text => Some(texts.place(text.unwrap_or(""))),
        };
        let away: Vec<Option<usize>> =
            if negative { (0..images).map(&mut away_from).collect() } else { Vec::new() };
        let encoded = self.prompts.encode(&texts.0)?;
        if encoded.len() != texts.0.len() {
            return Err(Error::value("encoded prompts", texts.0.len(), encoded.len()));
        }
        let prompt = each(&of, |text| self.features(&encoded[text], prompts, size, false))?;
        let away = each(&away, |text| {
            self.features(&encoded[text.unwrap_or(of[0])], prompts, size, text.is_none())
        })?;
        let negative = negative.then_some(away);
        let truncated = of.iter().map(|&text| encoded[text].truncated.clone()).collect();
        Ok((Conditions { negative, prompt }, truncated))
    }

    /// What the denoiser is told of one prompt; or zeros in its place.
    fn features(
        &self,
        encoded: &EncodedPrompt,
        prompts: &Prompts,
        size: [i64; 2],
        zeros: bool,
    ) -> Result<Condition> {
        let mut features = Vec::with_capacity(encoded.features.len() + 1);
        for (name, value) in &encoded.features {
            let value = if zeros { value.f_zeros_like()? } else { value.shallow_clone() };
            features.push((name.clone(), value));
        }
        if self.time_ids {
            let ids = [prompts.original_size.unwrap_or(size), prompts.crop, size].concat();
            let device = self.denoiser.spec().placement.device;
            let ids = Tensor::f_from_slice(&ids)?.f_to_kind(Kind::Float)?.f_to_device(device)?;
            features.push(("time_ids".to_owned(), ids));
        }
        Ok(Condition::Features(features))
    }
}

/// One condition for all where all texts are the same, else one an image.
fn each<T: Copy + PartialEq>(texts: &[T], make: impl Fn(T) -> Result<Condition>) -> Result<Vec<Condition>> {
    let same = texts.windows(2).all(|pair| pair[0] == pair[1]);
    let texts = if same { texts.get(..1).unwrap_or(texts) } else { texts };
    texts.iter().map(|&text| make(text)).collect()
}

/// A run whose prompts are read.
pub(super) struct Job<'d> {
    pub(super) images: usize,
    /// Height and width, in pixels.
    pub(super) size: [i64; 2],
    /// Of one sample, `[C, h, w]`.
    pub(super) shape: [i64; 3],
    pub(super) way: Denoise<'d>,
    pub(super) conditions: Conditions,
    truncated: Vec<Option<String>>,
    parameters: Vec<Parameters>,
}

impl Job<'_> {
    /// The noise that a batch begins with: drawn, or as it was given.
    pub(super) fn noise(&self, batch: &mut Batch<'_, '_>, run: &Run<'_>) -> Result<Tensor> {
        batch.noise(self.images, self.shape, run, self.way.denoiser.spec().placement)
    }

    /// The images of all batches.
    pub(super) fn done(self, made: &[Made]) -> Result<Images> {
        Images::gather(made, self.parameters, self.truncated)
    }
}

impl ImageSampler for TextToImage {
    fn handle(&self) -> Box<dyn ImageSampler> {
        Box::new(self.share())
    }

    /// All requests at once, with the pipeline's [`Defaults`].
    fn sample(&self, requests: &[ImageRequest]) -> Result<Image> {
        let seeds = Seeds::Each(requests.iter().map(|request| request.seed).collect());
        let images = self.run(requests, Run::new().seeds(seeds))?;
        images.pixels.map(Image).ok_or_else(|| Error::value("pixels of a run", "some", "none"))
    }
}
