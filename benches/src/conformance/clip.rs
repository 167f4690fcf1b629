//! CLIP's two encoders, and unCLIP's prior.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::config::Config;
use controlgen_core::{Condition, Denoiser, Error, Parameterisation, Pass, Placement, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::{ClipText, ClipTextInput, ClipVision, PriorTransformer};
use tch::{Kind, Tensor};

use super::inputs::Inputs;

const TEXT: [&str; 3] = ["input_ids", "inputs_embeds", "attention_mask"];
const PRIOR: [&str; 5] =
    ["hidden_states", "timestep", "proj_embedding", "encoder_hidden_states", "attention_mask"];

/// Outputs by name.
type Outputs = Vec<(String, Tensor)>;

/// The features of all positions and of the whole, which is projected or not.
fn outputs(hidden: Tensor, pooled: Option<Tensor>, projected: Option<&str>) -> Outputs {
    let pooled = pooled.map(|pooled| (projected.unwrap_or("pooler_output").to_owned(), pooled));
    std::iter::once(("last_hidden_state".to_owned(), hidden)).chain(pooled).collect()
}

/// `last_hidden_state`, and `text_embeds` or `pooler_output`.
pub fn text(config: &Config, model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let inputs = Inputs::open(inputs, placement, &TEXT)?;
    let (given, keep) = (inputs.tokens("input_ids", "inputs_embeds")?, inputs.mask("attention_mask")?);
    let source = Safetensors::open(model)?;
    let encoder = ClipText::load(config, &Weights::new(&source, placement.options()), placement)?;
    let input = ClipTextInput::new(given.tokens(), keep.as_ref());
    let found = encoder.forward(input, &Pass::default())?;
    Ok(outputs(found.hidden, found.pooled, encoder.projects().then_some("text_embeds")))
}

/// `last_hidden_state`, and `image_embeds` or `pooler_output`, of pixels that are normalised already.
pub fn vision(config: &Config, model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let inputs = Inputs::open(inputs, placement, &["pixel_values"])?;
    let pixels = needed(&inputs, "pixel_values")?;
    let source = Safetensors::open(model)?;
    let encoder = ClipVision::load(config, &Weights::new(&source, placement.options()), placement)?;
    let found = encoder.forward(&pixels, &Pass::default())?;
    Ok(outputs(found.hidden, found.pooled, encoder.projects().then_some("image_embeds")))
}

/// `predicted_image_embedding` `[B, P]`.
pub fn prior(model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let inputs = Inputs::open(inputs, placement, &PRIOR)?;
    let (x, t) = (needed(&inputs, "hidden_states")?, needed(&inputs, "timestep")?);
    let &[batch, _] = x.size().as_slice() else {
        return Err(Error::shape("hidden_states", "[B, P]", &x.size()));
    };
    let mut features: Vec<(&str, Tensor)> = Vec::new();
    for name in &PRIOR[2..] {
        if let Some(found) = inputs.tensor(name)? {
            if found.size().first() != Some(&batch) {
                return Err(Error::shape(*name, format!("[{batch}, ..]"), &found.size()));
            }
            features.push((name, found));
        }
    }
    let condition = |row: i64| -> Result<Condition> {
        let feature = |(name, t): &(&str, Tensor)| Ok(((*name).to_owned(), t.f_get(row)?));
        Ok(Condition::Features(features.iter().map(feature).collect::<Result<_>>()?))
    };
    let conditions = (0..batch).map(condition).collect::<Result<Vec<_>>>()?;
    // What is predicted is nothing to one call.
    let predicts = Predicts { parameterisation: Parameterisation::Sample, learned_variance: false };
    let prior = PriorTransformer::open(model, predicts, placement)?;
    let pass = Pass::default();
    let prepared = prior.prepare(&conditions, &pass)?;
    let t = t.f_to_kind(Kind::Float)?.f_reshape([-1])?;
    let t = if t.numel() == 1 { t.f_expand([batch], false)? } else { t };
    let x = x.f_to_kind(placement.kind)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
    let made = prior.predict(&x, &t, &prepared, &pass)?.value.f_flatten(1, -1)?;
    Ok(vec![("predicted_image_embedding".to_owned(), made)])
}

fn needed(inputs: &Inputs, name: &str) -> Result<Tensor> {
    inputs.tensor(name)?.ok_or_else(|| Error::value("inputs", format!("`{name}`"), "none of this name"))
}
