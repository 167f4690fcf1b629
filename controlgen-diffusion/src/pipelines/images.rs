//! What pipelines make.

use std::path::Path;

use controlgen_core::energy::checks;
use controlgen_core::{Autoencoder, Error, Result};
use tch::{Device, Kind, Tensor};

use super::batch::Batch;
use crate::image::{self, Parameters};

/// The images of a run.
#[derive(Debug)]
pub struct Images {
    /// `[N, C, H, W]`, pixels in −1 ..= 1, f32 on the CPU; `None` of a run without decoding.
    pub pixels: Option<Tensor>,
    /// What the sampler ended in, `[N, C, h, w]`: latents, or the pixels of a model of pixels, not clamped.
    pub latents: Tensor,
    /// How many images are finished, the first ones. A run that was stopped has the last estimates of the batch that it
    /// was at after them, and nothing of the images after those.
    pub finished: usize,
    /// One an image: the end of its prompt that was not read, where that is too long for the encoder.
    pub truncated: Vec<Option<String>>,
    /// One an image: what it was made with.
    pub parameters: Vec<Parameters>,
}

impl Images {
    /// Writes each image to a path, as the end of its name says PNG or JPEG; a PNG file holds the parameters.
    ///
    /// # Errors
    /// [`Error::Value`] without pixels, or for another number of paths; those of [`image::save_images`].
    pub fn save<P: AsRef<Path>>(&self, paths: &[P]) -> Result<()> {
        let Some(pixels) = &self.pixels else {
            return Err(Error::value("pixels", "those of a run with decoding", "none"));
        };
        let png = |path: &P| path.as_ref().extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
        if paths.iter().all(png) {
            return image::save_images(paths, pixels, &self.parameters);
        }
        image::save_images(paths, pixels, &[])
    }

    /// Puts batches together; `parameters` and `truncated` are those of all images that were asked for.
    pub(super) fn gather(
        made: &[Made],
        mut parameters: Vec<Parameters>,
        mut truncated: Vec<Option<String>>,
    ) -> Result<Self> {
        let latents: Vec<&Tensor> = made.iter().map(|made| &made.latents).collect();
        let pixels: Vec<&Tensor> = made.iter().filter_map(|made| made.pixels.as_ref()).collect();
        let latents = Tensor::f_cat(&latents, 0)?;
        let pixels = if pixels.is_empty() { None } else { Some(Tensor::f_cat(&pixels, 0)?) };
        let images = usize::try_from(latents.size()[0]).unwrap_or(0);
        parameters.truncate(images);
        truncated.truncate(images);
        if let Some(&[_, _, height, width]) = pixels.as_ref().map(Tensor::size).as_deref() {
            for parameters in &mut parameters {
                parameters.height = u64::try_from(height).ok();
                parameters.width = u64::try_from(width).ok();
            }
        }
        let finished = made.iter().filter(|made| made.finished).map(|made| made.images).sum();
        Ok(Self { pixels, latents, finished, truncated, parameters })
    }
}

/// The images of a batch.
pub(super) struct Made {
    latents: Tensor,
    pixels: Option<Tensor>,
    images: usize,
    finished: bool,
}

impl Made {
    /// What a batch's sampler ended in, decoded where that is asked for; without an autoencoder it is pixels.
    pub(super) fn new(
        batch: &Batch<'_, '_>,
        latents: Tensor,
        autoencoder: Option<&dyn Autoencoder>,
        decode: bool,
    ) -> Result<Self> {
        let pixels = match autoencoder {
            _ if !decode => None,
            None => Some(cut(&latents)?),
            Some(autoencoder) => {
                let kind = autoencoder.spec().placement.kind;
                Some(cut(&autoencoder.decode(&latents.f_to_kind(kind)?)?)?)
            }
        };
        Ok(Self { latents, pixels, images: batch.rows().len(), finished: batch.finished() })
    }
}

/// Pixels within −1 ..= 1, f32 on the CPU.
fn cut(pixels: &Tensor) -> Result<Tensor> {
    let pixels = pixels.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    checks::finite("the decoded images", &pixels)?;
    Ok(pixels.f_clamp(-1.0, 1.0)?)
}
