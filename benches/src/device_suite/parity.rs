//! Whether a device computes what the CPU computes in f64.

use std::path::{Path, PathBuf};

use controlgen_core::{Error, LanguageModel, LmInput, Pass, Placement, Result, Source};
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

/// Every model in the folder: logits of a batch with padding, read at once and token by token.
pub fn language_models(models: &Path, placement: Placement, kind: &'static str) -> Result<Vec<Row>> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(models)
        .map_err(|error| Error::io(models, error))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("config.json").exists() && path.join("model.safetensors").exists())
        .collect();
    folders.sort();
    if folders.is_empty() {
        return Err(Error::value(format!("models in {}", models.display()), "at least one", 0));
    }
    let mut rows = Vec::new();
    for (cached, how) in [(false, "at once"), (true, "token by token")] {
        let (mut worst, mut whose) = (-1.0, String::new());
        for folder in &folders {
            let exact = models::open(folder, Placement::new(Device::Cpu, Kind::Double))?;
            let model = models::open(folder, placement)?;
            let expected = logits(&*exact, false)?;
            let scale = expected.f_abs()?.f_max()?.f_double_value(&[])?;
            let off =
                logits(&*model, cached)?.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])? / scale;
            if off > worst || off.is_nan() {
                (worst, whose) = (off, folder.file_name().unwrap_or_default().to_string_lossy().into_owned());
            }
            if off.is_nan() {
                break;
            }
        }
        let check = format!("logits of {} models read {how}, worst: {whose}", folders.len());
        rows.push(Row::at_most(check, kind, worst, bound(placement.kind)));
    }
    Ok(rows)
}

/// The largest difference, over the largest number expected.
pub(super) fn largest_difference(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let exact = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?) };
    let largest = |t: &Tensor| -> Result<f64> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    let expected = exact(expected)?;
    Ok(largest(&exact(found)?.f_sub(&expected)?)? / largest(&expected)?)
}

/// Logits of two rows, the second with two tokens of padding before it: `[B, T, V]`, padding left out.
fn logits(model: &dyn LanguageModel, cached: bool) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    let (spec, length) = (model.spec(), 12);
    let device = spec.placement.device;
    let ids = Tensor::f_arange(2 * length, (Kind::Int64, device))?;
    let ids = ids.f_mul_scalar(7919)?.f_remainder(spec.vocab)?.f_view([2, length])?;
    let keep = Tensor::f_ones([2, length], (Kind::Bool, device))?;
    let _ = keep.f_narrow(0, 1, 1)?.f_narrow(1, 0, 2)?.f_fill_(0)?;
    let pass = Pass::default();
    let mut state = model.start(Source::Rows(2), &pass)?;
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
