//! Autoencoders of diffusers: images and latents as their own `encode` and `decode` have them, which is not scaled.

use std::path::Path;

use controlgen_core::{Error, Placement, Result};
use controlgen_diffusion::models::open_autoencoder;
use tch::Tensor;

use super::inputs::Inputs;

/// `sample` of `latents`, `latent_mean` of `sample`, or both.
pub fn run(model: &Path, inputs: &Path, placement: Placement) -> Result<Vec<(String, Tensor)>> {
    let inputs = Inputs::open(inputs, placement, &["latents", "sample"])?;
    let autoencoder = open_autoencoder(model, placement)?;
    let spec = autoencoder.spec();
    let (scale, shift) = (spec.scaling_factor, spec.shift_factor);
    let mut found = Vec::new();
    if let Some(latents) = inputs.tensor("latents")? {
        let scaled = latents.f_to_kind(spec.placement.kind)?.f_sub_scalar(shift)?.f_mul_scalar(scale)?;
        found.push(("sample".to_owned(), autoencoder.decode(&scaled)?));
    }
    if let Some(images) = inputs.tensor("sample")? {
        let mean = autoencoder.encode(&images.f_to_kind(spec.placement.kind)?)?.mean;
        found.push(("latent_mean".to_owned(), mean.f_div_scalar(scale)?.f_add_scalar(shift)?));
    }
    if found.is_empty() {
        return Err(Error::value("inputs", "`latents`, `sample` or both", "neither"));
    }
    Ok(found)
}
