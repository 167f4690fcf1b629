//! Images of classes.

use std::path::Path;

use controlgen_core::{Autoencoder, Condition, Denoiser, Error, Placement, Result};
use serde_json::Value;

use super::batch::Conditions;
use super::directory::Directory;
use super::images::{Images, Made};
use super::run::Run;
use crate::Scheduler;
use crate::image::Parameters;

/// Images of classes, by a model of latents or of pixels, led by classifier-free guidance away from the model without a
/// class. Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT, 2023); Ho & Salimans 2022. Of a model that
/// predicts its variance, guidance acts on the prediction alone, and the variance is that under the class.
pub struct ClassConditional {
    denoiser: Box<dyn Denoiser>,
    scheduler: Scheduler,
    autoencoder: Option<Box<dyn Autoencoder>>,
    labels: Vec<(String, i64)>,
    name: Option<String>,
}

impl ClassConditional {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 1] = ["DiTPipeline"];

    /// Opens a directory of diffusers.
    ///
    /// # Errors
    /// As [`TextToImage::open`](super::TextToImage::open).
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = Directory::open(path.as_ref(), &Self::CLASSES)?;
        directory.require(&["transformer", "scheduler", "vae"])?;
        let scheduler = directory.scheduler()?;
        let denoiser = directory.denoiser("transformer", &scheduler, placement)?;
        let mut pipeline = Self::new(denoiser, scheduler, Some(directory.autoencoder(placement)?))?;
        pipeline.name = Some(directory.name());
        // Several names of one class stand in one string, with commas between them.
        for (id, names) in directory.index().get("id2label").and_then(Value::as_object).into_iter().flatten()
        {
            let (Ok(id), Some(names)) = (id.parse(), names.as_str()) else {
                let expected = "class numbers and their names";
                return Err(directory.index().error("id2label", expected, format!("{id}: {names}")));
            };
            pipeline.labels.extend(names.split(',').map(|name| (name.trim().to_owned(), id)));
        }
        Ok(pipeline)
    }

    /// Puts components together. Without an autoencoder the denoiser's samples are pixels.
    ///
    /// # Errors
    /// [`Error::Value`] where the autoencoder's latents have other channels than the denoiser's samples.
    pub fn new(
        denoiser: Box<dyn Denoiser>,
        scheduler: Scheduler,
        autoencoder: Option<Box<dyn Autoencoder>>,
    ) -> Result<Self> {
        super::default_size(&*denoiser, autoencoder.as_deref())?;
        Ok(Self { denoiser, scheduler, autoencoder, labels: Vec::new(), name: None })
    }

    /// With another scheduler. What the denoiser predicts is what it was opened with, whatever the scheduler says.
    #[must_use]
    pub fn with_scheduler(self, scheduler: Scheduler) -> Self {
        Self { scheduler, ..self }
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            denoiser: (*self.denoiser).handle(),
            scheduler: self.scheduler.handle(),
            autoencoder: self.autoencoder.as_deref().map(Autoencoder::handle),
            labels: self.labels.clone(),
            name: self.name.clone(),
        }
    }

    /// The denoiser, to whose sites controls are bound.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// The class of a name, as model_index.json has it.
    ///
    /// # Errors
    /// [`Error::Value`] for a name that is not there.
    pub fn class(&self, name: &str) -> Result<i64> {
        let found = self.labels.iter().find(|(known, _)| known == name);
        let names = self.labels.len();
        found.map(|found| found.1).ok_or_else(|| {
            Error::value("class", format!("one of the {names} names in model_index.json"), name)
        })
    }

    /// An image a class; in 50 steps, with s = 4, of the size that the model was made for, unless the run says
    /// otherwise.
    ///
    /// # Errors
    /// [`Error::Value`] for a class that the model does not have; else as
    /// [`TextToImage::run`](super::TextToImage::run).
    pub fn run(&self, classes: &[i64], mut run: Run<'_>) -> Result<Images> {
        let watch = run.watch();
        let (spec, images) = (self.denoiser.spec(), classes.len());
        let autoencoder = self.autoencoder.as_deref();
        let size = match run.size {
            Some(size) => size,
            None => super::default_size(&*self.denoiser, autoencoder)?,
        };
        let shape = super::sample_shape(&*self.denoiser, autoencoder, size)?;
        let scale = run.guidance_scale.unwrap_or(4.0);
        let way = run.way(&self.scheduler, 50)?;
        let way = run.denoise(&*self.denoiser, way, scale);
        let conditions = Conditions {
            negative: way.needs_negative().then(|| vec![Condition::Null]),
            prompt: classes.iter().map(|&class| Condition::Class(class)).collect(),
        };
        let deviation = self.scheduler.initial_deviation(&way.steps);
        let made = watch.batches(&run, images, way.steps.len(), |batch| {
            let x = batch.noise(images, shape, &run, spec.placement)?.f_mul_scalar(deviation)?;
            let x = batch.denoise(&way, &conditions.rows(&batch.rows())?, x)?;
            Made::new(batch, x, autoencoder, run.decode)
        })?;
        let parameters = |image: usize| Parameters {
            guidance_scale: Some(scale),
            more: [("class".to_owned(), Value::from(classes[image]))].into_iter().collect(),
            ..run.parameters(image, &way, &self.scheduler, self.name.as_deref())
        };
        Images::gather(&made, (0..images).map(parameters).collect(), vec![None; images])
    }
}
