//! The images that are made at once.

use std::ops::Range;

use controlgen_core::energy::checks;
use controlgen_core::guidance::{ClassifierFreeGuidance, Guider, Step};
use controlgen_core::noise::{NoiseSource, Stream, TorchGenerator};
use controlgen_core::progress::{Flow, Ticker};
use controlgen_core::{Condition, Controls, Denoiser, Error, Guidance, Latents, Placement, Result};
use tch::{Device, Kind, Tensor};

use super::run::Run;
use crate::{Sampler, sample_watched};

/// The noise of a batch.
pub(super) enum Source {
    Streams(Vec<Stream>),
    Torch(Box<TorchGenerator>),
    TorchEach(Vec<TorchGenerator>),
}

impl Source {
    pub(super) fn streams(of: impl Iterator<Item = (u64, u64)>) -> Self {
        Self::Streams(of.map(|(seed, sample)| Stream::new(seed, sample)).collect())
    }

    pub(super) fn torch(seed: u64) -> Self {
        Self::Torch(Box::new(TorchGenerator::new(seed)))
    }

    pub(super) fn torch_each(seeds: &[u64]) -> Self {
        Self::TorchEach(seeds.iter().map(|&seed| TorchGenerator::new(seed)).collect())
    }
}

impl NoiseSource for Source {
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        match self {
            Self::Streams(streams) => streams.normal(shape, kind, device),
            Self::Torch(generator) => generator.normal(shape, kind, device),
            Self::TorchEach(generators) => generators.normal(shape, kind, device),
        }
    }
}

/// What images are to be of: one condition for all, or one an image.
pub(super) struct Conditions {
    /// What guidance leads away from; none where nothing asks for it.
    pub(super) negative: Option<Vec<Condition>>,
    pub(super) prompt: Vec<Condition>,
}

impl Conditions {
    /// Those of these images.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        self.map(|conditions| {
            let one = conditions.len() == 1;
            let found = if one { Some(conditions) } else { conditions.get(rows.clone()) };
            let found = found.map(|found| found.iter().map(Condition::handle).collect());
            found.ok_or_else(|| Error::value("conditions", "one, or one an image", conditions.len()))
        })
    }

    /// One an image, with a feature of its own besides: `values` `[B, ..]`.
    pub(super) fn with(&self, name: &str, values: &Tensor) -> Result<Self> {
        self.map(|conditions| {
            let row = |row: i64| {
                let of = usize::try_from(row).ok().filter(|_| conditions.len() > 1).unwrap_or(0);
                let Some(Condition::Features(features)) = conditions.get(of).map(Condition::handle) else {
                    return Err(Error::unsupported(format!("`{name}` beside a class"), "beside features"));
                };
                let value = (name.to_owned(), values.f_get(row)?);
                Ok(Condition::Features(features.into_iter().chain([value]).collect()))
            };
            (0..values.size().first().copied().unwrap_or(0)).map(row).collect()
        })
    }

    fn map(&self, f: impl Fn(&[Condition]) -> Result<Vec<Condition>>) -> Result<Self> {
        let negative = self.negative.as_deref().map(&f).transpose()?;
        Ok(Self { negative, prompt: f(&self.prompt)? })
    }
}

/// How a denoiser is run: its sampler and steps, its guidance, its controls.
pub(super) struct Denoise<'d> {
    pub(super) denoiser: &'d dyn Denoiser,
    pub(super) sampler: Box<dyn Sampler>,
    pub(super) steps: Vec<Step>,
    /// s of classifier-free guidance; 1 is none.
    pub(super) scale: f64,
    pub(super) stages: Vec<Box<dyn Guidance>>,
    pub(super) controls: Option<&'d Controls>,
}

