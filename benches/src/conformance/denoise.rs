//! Denoisers of diffusers: one call, told by the arguments of their `forward`.

use std::path::Path;

use controlgen_core::{Condition, Denoiser, Error, Parameterisation, Pass, Placement, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::open_denoiser;
use tch::{Kind, Tensor};

use super::inputs::Inputs;
use controlgen_core::config::Config;

/// The arguments that become features of each row's condition.
const FEATURES: [&str; 5] =
    ["encoder_hidden_states", "encoder_attention_mask", "text_embeds", "time_ids", "class_labels"];

/// `sample` of the denoiser in a directory.
///
/// What is predicted is nothing to one call. Channels beyond those of a sample are taken for a learned variance if
/// they come out, and for a condition's if they go in, as they lie in `sample`.
pub fn run(config: &Config, model: &Path, inputs: &Path, placement: Placement) -> Result<Tensor> {
    let known = [&["sample", "hidden_states", "timestep", "attention_mask"], &FEATURES[..]].concat();
    let inputs = Inputs::open(inputs, placement, &known)?;
    let needed = |name: &str| {
        inputs.tensor(name)?.ok_or_else(|| Error::value("inputs", format!("`{name}`"), "none of this name"))
    };
    // Transformers call the sample so.
    let sample = match inputs.tensor("hidden_states")? {
        Some(sample) => sample,
        None => needed("sample")?,
    };
    let timestep = needed("timestep")?;
    let &[batch, channels, ..] = sample.size().as_slice() else {
        return Err(Error::shape("sample", "[B, C, H, W]", &sample.size()));
    };
    let outputs = config.int_if("out_channels", 1, i64::from(u16::MAX))?.unwrap_or(channels);
    let predicts =
        Predicts { parameterisation: Parameterisation::Epsilon, learned_variance: outputs > channels };
    let denoiser = open_denoiser(model, predicts, placement)?;
    let own = denoiser.spec().channels;
    if channels < own {
        return Err(Error::shape("sample", format!("[B, {own} or more, H, W]"), &sample.size()));
    }
    let mut features: Vec<(&str, Tensor)> = Vec::new();
    for name in FEATURES {
        // Once both masks were given under one name.
        let other = if name == "encoder_attention_mask" { "attention_mask" } else { name };
        if let Some(found) = inputs.tensor(name)?.map_or_else(|| inputs.tensor(other), |t| Ok(Some(t)))? {
            features.push((name, found));
        }
    }
    if channels > own {
        features.push(("concat", sample.f_narrow(1, own, channels - own)?));
    }
    if let Some((name, odd)) = features.iter().find(|feature| feature.1.size().first() != Some(&batch)) {
        return Err(Error::shape(*name, format!("[{batch}, ..]"), &odd.size()));
    }
    // The row of a transformer's table that stands for no class.
    let none = config.int_if("num_embeds_ada_norm", 1, i64::from(u32::MAX))?;
    let condition = |row: i64| -> Result<Condition> {
        match &features[..] {
            [] => Ok(Condition::Null),
            [("class_labels", labels)] if labels.dim() == 1 && !labels.is_floating_point() => {
                let class = labels.f_int64_value(&[row])?;
                Ok(if none == Some(class) { Condition::Null } else { Condition::Class(class) })
            }
            _ => {
                let feature = |(name, t): &(&str, Tensor)| Ok(((*name).to_owned(), t.f_get(row)?));
                Ok(Condition::Features(features.iter().map(feature).collect::<Result<_>>()?))
            }
        }
    };
    let conditions = (0..batch).map(condition).collect::<Result<Vec<_>>>()?;
    let timestep = timestep.f_to_kind(Kind::Float)?.f_reshape([-1])?;
    let timestep = match timestep.numel() {
        1 => timestep.f_expand([batch], false)?,
        _ => timestep,
    };
    let pass = Pass::default();
    let prepared = denoiser.prepare(&conditions, &pass)?;
    let x = sample.f_narrow(1, 0, own)?.f_to_kind(placement.kind)?;
    let made = denoiser.predict(&x, &timestep, &prepared, &pass)?;
    Ok(match made.variance {
        Some(variance) => Tensor::f_cat(&[made.value, variance], 1)?,
        None => made.value,
    })
}
