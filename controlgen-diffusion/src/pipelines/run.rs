//! How a pipeline runs.

use controlgen_core::guidance::Step;
use controlgen_core::progress::{CancelToken, Flow, Observer, Ticker};
use controlgen_core::{Controls, Denoiser, Error, Guidance, Result};
use tch::Tensor;

use super::batch::{Batch, Denoise, Source};
use super::prompts::MOST;
use crate::image::Parameters;
use crate::{Sampler, Scheduler};

/// Where the noise of each image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seeds {
    /// Image k draws from stream k of the seed: it does not depend on the others, on their number or on the batch.
    One(u64),
    /// Each image draws from stream 0 of a seed of its own.
    Each(Vec<u64>),
    /// diffusers' `generator=torch.Generator().manual_seed(seed)`: one generator for all images, whose numbers depend
    /// on how many images there are. All are one batch.
    Torch(u64),
    /// diffusers' list of generators, one an image.
    TorchEach(Vec<u64>),
}

impl Seeds {
    /// The noise of these of `all` images.
    fn source(&self, all: usize, rows: std::ops::Range<usize>) -> Result<Source> {
        if let Self::Each(seeds) | Self::TorchEach(seeds) = self
            && seeds.len() != all
        {
            return Err(Error::value("seeds", format!("{all}, one an image"), seeds.len()));
        }
        if matches!(self, Self::Torch(_)) && rows.len() < all {
            let supported = "batches of one PyTorch generator's images all at once; a seed an image";
            return Err(Error::unsupported(format!("{} images of {all}", rows.len()), supported));
        }
        Ok(match self {
            Self::One(seed) => Source::streams(rows.map(|row| (*seed, row as u64))),
            Self::Each(seeds) => Source::streams(seeds[rows].iter().map(|&seed| (seed, 0))),
            Self::Torch(seed) => Source::torch(*seed),
            Self::TorchEach(seeds) => Source::torch_each(&seeds[rows]),
        })
    }

    /// The seed of an image, where it has one.
    pub fn of(&self, image: usize) -> Option<u64> {
        match self {
            Self::One(seed) | Self::Torch(seed) => Some(*seed),
            Self::Each(seeds) | Self::TorchEach(seeds) => seeds.get(image).copied(),
        }
    }
}

/// A run of a pipeline, described: what is not said is as the pipeline has it by default.
///
/// ```
/// use controlgen_diffusion::pipelines::Run;
///
/// let run = Run::new().seed(42).steps(25).guidance_scale(7.5).size(512, 768);
/// ```
pub struct Run<'a> {
    pub(super) seeds: Seeds,
    pub(super) steps: Option<usize>,
    pub(super) guidance_scale: Option<f64>,
    pub(super) size: Option<[i64; 2]>,
    pub(super) eta: Option<f64>,
    pub(super) latents: Option<Tensor>,
    pub(super) decode: bool,
    sampler: Option<Box<dyn Sampler>>,
    stages: Vec<Box<dyn Guidance>>,
    controls: Option<&'a Controls>,
    batch: usize,
    observer: Option<&'a mut dyn Observer>,
    cancel: CancelToken,
}

impl Default for Run<'_> {
    fn default() -> Self {
        Self {
            seeds: Seeds::One(0),
            steps: None,
            guidance_scale: None,
            size: None,
            eta: None,
            latents: None,
            decode: true,
            sampler: None,
            stages: Vec::new(),
            controls: None,
            batch: usize::MAX,
            observer: None,
            cancel: CancelToken::new(),
        }
    }
}

