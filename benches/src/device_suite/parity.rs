//! Whether a device computes what the CPU computes in f64.

use std::path::{Path, PathBuf};

use controlgen_core::{
    Encoder, EncoderInput, Error, LanguageModel, LmInput, Pass, Placement, Result, Source, Tokens,
};
use controlgen_text::models;
use tch::{Device, Kind, Tensor};

use super::Row;

/// How far logits may be from those in f64, over the largest of them: what an element type's rounding makes of two
/// layers, with room.
pub(super) fn bound(kind: Kind) -> f64 {
    match kind {
        Kind::Half => 1e-2,
        Kind::BFloat16 => 5e-2,
        _ => 1e-5,
    }
}

/// Every model in the folder: logits of a batch with padding, read at once and token by token; hidden states of encoders.
pub fn models_of_text(models: &Path, placement: Placement, kind: &'static str) -> Result<Vec<Row>> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(models)
        .map_err(|error| Error::io(models, error))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("config.json").exists() && path.join("model.safetensors").exists())
        .collect();
    folders.sort();
    if folders.is_empty() {
        return Err(Error::value(format!("models in {}", models.display()), "at least one", 0));
    }
    let exact = Placement::new(Device::Cpu, Kind::Double);
    let (mut encoders, mut decoders, mut both) = (Vec::new(), Vec::new(), Vec::new());
    for folder in folders {
        let config = models::Config::open(&folder.join("config.json"))?;
        match config.str("model_type")? {
            Some("bert" | "roberta") => encoders.push(folder),
            Some("t5") => both.push(folder),
            _ => decoders.push(folder),
        }
    }
    let mut rows = Vec::new();
    let bound = bound(placement.kind);
    // What an encoder's layers round, a decoder's round again.
    for (what, folders, bound) in [("models", &decoders, bound), ("encoder–decoders", &both, 2.0 * bound)] {
        for (cached, how) in [(false, "at once"), (true, "token by token")] {
            let check = format!("logits of {} {what} read {how}", folders.len());
            rows.push(worst(&check, (kind, bound), folders, |folder| {
                let expected = logits(&*models::open(folder, exact)?, false)?;
                largest_difference(&logits(&*models::open(folder, placement)?, cached)?, &expected)
            })?);
        }
    }
    let check = format!("hidden states of {} encoders", encoders.len());
    rows.push(worst(&check, (kind, bound), &encoders, |folder| {
        let expected = hidden(&*models::open_encoder(folder, exact)?)?;
        largest_difference(&hidden(&*models::open_encoder(folder, placement)?)?, &expected)
    })?);
    Ok(rows)
}

/// The largest difference of all folders, and whose it is.
fn worst(
    check: &str,
    (kind, bound): (&'static str, f64),
    folders: &[PathBuf],
    off: impl Fn(&Path) -> Result<f64>,
) -> Result<Row> {
    let (mut worst, mut whose) = (-1.0, String::new());
    for folder in folders {
        let off = off(folder)?;
        if off > worst || off.is_nan() {
            (worst, whose) = (off, folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        if off.is_nan() {
            break;
        }
    }
    Ok(Row::at_most(format!("{check}, worst: {whose}"), kind, worst, bound))
}

/// The largest difference, over the largest number expected.
pub(super) fn largest_difference(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let exact = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?) };
    let largest = |t: &Tensor| -> Result<f64> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    let expected = exact(expected)?;
    Ok(largest(&exact(found)?.f_sub(&expected)?)? / largest(&expected)?)
}

const LENGTH: i64 = 12;

/// Two rows of tokens, the second with two tokens of padding before it: ids and which to keep, `[2, LENGTH]`.
fn two_rows(vocab: i64, device: Device) -> Result<(Tensor, Tensor)> {
    let ids = Tensor::f_arange(2 * LENGTH, (Kind::Int64, device))?;
    let ids = ids.f_mul_scalar(7919)?.f_remainder(vocab)?.f_view([2, LENGTH])?;
    let keep = Tensor::f_ones([2, LENGTH], (Kind::Bool, device))?;
    let _ = keep.f_narrow(0, 1, 1)?.f_narrow(1, 0, 2)?.f_fill_(0)?;
    Ok((ids, keep))
}

/// Hidden states of the two rows, padding left out: `[2, T, D]`.
fn hidden(encoder: &dyn Encoder) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    let table = encoder.embeddings().ok_or_else(|| Error::unsupported("an encoder without words", "text"))?;
    let (ids, keep) = two_rows(table.size()[0], encoder.spec().placement.device)?;
    let input = EncoderInput::Text { tokens: Tokens::Ids(&ids), keep: Some(&keep) };
    Ok(encoder.encode(input, &Pass::default())?.hidden.f_narrow(1, 2, LENGTH - 2)?)
}

/// Logits of the two rows, padding left out: `[2, T, V]`. An encoder–decoder encodes them first.
fn logits(model: &dyn LanguageModel, cached: bool) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    let (spec, length) = (model.spec(), LENGTH);
    let (ids, keep) = two_rows(spec.vocab, spec.placement.device)?;
    let pass = Pass::default();
    let source = match spec.decoder_start {
        Some(_) => Source::Encoder(LmInput::ids(&ids).keep(Some(&keep))),
        None => Source::Rows(2),
    };
    let mut state = model.start(source, &pass)?;
    let mut read = |start: i64, len: i64| -> Result<Tensor> {
        let keep = keep.f_narrow(1, start, len)?;
        let ids = ids.f_narrow(1, start, len)?;
        Ok(model.forward(LmInput::ids(&ids).keep(Some(&keep)), &mut state, &pass)?.logits)
    };
    let logits = if cached {
        Tensor::f_cat(&(0..length).map(|i| read(i, 1)).collect::<Result<Vec<_>>>()?, 1)?
    } else {
        read(0, length)?
    };
    Ok(logits.f_narrow(1, 2, length - 2)?)
}
