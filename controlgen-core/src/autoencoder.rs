//! Autoencoders: images to latents and back.

use tch::{Kind, Tensor};

use crate::{Error, Placement, Result};

/// What is known of an autoencoder without running it.
#[derive(Clone, Debug)]
pub struct AutoencoderSpec {
    /// The architecture, as `_class_name` in diffusers' config.json names it.
    pub architecture: String,
    /// C: channels of an image.
    pub channels: i64,
    /// L: channels of a latent.
    pub latent_channels: i64,
    /// How many pixels a latent stands for, along each side.
    pub downscale: i64,
    /// s in z = s (e − m): the denoiser's latents z of the encoder's e.
    pub scaling_factor: f64,
    /// m in z = s (e − m).
    pub shift_factor: f64,
    /// Where the model runs.
    pub placement: Placement,
}

/// N(mean, exp(log_variance)) over latents.
#[derive(Debug)]
pub struct Latents {
    /// `[B, L, H, W]`.
    pub mean: Tensor,
    /// `[B, L, H, W]`; `None` for an encoder that is certain.
    pub log_variance: Option<Tensor>,
}

impl Latents {
    /// mean + exp(log_variance / 2) · noise, for noise ~ N(0, 1) of the mean's shape: the caller's, so that every
    /// sample owns its stream.
    ///
    /// # Errors
    /// [`Error::Shape`] for noise of another shape.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        if noise.size() != self.mean.size() {
            return Err(Error::shape("noise", format!("{:?}", self.mean.size()), &noise.size()));
        }
        match &self.log_variance {
            None => Ok(self.mean.shallow_clone()),
            Some(log_variance) => {
                let deviation = log_variance.f_mul_scalar(0.5)?.f_exp()?;
                Ok(self.mean.f_add(&deviation.f_mul(noise)?)?)
            }
        }
    }

    /// KL(N(mean, variance) ‖ N(0, 1)), summed over a row: `[B]` (Kingma & Welling 2014, appendix B).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an encoder that is certain.
    pub fn kl(&self) -> Result<Tensor> {
        let Some(log_variance) = &self.log_variance else {
            return Err(Error::unsupported(
                "the divergence of latents without a variance",
                "a variational encoder",
            ));
        };
        let each =
            self.mean.f_square()?.f_add(&log_variance.f_exp()?)?.f_sub(log_variance)?.f_add_scalar(-1.0)?;
        Ok(each.f_flatten(1, -1)?.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?.f_mul_scalar(0.5)?)
    }
}

/// An autoencoder of images, such as the VAE of latent diffusion (Rombach et al. 2022). Differentiable.
///
/// Latents here are the denoiser's, scaled and shifted: [`Autoencoder::encode`] and [`Autoencoder::decode`] undo each
/// other as nearly as the model can.
pub trait Autoencoder: Send {
    /// Another handle over the same weights.
    fn handle(&self) -> Box<dyn Autoencoder>;

    /// What is known of it.
    fn spec(&self) -> &AutoencoderSpec;

    /// Images `[B, C, H, W]`, pixels in −1 ..= 1, H and W multiples of `downscale`, to latents
    /// `[B, L, H / downscale, W / downscale]`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    fn encode(&self, images: &Tensor) -> Result<Latents>;

    /// Latents `[B, L, h, w]` to images `[B, C, h · downscale, w · downscale]`, pixels in −1 ..= 1 or slightly
    /// beyond: not clamped, which would cut gradients.
    ///
    /// # Errors
    /// [`Error::Shape`].
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::DOUBLE_CPU;

    fn latents(log_variance: f64) -> Latents {
        let mean = Tensor::arange(8, DOUBLE_CPU).view([2, 1, 2, 2]) * 0.5;
        let log_variance = Some(mean.full_like(log_variance));
        Latents { mean, log_variance }
    }

    #[test]
    fn latents_are_sampled_from_the_callers_noise() {
        let latents = latents(2.0 * 3f64.ln());
        let noise = Tensor::ones([2, 1, 2, 2], DOUBLE_CPU) * -2.0;
        let sample = latents.sample(&noise).unwrap();
        assert!(sample.allclose(&(&latents.mean - 6.0), 1e-12, 1e-12, false));
        assert!(matches!(latents.sample(&noise.get(0)), Err(Error::Shape { .. })));
        let certain = Latents { log_variance: None, ..latents };
        assert!(certain.sample(&noise).unwrap().equal(&certain.mean));
        assert!(matches!(certain.kl(), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn the_divergence_is_that_of_gaussians() {
        // KL(N(m, s²) ‖ N(0, 1)) = (m² + s² − ln s² − 1) / 2 for each of the numbers.
        let expected = |row: f64| -> f64 {
            (0..4).map(|i| ((row * 4.0 + f64::from(i)) * 0.5).powi(2) + 9.0 - 9f64.ln() - 1.0).sum::<f64>()
                / 2.0
        };
        let kl: Vec<f64> = latents(9f64.ln()).kl().unwrap().try_into().unwrap();
        assert!((kl[0] - expected(0.0)).abs() < 1e-12 && (kl[1] - expected(1.0)).abs() < 1e-12, "{kl:?}");
        let standard = Latents {
            mean: Tensor::zeros([1, 2], DOUBLE_CPU),
            log_variance: Some(Tensor::zeros([1, 2], DOUBLE_CPU)),
        };
        assert_eq!(standard.kl().unwrap().double_value(&[0]), 0.0);
    }
}