impl<'a> Run<'a> {
    /// A run as the pipeline has it by default, of seed 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Image k draws its noise from stream k of this seed.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.seeds(Seeds::One(seed))
    }

    /// Where the noise comes from: a seed an image, or PyTorch's generator.
    #[must_use]
    pub fn seeds(self, seeds: Seeds) -> Self {
        Self { seeds, ..self }
    }

    /// How many steps the sampler takes: diffusers' `num_inference_steps`.
    #[must_use]
    pub fn steps(self, steps: usize) -> Self {
        Self { steps: Some(steps), ..self }
    }

    /// s of classifier-free guidance; 1 is none. diffusers has none below 1 either: here it is what the formula says.
    #[must_use]
    pub fn guidance_scale(self, scale: f64) -> Self {
        Self { guidance_scale: Some(scale), ..self }
    }

    /// Height and width, in pixels.
    #[must_use]
    pub fn size(self, height: i64, width: i64) -> Self {
        Self { size: Some([height, width]), ..self }
    }

    /// η of DDIM, 0 ..= 1; other schedulers refuse it.
    #[must_use]
    pub fn eta(self, eta: f64) -> Self {
        Self { eta: Some(eta), ..self }
    }

    /// Another sampler than the scheduler's, along the scheduler's steps.
    #[must_use]
    pub fn sampler(self, sampler: impl Sampler + 'static) -> Self {
        Self { sampler: Some(Box::new(sampler)), ..self }
    }

    /// Adds a stage of guidance, which acts after classifier-free guidance and the stages already there. Its branches
    /// are 0, the negative prompt, and 1, the prompt.
    #[must_use]
    pub fn with(mut self, stage: impl Guidance + 'static) -> Self {
        self.stages.push(Box::new(stage));
        self
    }

    /// Runs the denoiser under controls bound to its sites: adapters, attention edits.
    #[must_use]
    pub fn controls(self, controls: &'a Controls) -> Self {
        Self { controls: Some(controls), ..self }
    }

    /// The noise that the run begins with, instead of noise that is drawn: `[N, C, H, W]`, of deviation 1.
    #[must_use]
    pub fn latents(self, latents: Tensor) -> Self {
        Self { latents: Some(latents), ..self }
    }

    /// Leaves latents as they are: there are no pixels in the result of an autoencoder's pipeline.
    #[must_use]
    pub fn without_decoding(self) -> Self {
        Self { decode: false, ..self }
    }

    /// At most so many images at once; all unless said. What an image is does not depend on it, but for
    /// [`Seeds::Torch`], which refuses it.
    #[must_use]
    pub fn batch(self, images: usize) -> Self {
        Self { batch: images, ..self }
    }

    /// Tells someone of each step of each batch; it may stop the run.
    #[must_use]
    pub fn observer(self, observer: &'a mut dyn Observer) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// Stops, with the estimate that there is, once the token is cancelled.
    #[must_use]
    pub fn cancel(self, cancel: &CancelToken) -> Self {
        Self { cancel: cancel.clone(), ..self }
    }

    /// The scheduler's steps, and its sampler or the run's own.
    pub(super) fn way(&self, scheduler: &Scheduler, default: usize) -> Result<(Box<dyn Sampler>, Vec<Step>)> {
        let steps = scheduler.steps(self.steps.unwrap_or(default))?;
        if let Some(sampler) = &self.sampler {
            if self.eta.is_some() {
                return Err(Error::unsupported("eta beside a sampler", "a sampler that was made with it"));
            }
            return Ok(((**sampler).handle(), steps));
        }
        let sampler = match self.eta {
            Some(eta) => scheduler.handle().with_eta(eta)?.sampler(),
            None => scheduler.sampler(),
        };
        Ok((sampler, steps))
    }

    /// How a denoiser is run along a way: with the run's guidance and controls.
    pub(super) fn denoise<'d>(
        &'d self,
        denoiser: &'d dyn Denoiser,
        (sampler, steps): (Box<dyn Sampler>, Vec<Step>),
        scale: f64,
    ) -> Denoise<'d> {
        let stages = self.stages.iter().map(|stage| (**stage).handle()).collect();
        Denoise { denoiser, sampler, steps, scale, stages, controls: self.controls }
    }

    /// What an image is made with, as far as all pipelines say it.
    pub(super) fn parameters(
        &self,
        image: usize,
        way: &Denoise<'_>,
        scheduler: &Scheduler,
        model: Option<&str>,
    ) -> Parameters {
        Parameters {
            steps: u64::try_from(way.steps.len()).ok(),
            seed: self.seeds.of(image),
            sampler: Some(scheduler.class().to_owned()),
            model: model.map(str::to_owned),
            ..Parameters::default()
        }
    }

    /// Takes out who watches the run.
    pub(super) fn watch(&mut self) -> Watch<'a> {
        Watch { observer: self.observer.take(), cancel: self.cancel.clone() }
    }
}

/// Who watches a run, and may stop it.
pub(super) struct Watch<'a> {
    observer: Option<&'a mut dyn Observer>,
    cancel: CancelToken,
}

impl Watch<'_> {
    /// Makes images batch by batch, `steps` steps each; ends with the batch in which it was stopped.
    pub(super) fn batches<T>(
        self,
        run: &Run<'_>,
        images: usize,
        steps: usize,
        mut make: impl FnMut(&mut Batch<'_, '_>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let _no_gradients = tch::no_grad_guard();
        let size = run.batch.min(images);
        if size == 0 || images > MOST {
            let expected = format!("both >= 1, and at most {MOST} images");
            let found = format!("{images} images, {size} at once");
            return Err(Error::value("images, and images at once", expected, found));
        }
        let source = |first: usize| {
            let rows = first..(first + size).min(images);
            Ok((rows.clone(), run.seeds.source(images, rows)?))
        };
        let sources = (0..images).step_by(size).map(source).collect::<Result<Vec<_>>>()?;
        let total = u64::try_from(sources.len().saturating_mul(steps)).ok();
        let mut nobody = ();
        let observer = self.observer.unwrap_or(&mut nobody);
        let mut ticker = Ticker::new("steps", total, observer, &self.cancel);
        let mut made = Vec::with_capacity(sources.len());
        for (rows, source) in sources {
            let mut batch = Batch::new(rows, source, &mut ticker);
            made.push(make(&mut batch)?);
            if batch.flow() == Flow::Stop {
                break;
            }
        }
        Ok(made)
    }
}
