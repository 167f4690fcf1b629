//! Inpainting.

use controlgen_core::guidance::{Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{Error, Guidance, Result, SharedTensor};
use tch::{Kind, Tensor};

use super::images::{Images, Made};
use super::prompts::Prompts;
use super::run::Run;
use super::text_to_image::TextToImage;
use crate::from_strength;

/// An image, and what of it is to be painted anew.
pub struct Inpainting {
    /// `[1, C, H, W]` for all images, or one an image, pixels in −1 ..= 1: H and W are those of the result.
    pub image: Tensor,
    /// `[1, 1, H, W]`, or one an image: at least ½ where it is painted, else below.
    pub mask: Tensor,
    /// Which part of the steps is taken, above 0 and at most 1; at 1 nothing of the image is left under the mask.
    pub strength: f64,
}

impl TextToImage {
    /// Paints the part of an image that is under a mask. Two ways, as the denoiser has it:
    ///
    /// * one of inpainting (Rombach et al. 2022, section 4.5), which takes the mask and what is not under it as channels
    ///   beside the sample's, the condition `concat`;
    /// * an ordinary one: before each step but the first, what is not under the mask is the image at the step's level
    ///   of noise, and after the last one the image. Lugmayr et al., "RePaint" (2022), eq. 8, without resampling; the
    ///   noise is the same in all steps, as in diffusers.
    ///
    /// # Errors
    /// [`Error::Value`] for a strength that leaves no step; [`Error::Shape`], [`Error::Kind`], [`Error::NotFinite`]
    /// for what is no image or mask; [`Error::Unsupported`] for a denoiser of other channels; else as [`Self::run`].
    pub fn inpaint(
        &self,
        prompts: impl Into<Prompts>,
        from: &Inpainting,
        mut run: Run<'_>,
    ) -> Result<Images> {
        let watch = run.watch();
        let run = run.sized_as(&from.image)?;
        let mut job = self.job(&prompts.into(), &run)?;
        let [channels, height, width] = job.shape;
        if ![0, channels + 1].contains(&self.beside) {
            let what = format!("inpainting with {} channels beside {channels}", self.beside);
            return Err(Error::unsupported(what, format!("0 or {}", channels + 1)));
        }
        self.check_images("image", &from.image, &job)?;
        super::check_rows("mask", &from.mask, job.images, [1, job.size[0], job.size[1]])?;
        let deviation = self.scheduler.initial_deviation(&job.way.steps);
        job.way.steps = from_strength(&job.way.steps, from.strength)?.to_vec();
        let first = job.way.steps[0];
        let device = self.denoiser.spec().placement.device;
        let whole = from.mask.f_to_device(from.image.device())?.f_ge(0.5)?.f_to_kind(Kind::Float)?;
        let masked = from.image.f_mul(&whole.f_neg()?.f_add_scalar(1.0)?)?;
        // Of the numbers that a latent stands for, the one at the top left.
        let small = whole.f_upsample_nearest2d([height, width], None, None)?.f_to_device(device)?;
        let made = watch.batches(&run, job.images, job.way.steps.len(), |batch| {
            let blends = self.beside == 0;
            // Noise is drawn in the order of diffusers.
            let image =
                if blends || from.strength < 1.0 { Some(self.encode(&from.image, batch)?) } else { None };
            let noise = job.noise(batch, &run)?;
            let outside = self.encode(&masked, batch)?;
            let x = match &image {
                Some(z) if from.strength < 1.0 => {
                    z.f_mul_scalar(first.level.alpha())?.f_add(&noise.f_mul_scalar(first.level.sigma())?)?
                }
                _ => noise.f_mul_scalar(deviation)?,
            };
            let mask = super::rows_of(&small, batch)?.f_expand([batch.len(), 1, height, width], false)?;
            let conditions = job.conditions.rows(&batch.rows())?;
            let x = match image.filter(|_| blends) {
                None => {
                    let beside = Tensor::f_cat(&[&mask, &outside], 1)?;
                    batch.denoise(&job.way, &conditions.with("concat", &beside)?, x)?
                }
                Some(image) => {
                    let keep = KeepOutside {
                        mask: mask.f_gt(0.0)?.into(),
                        image: image.into(),
                        noise: noise.into(),
                        first: first.index,
                    };
                    let mut way = job.way.share();
                    way.stages.push(Box::new(keep.clone()));
                    let x = batch.denoise(&way, &conditions, x)?;
                    keep.put(&x, &keep.image)?
                }
            };
            Made::new(batch, x, self.autoencoder.as_deref(), run.decode)
        })?;
        job.done(&made)
    }
}

/// x ← m x + (1 − m) (α z + σ ε), before each step but the first.
#[derive(Clone)]
struct KeepOutside {
    /// `[B, 1, h, w]`, true where it is painted.
    mask: SharedTensor,
    image: SharedTensor,
    noise: SharedTensor,
    first: usize,
}

impl KeepOutside {
    /// `x` under the mask, `outside` where it is not.
    fn put(&self, x: &Tensor, outside: &Tensor) -> Result<Tensor> {
        Ok(x.f_where_self(&self.mask, outside)?)
    }
}

impl Guidance for KeepOutside {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }

    fn name(&self) -> &'static str {
        "inpainting"
    }

    fn needs(&self, _step: &Step) -> Needs {
        Needs::default()
    }

    fn before(&self, step: &Step, x: Tensor) -> Result<Tensor> {
        if step.index == self.first {
            return Ok(x);
        }
        let (alpha, sigma) = (step.level.alpha(), step.level.sigma());
        let noised = self.image.f_mul_scalar(alpha)?.f_add(&self.noise.f_mul_scalar(sigma)?)?;
        self.put(&x, &noised)
    }

    fn guide(&self, _: &Step, _: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        Ok(so_far)
    }
}
