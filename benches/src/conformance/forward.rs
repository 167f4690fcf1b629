//! One forward pass, tensors in and tensors out.

use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use controlgen_core::{Error, LmInput, Pass, Result, Source};
use controlgen_text::models;
use tch::{Device, Kind, Tensor};

use super::arguments::Arguments;

/// The arguments of `forward` that language models know.
const INPUTS: [&str; 4] = ["input_ids", "inputs_embeds", "attention_mask", "position_ids"];

pub fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["dtype", "device"])?;
    let [model, inputs, outputs] =
        arguments.paths(["MODEL_DIR", "INPUTS.safetensors", "OUTPUTS.safetensors"])?;
    let placement = arguments.placement()?;
    let inputs = Safetensors::open(&inputs)?;
    if let Some(name) = inputs.names().iter().find(|name| !INPUTS.contains(&name.as_str())) {
        return Err(Error::value("input tensor", format!("one of {}", INPUTS.join(", ")), name));
    }
    let read = |name: &str| -> Result<Option<Tensor>> {
        let Some(info) = inputs.info(name) else { return Ok(None) };
        let mut tensor = Tensor::f_empty(info.shape, (info.kind, Device::Cpu))?;
        inputs.read(name, &mut tensor)?;
        Ok(Some(tensor.f_to_device(placement.device)?))
    };
    let integers = |name: &str| -> Result<Option<Tensor>> {
        let Some(tensor) = read(name)? else { return Ok(None) };
        match tensor.f_kind()? {
            Kind::Int64 => Ok(Some(tensor)),
            Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8 => Ok(Some(tensor.f_to_kind(Kind::Int64)?)),
            found => Err(Error::Kind {
                what: name.to_owned(),
                expected: "an integer type".into(),
                found: format!("{found:?}"),
            }),
        }
    };
    let ids = integers("input_ids")?;
    // Rounded to the type of the run, as the model's own embeddings are.
    let embeds = match read("inputs_embeds")? {
        Some(embeds) if embeds.is_floating_point() => Some(embeds.f_to_kind(placement.kind)?),
        Some(embeds) => {
            return Err(Error::Kind {
                what: "inputs_embeds".into(),
                expected: "a floating type".into(),
                found: format!("{:?}", embeds.f_kind()?),
            });
        }
        None => None,
    };
    let keep = match read("attention_mask")? {
        Some(mask) => Some(mask.f_ne(0)?),
        None => None,
    };
    let positions = integers("position_ids")?;

    let _guard = tch::no_grad_guard();
    let lm = models::open(&model, placement)?;
    let input = match (&ids, &embeds) {
        (Some(ids), None) => LmInput::ids(ids),
        (None, Some(embeds)) => LmInput::embeds(embeds),
        _ => {
            let found = if ids.is_some() { "both" } else { "neither" };
            return Err(Error::value("inputs", "input_ids or inputs_embeds", found));
        }
    };
    let rows = ids.as_ref().or(embeds.as_ref()).map_or(0, |t| t.size().first().copied().unwrap_or(0));
    let mut state = lm.start(Source::Rows(rows), &Pass::default())?;
    let input = input.keep(keep.as_ref()).positions(positions.as_ref());
    let output = lm.forward(input, &mut state, &Pass::default())?;
    save(&outputs, &[("logits".to_owned(), output.logits)], &[("format", "pt")])
}
