//! Fixtures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::Safetensors;
use controlgen_core::{Config, Placement};
use serde_json::Value;
use tch::{Kind, Tensor};

pub const F64: Placement = Placement { device: tch::Device::Cpu, kind: Kind::Double };

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn cases(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(fixture(name).join("cases.safetensors")).unwrap().into_iter().collect()
}

pub fn config(name: &str) -> Config {
    Config::open(&fixture(name).join("config.json")).unwrap()
}

/// The configuration of a fixture with some fields changed.
pub fn altered(name: &str, fields: &[(&str, Value)]) -> Config {
    let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
    let mut all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    all.extend(fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    Config::from_fields("config.json", all)
}

pub fn weights(name: &str) -> Safetensors {
    Safetensors::open(fixture(name).join("diffusion_pytorch_model.safetensors")).unwrap()
}

/// The largest distance of two tensors of the same shape.
pub fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    (found.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max().double_value(&[])
}
