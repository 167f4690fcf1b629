//! Fixtures, and what an error must be.

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Error, LanguageModel, LmInput, Pass, Placement, Result, State};
use controlgen_text::models::{self, Config};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

pub use crate::common::{MODELS, folder, start};

/// The fields of a config.json.
pub fn fields(name: &str, file: &str) -> Map<String, Value> {
    let text = std::fs::read_to_string(folder(name).join(file)).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub fn weights(name: &str) -> Safetensors {
    Safetensors::open(folder(name)).unwrap()
}

/// Loads the model that these fields describe.
pub fn load(fields: &Map<String, Value>, weights: &Safetensors) -> Result<Box<dyn LanguageModel>> {
    models::load(&Config::from_fields("config.json", fields.clone()), weights, Placement::CPU)
}

pub fn open(name: &str) -> Box<dyn LanguageModel> {
    models::open(&folder(name), Placement::CPU).unwrap()
}

/// All tensors of a checkpoint, as they are stored.
pub fn tensors(weights: &Safetensors) -> Vec<(String, Tensor)> {
    let read = |name: String| {
        let info = weights.info(&name).unwrap();
        let mut tensor = Tensor::empty(info.shape, (info.kind, Device::Cpu));
        weights.read(&name, &mut tensor).unwrap();
        (name, tensor)
    };
    weights.names().into_iter().map(read).collect()
}

pub fn ids(shape: &[i64], ids: &[i64]) -> Tensor {
    Tensor::from_slice(ids).view(shape)
}

/// The logits of a pass without controls.
pub fn forward(lm: &dyn LanguageModel, input: LmInput<'_>, state: &mut State) -> Result<Tensor> {
    lm.forward(input, state, &Pass::default()).map(|output| output.logits)
}

/// Whether what was found is what it was before, to the bit.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == Kind::Float && a.equal(b)
}

/// An error of our own: LibTorch was not asked to find out.
#[track_caller]
pub fn typed(error: &Error) {
    let text = error.to_string();
    assert!(!matches!(error, Error::Torch { .. }), "{text}");
    assert!(text.len() < 2000 && !text.contains('\n'), "{text}");
}

/// An error of our own that says these things.
#[track_caller]
pub fn refused<T>(made: Result<T>, says: &[&str]) -> Error {
    let Err(error) = made else { panic!("no error; expected one that says {says:?}") };
    typed(&error);
    let text = error.to_string();
    assert!(says.iter().all(|part| text.contains(part)), "expected {says:?} in: {text}");
    error
}