impl Denoise<'_> {
    /// Whether guidance asks for what it leads away from.
    pub(super) fn needs_negative(&self) -> bool {
        self.scale != 1.0 || !self.stages.is_empty()
    }

    /// The same, to be changed for one batch.
    pub(super) fn share(&self) -> Self {
        let stages = self.stages.iter().map(|stage| (**stage).handle()).collect();
        let (sampler, steps) = ((*self.sampler).handle(), self.steps.clone());
        Self { sampler, steps, stages, ..*self }
    }

    /// The denoiser under these conditions, with text keys and values computed.
    fn guider(&self, conditions: &Conditions) -> Result<Guider> {
        let base = u32::from(conditions.negative.is_some());
        let controls = self.controls.map(Controls::handle);
        let handles = |conditions: &Vec<Condition>| conditions.iter().map(Condition::handle).collect();
        let conditions = conditions.negative.iter().chain([&conditions.prompt]).map(handles).collect();
        let mut guider = Guider::new(self.denoiser.handle(), conditions, controls, base)?;
        if self.scale != 1.0 {
            guider = guider.with(ClassifierFreeGuidance::new(self.scale)?);
        }
        for stage in &self.stages {
            guider = guider.with((**stage).handle());
        }
        Ok(guider)
    }
}

/// Some images of a run, made at once, and their noise.
pub(super) struct Batch<'r, 't> {
    rows: Range<usize>,
    noise: Source,
    ticker: &'r mut Ticker<'t>,
    flow: Flow,
    finished: bool,
}

impl<'r, 't> Batch<'r, 't> {
    pub(super) fn new(rows: Range<usize>, noise: Source, ticker: &'r mut Ticker<'t>) -> Self {
        Self { rows, noise, ticker, flow: Flow::Continue, finished: true }
    }

    /// Which images of the run they are.
    pub(super) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// How many images there are.
    pub(super) fn len(&self) -> i64 {
        i64::try_from(self.rows.len()).unwrap_or(i64::MAX)
    }

    /// Whether the run is to go on.
    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    /// Whether every step that was begun was taken to its end.
    pub(super) fn finished(&self) -> bool {
        self.finished
    }

    /// Standard normals `[B, ..]`, f32, for samples of this shape.
    pub(super) fn normal(&mut self, sample: &[i64], placement: Placement) -> Result<Tensor> {
        let shape = [&[self.len()], sample].concat();
        self.noise.normal(&shape, Kind::Float, placement.device)
    }

    /// The noise `[B, C, h, w]` that a run of so many images begins with: drawn, or as it was given to the run.
    pub(super) fn noise(
        &mut self,
        images: usize,
        sample: [i64; 3],
        run: &Run<'_>,
        placement: Placement,
    ) -> Result<Tensor> {
        let Some(given) = &run.latents else { return self.normal(&sample, placement) };
        let all = i64::try_from(images).unwrap_or(i64::MAX);
        let shape = [&[all], &sample[..]].concat();
        if given.size() != shape {
            return Err(Error::shape("latents", format!("{shape:?}"), &given.size()));
        }
        checks::floating("latents", given)?;
        let rows = super::rows_of(given, self)?;
        Ok(rows.f_to_device(placement.device)?.f_to_kind(Kind::Float)?)
    }

    /// Latents `[B, ..]` of one image, or of one a row, drawn from what an encoder says of them. PyTorch's one generator
    /// draws them as diffusers does: one image's once.
    pub(super) fn sample(&mut self, latents: &Latents) -> Result<Tensor> {
        let mean = &latents.mean;
        let given = mean.size();
        let rows = [&[self.len()], &given[1..]].concat();
        let once = matches!(self.noise, Source::Torch(_));
        let shape = if once { &given } else { &rows };
        let noise = self.noise.normal(shape, Kind::Float, mean.device())?;
        let wide = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_kind(Kind::Float)?.f_expand(shape, false)?) };
        let log_variance = latents.log_variance.as_ref().map(wide).transpose()?;
        let drawn = Latents { mean: wide(mean)?, log_variance }.sample(&noise)?;
        Ok(drawn.f_expand(&rows, false)?)
    }

    /// From x at the first step's level to a sample, under the conditions of this batch: text keys and values are
    /// computed once. Where the run is stopped on the way, the last estimate.
    pub(super) fn denoise(
        &mut self,
        way: &Denoise<'_>,
        conditions: &Conditions,
        x: Tensor,
    ) -> Result<Tensor> {
        let guider = way.guider(conditions)?;
        let sampled = sample_watched(&*way.sampler, &guider, x, &way.steps, &mut self.noise, self.ticker)?;
        self.flow = sampled.flow;
        self.finished &= sampled.finished;
        Ok(sampled.x)
    }
}
