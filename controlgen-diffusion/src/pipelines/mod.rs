//! Pipelines: prompts, classes or images in, images out. One paper a file.
//!
//! A pipeline owns its components, handles of models over shared weights, and any of them may be another's: they are
//! `dyn Denoiser`, `dyn Autoencoder`, `dyn PromptEncoder` and a [`Scheduler`](crate::Scheduler). A run is described by
//! [`Run`], which all pipelines take, and ends in [`Images`].
//!
//! ```no_run
//! use controlgen_core::Placement;
//! use controlgen_diffusion::pipelines::{Prompts, Run, TextToImage};
//!
//! # fn main() -> controlgen_core::Result<()> {
//! let pipeline = TextToImage::open("stable-diffusion-v1-5", Placement::CPU)?;
//! let prompts = Prompts::new(["a lighthouse at dawn", "a cat in a hat"]).negative("blurry");
//! let images = pipeline.run(prompts, Run::new().seed(42).steps(25))?;
//! images.save(&["lighthouse.png", "cat.png"])?;
//! # Ok(())
//! # }
//! ```
//!
//! With `Run::new().seeds(Seeds::Torch(42))` they are the images that diffusers makes with
//! `generator=torch.Generator().manual_seed(42)`.

mod batch;
mod cascade;
mod class_conditional;
mod ddpm;
mod directory;
mod images;
mod img2img;
mod inpainting;
mod prompts;
mod run;
mod stage;
mod text_to_image;
mod unclip;

pub use cascade::{Cascade, Upscaler};
pub use class_conditional::ClassConditional;
pub use ddpm::DdpmPipeline;
pub use images::Images;
pub use img2img::ImageToImage;
pub use inpainting::Inpainting;
pub use prompts::Prompts;
pub use run::{Run, Seeds};
pub use text_to_image::{Defaults, TextToImage};
pub use unclip::UnClip;

use controlgen_core::energy::checks;
use controlgen_core::{Autoencoder, Denoiser, Error, Result};
use tch::Tensor;

/// How many pixels along each side a number of a sample stands for.
fn downscale(autoencoder: Option<&dyn Autoencoder>) -> i64 {
    autoencoder.map_or(1, |autoencoder| autoencoder.spec().downscale)
}

/// The height and width in pixels that a denoiser was made for, once its samples are known to be the autoencoder's.
fn default_size(denoiser: &dyn Denoiser, autoencoder: Option<&dyn Autoencoder>) -> Result<[i64; 2]> {
    let spec = denoiser.spec();
    if let Some(autoencoder) = autoencoder.map(Autoencoder::spec)
        && autoencoder.latent_channels != spec.channels
    {
        let expected = format!("{}, as the denoiser's samples", spec.channels);
        return Err(Error::value(
            "latent channels of the autoencoder",
            expected,
            autoencoder.latent_channels,
        ));
    }
    Ok(spec.size.map(|side| side.saturating_mul(downscale(autoencoder))))
}

/// The shape `[C, h, w]` of a sample for an image of this size.
fn sample_shape(
    denoiser: &dyn Denoiser,
    autoencoder: Option<&dyn Autoencoder>,
    size: [i64; 2],
) -> Result<[i64; 3]> {
    let (spec, down) = (denoiser.spec(), downscale(autoencoder));
    let multiple = down.saturating_mul(spec.multiple).max(1);
    for (name, side) in ["height", "width"].into_iter().zip(size) {
        if side < 1 || side % multiple != 0 {
            return Err(Error::value(name, format!("a multiple of {multiple}, above 0"), side));
        }
    }
    Ok([spec.channels, size[0].div_euclid(down), size[1].div_euclid(down)])
}

/// The rows of a batch, of what is one for all or one an image.
fn rows_of(what: &Tensor, batch: &batch::Batch<'_, '_>) -> Result<Tensor> {
    if what.size().first() == Some(&1) {
        return Ok(what.shallow_clone());
    }
    let first = i64::try_from(batch.rows().start).unwrap_or(i64::MAX);
    Ok(what.f_narrow(0, first, batch.len())?)
}

/// Refuses what is not f32 or f64 `[N, C, H, W]` of numbers, for N = 1 or the images of a run.
fn check_rows(what: &str, tensor: &Tensor, images: usize, [c, h, w]: [i64; 3]) -> Result<()> {
    let n = i64::try_from(images).unwrap_or(i64::MAX);
    if ![[1, c, h, w], [n, c, h, w]].iter().any(|shape| *shape == tensor.size()[..]) {
        let of_images = if n == 1 { "1".to_owned() } else { format!("1 or {n}") };
        return Err(Error::shape(what, format!("[{of_images}, {c}, {h}, {w}]"), &tensor.size()));
    }
    checks::floating(what, tensor)?;
    checks::finite(what, tensor)
}
