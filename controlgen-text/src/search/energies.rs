//! Energies of what has been said.

use controlgen_core::energy::{Energy, EnergyFn, Text};
use controlgen_core::{Error, LanguageModel, Result};
use tch::{Kind, Tensor};

/// E of each text of token ids, f64, +∞ being "never". Shorter ones are padded on the right; so is an empty one, which is
/// padding alone.
pub(super) fn energies_of(
    energy: &Energy<Text>,
    texts: &[&[i64]],
    lm: &dyn LanguageModel,
) -> Result<Vec<f64>> {
    if texts.is_empty() {
        return Ok(Vec::new());
    }
    let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0).max(1);
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    for text in texts {
        let padding = longest - text.len();
        ids.extend(text.iter().copied().chain(std::iter::repeat_n(0, padding)));
        keep.extend((0..longest).map(|at| at < text.len()));
    }
    let device = lm.spec().placement.device;
    let shape = [texts.len() as i64, longest as i64];
    let mut text = Text::hard(Tensor::f_from_slice(&ids)?.f_view(shape)?.f_to_device(device)?);
    if keep.contains(&false) {
        text = text.keeping(Tensor::f_from_slice(&keep)?.f_view(shape)?.f_to_device(device)?);
    }
    let value = energy.energy(&text)?;
    if value.size() != shape[..1] {
        return Err(Error::shape("energy", format!("[{}], one a row", shape[0]), &value.size()));
    }
    let values: Vec<f64> = Vec::try_from(value.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?)?;
    match values.iter().position(|e| e.is_nan() || *e == f64::NEG_INFINITY) {
        Some(row) => {
            let found = if values[row].is_nan() { "NaN" } else { "-infinity" };
            let at = format!("text {row} of {}", texts.len());
            Err(Error::NotFinite { what: "energy".into(), at, found: found.into() })
        }
        None => Ok(values),
    }
}
