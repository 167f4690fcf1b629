//! Image to image.

use controlgen_core::{Autoencoder, Error, Result};
use tch::{Kind, Tensor};

use super::batch::Batch;
use super::images::{Images, Made};
use super::prompts::Prompts;
use super::run::Run;
use super::text_to_image::{Job, TextToImage};
use crate::from_strength;

/// An image to start from, and how far to go from it.
pub struct ImageToImage {
    /// `[1, C, H, W]` for all images, or one an image, pixels in −1 ..= 1: H and W are those of the result.
    pub image: Tensor,
    /// Which part of the steps is taken, above 0 and at most 1. 0.8 is usual.
    pub strength: f64,
}

impl TextToImage {
    /// Images of prompts that start from an image instead of noise: it is noised to the level of a later step, and
    /// denoised from there. Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential
    /// Equations" (2022), algorithm 1. The steps that are taken are the last ⌊`strength` · n⌋ of n. With PNDM the images
    /// are not diffusers', which begins in a list where one timestep stands twice, and from then on takes the sample for
    /// one of less noise than it has.
    ///
    /// # Errors
    /// [`Error::Value`] for a strength that leaves no step; [`Error::Shape`], [`Error::Kind`], [`Error::NotFinite`]
    /// for what is no image; else as [`Self::run`].
    pub fn image_to_image(
        &self,
        prompts: impl Into<Prompts>,
        from: &ImageToImage,
        mut run: Run<'_>,
    ) -> Result<Images> {
        let watch = run.watch();
        let run = run.sized_as(&from.image)?;
        let mut job = self.job(&prompts.into(), &run)?;
        self.refuse_beside()?;
        self.check_images("image", &from.image, &job)?;
        job.way.steps = from_strength(&job.way.steps, from.strength)?.to_vec();
        let level = job.way.steps[0].level;
        let made = watch.batches(&run, job.images, job.way.steps.len(), |batch| {
            let z = self.encode(&from.image, batch)?;
            let noise = job.noise(batch, &run)?;
            let x = z.f_mul_scalar(level.alpha())?.f_add(&noise.f_mul_scalar(level.sigma())?)?;
            let x = batch.denoise(&job.way, &job.conditions.rows(&batch.rows())?, x)?;
            Made::new(batch, x, self.autoencoder.as_deref(), run.decode)
        })?;
        job.done(&made)
    }

    /// The samples `[B, C, h, w]` of images: latents drawn from what the encoder says of them, or the pixels.
    pub(super) fn encode(&self, images: &Tensor, batch: &mut Batch<'_, '_>) -> Result<Tensor> {
        let placement = self.denoiser.spec().placement;
        let images = super::rows_of(images, batch)?;
        match self.autoencoder.as_deref() {
            None => {
                let images = images.f_to_device(placement.device)?.f_to_kind(Kind::Float)?;
                let shape = [&[batch.len()], &images.size()[1..]].concat();
                Ok(images.f_expand(shape, false)?)
            }
            Some(autoencoder) => {
                let own = autoencoder.spec().placement;
                let images = images.f_to_device(own.device)?.f_to_kind(own.kind)?;
                Ok(batch.sample(&autoencoder.encode(&images)?)?.f_to_device(placement.device)?)
            }
        }
    }

    /// Refuses what are no images of the job's size, one or one a result.
    pub(super) fn check_images(&self, what: &str, images: &Tensor, job: &Job<'_>) -> Result<()> {
        let channels = self
            .autoencoder
            .as_deref()
            .map_or(self.denoiser.spec().channels, |a| Autoencoder::spec(a).channels);
        super::check_rows(what, images, job.images, [channels, job.size[0], job.size[1]])
    }
}

impl Run<'_> {
    /// With the size of an image, which the run may not contradict.
    pub(super) fn sized_as(self, image: &Tensor) -> Result<Self> {
        let &[_, _, height, width] = image.size().as_slice() else {
            return Err(Error::shape("image", "[1, C, H, W], or one an image", &image.size()));
        };
        if let Some(size) = self.size.filter(|size| *size != [height, width]) {
            let expected = format!("{height} by {width}, as the image");
            return Err(Error::value("size", expected, format!("{} by {}", size[0], size[1])));
        }
        Ok(self.size(height, width))
    }
}
