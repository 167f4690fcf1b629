//! The loss of CLIP.

use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

/// Pairs of embeddings as rows of length 1.
fn pairs(image: &Tensor, text: &Tensor) -> Result<(Tensor, Tensor)> {
    let (sizes, others) = (image.size(), text.size());
    if sizes.len() != 2 || sizes[0] < 1 {
        return Err(Error::shape("embeddings of images", "[B, D], B at least 1", &sizes));
    }
    if others != sizes {
        return Err(Error::shape("embeddings of texts", format!("{sizes:?}"), &others));
    }
    let unit = |x: &Tensor| -> Result<Tensor> {
        let norm = x.f_norm_scalaropt_dim(2.0, [1i64], true)?.f_clamp_min(1e-12)?;
        Ok(x.f_div(&norm)?)
    };
    Ok((unit(image)?, unit(text)?))
}

/// The symmetric contrastive loss of CLIP, of pairs image i, text i (Radford et al. 2021, figure 3): the mean of the cross
/// entropies of the rows and of the columns of s · ⟨image, text⟩, embeddings `[B, D]` of length 1. `logit_scale` is ln s, a
/// number in the graph where it is trained; s is at most 100, as there.
///
/// # Errors
/// [`Error::Shape`] where the embeddings are not as many of as many numbers.
pub fn contrastive_loss(image: &Tensor, text: &Tensor, logit_scale: &Tensor) -> Result<Tensor> {
    let (image, text) = pairs(image, text)?;
    let scale = logit_scale.f_exp()?.f_clamp_max(100.0)?;
    let logits = image.f_matmul(&text.f_transpose(0, 1)?)?.f_mul(&scale)?; // (B images, B texts)
    let own = Tensor::f_arange(image.size()[0], (Kind::Int64, image.device()))?;
    let entropy =
        |logits: &Tensor| logits.f_cross_entropy_loss(&own, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0);
    Ok(entropy(&logits)?.f_add(&entropy(&logits.f_transpose(0, 1)?)?)?.f_mul_scalar(0.5)?)
}

/// The share of images whose own text is the nearest of all B, in 0 ..= 1: embeddings `[B, D]`.
///
/// # Errors
/// As [`contrastive_loss`].
pub fn retrieval_accuracy(image: &Tensor, text: &Tensor) -> Result<f64> {
    let (image, text) = pairs(image, text)?;
    let nearest = image.f_matmul(&text.f_transpose(0, 1)?)?.f_argmax(1, false)?;
    let own = Tensor::f_arange(image.size()[0], (Kind::Int64, image.device()))?;
    Ok(nearest.f_eq_tensor(&own)?.f_to_kind(Kind::Double)?.f_mean(None::<Kind>)?.f_double_value(&[])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::DOUBLE_CPU;

    #[test]
    fn it_is_the_mean_of_both_entropies() {
        let image = Tensor::from_slice2(&[[3.0, 0.0], [0.0, 2.0]]);
        let text = Tensor::from_slice2(&[[1.0, 1.0], [0.0, 5.0]]);
        let scale = Tensor::full([], 2f64.ln(), DOUBLE_CPU);
        // Cosines [[h, 0], [h, 1]], h = √½; times 2.
        let h = 2.0 * 0.5f64.sqrt();
        let of = |own: f64, other: f64| (own.exp() + other.exp()).ln() - own;
        let expected = (of(h, 0.0) + of(2.0, h) + of(h, h) + of(2.0, 0.0)) / 4.0;
        let found = contrastive_loss(&image, &text, &scale).unwrap().double_value(&[]);
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        assert_eq!(retrieval_accuracy(&image, &text).unwrap(), 1.0);
        assert_eq!(retrieval_accuracy(&image, &text.flip([0])).unwrap(), 0.0);
        assert!(contrastive_loss(&image, &text.narrow(0, 0, 1), &scale).is_err());
    }
}
