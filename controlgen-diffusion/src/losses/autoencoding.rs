//! The loss of variational autoencoders.

use controlgen_core::noise::Stream;
use controlgen_core::{Autoencoder, Error, Result};
use tch::{Kind, Tensor};

/// How reconstructions are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconstruction {
    /// |x − x̂|, as latent diffusion's.
    Absolute,
    /// (x − x̂)².
    Squared,
}

/// The training of an autoencoder: reconstruction + β KL(q(z|x) ‖ N(0, 1)), both means over the numbers of an image and of
/// its latents (Kingma & Welling 2014, eq. 10; β as Higgins et al. 2017, small as in Rombach et al. 2022, appendix G).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Autoencoding {
    reconstruction: Reconstruction,
    beta: f64,
}

/// The parts of a loss, each a mean over the batch, in the graph.
pub struct AutoencodingLoss {
    /// What is to be lowered.
    pub value: Tensor,
    /// How far reconstructions are off.
    pub reconstruction: Tensor,
    /// The divergence, a mean over the numbers of a latent.
    pub kl: Tensor,
}

impl Autoencoding {
    /// With this β ≥ 0.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn new(reconstruction: Reconstruction, beta: f64) -> Result<Self> {
        if !(beta.is_finite() && beta >= 0.0) {
            return Err(Error::value("beta, the weight of the divergence", "a number >= 0", beta));
        }
        Ok(Self { reconstruction, beta })
    }

    /// The loss of images `[B, C, H, W]`. The noise of the latents comes from `stream`. The model's scaling factor is to be
    /// 1 and its shift 0: what they should be is known when it is trained.
    ///
    /// # Errors
    /// The autoencoder's; [`Error::Unsupported`] for one that is certain of its latents.
    pub fn loss(
        &self,
        autoencoder: &dyn Autoencoder,
        images: &Tensor,
        stream: &mut Stream,
    ) -> Result<AutoencodingLoss> {
        let latents = autoencoder.encode(images)?;
        let size = latents.mean.size();
        let noise = stream.normal(&size, latents.mean.f_kind()?, latents.mean.device())?;
        let decoded = autoencoder.decode(&latents.sample(&noise)?)?;
        if decoded.size() != images.size() {
            return Err(Error::shape("decoded images", format!("{:?}", images.size()), &decoded.size()));
        }
        let error = decoded.f_to_kind(Kind::Float)?.f_sub(images)?;
        let error = match self.reconstruction {
            Reconstruction::Absolute => error.f_abs()?,
            Reconstruction::Squared => error.f_square()?,
        };
        let reconstruction = error.f_mean(None::<Kind>)?;
        let each: i64 = size.iter().skip(1).product();
        let kl = latents.kl()?.f_mean(Kind::Float)?.f_div_scalar(each as f64)?;
        let value = reconstruction.f_add(&kl.f_mul_scalar(self.beta)?)?;
        Ok(AutoencodingLoss { value, reconstruction, kl })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use controlgen_core::noise::Noise;
    use controlgen_core::{AutoencoderSpec, Latents, Placement};
    use tch::kind::FLOAT_CPU;

    /// Latents 2 x of deviation 0.5, decoded to z / 2 + 0.25.
    struct Toy(AutoencoderSpec);

    impl Autoencoder for Toy {
        fn handle(&self) -> Box<dyn Autoencoder> {
            Box::new(Self(self.0.clone()))
        }
        fn spec(&self) -> &AutoencoderSpec {
            &self.0
        }
        fn encode(&self, images: &Tensor) -> Result<Latents> {
            let mean = images * 2.0;
            let log_variance = Some(mean.full_like(2.0 * 0.5f64.ln()));
            Ok(Latents { mean, log_variance })
        }
        fn decode(&self, latents: &Tensor) -> Result<Tensor> {
            Ok(latents * 0.5 + 0.25)
        }
    }

    #[test]
    fn its_parts_are_those_of_gaussians() {
        let toy = Toy(AutoencoderSpec {
            architecture: "toy".into(),
            channels: 1,
            latent_channels: 1,
            downscale: 1,
            scaling_factor: 1.0,
            shift_factor: 0.0,
            placement: Placement::CPU,
        });
        let images = Tensor::full([64, 1, 16, 16], 0.5, FLOAT_CPU);
        let loss = |reconstruction| {
            let mut stream = Noise::seeded(0).stream(0);
            Autoencoding::new(reconstruction, 0.1).unwrap().loss(&toy, &images, &mut stream).unwrap()
        };
        let found = loss(Reconstruction::Squared);
        // z / 2 + 0.25 − x = 0.25 + 0.25 ε: a mean square of 0.125. KL = (1 + 0.25 − ln 0.25 − 1) / 2.
        let kl = (0.25 - 0.25f64.ln()) / 2.0;
        assert!((found.reconstruction.double_value(&[]) - 0.125).abs() < 4e-3);
        assert!((found.kl.double_value(&[]) - kl).abs() < 1e-5);
        let sum = found.reconstruction.double_value(&[]) + 0.1 * kl;
        assert!((found.value.double_value(&[]) - sum).abs() < 1e-5);
        // E |0.25 + 0.25 ε| = 0.25 · (√(2/π) e^−½ + erf(√½))
        let mean = 0.25 * ((2.0 / std::f64::consts::PI).sqrt() * (-0.5f64).exp() + 0.682_689_492);
        let found = loss(Reconstruction::Absolute).reconstruction.double_value(&[]);
        assert!((found - mean).abs() < 4e-3, "{found} {mean}");
        assert!(Autoencoding::new(Reconstruction::Squared, -1.0).is_err());
    }
}
