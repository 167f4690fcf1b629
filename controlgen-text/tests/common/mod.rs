//! The small random models of `tests/fixtures`, which `benches/reference/text_fixtures.py` makes.
#![allow(dead_code, clippy::unwrap_used)] // helpers of tests, of which each uses a part

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{LanguageModel, Pass, Source, State};
use tch::{Device, Tensor};

/// One of every kind that is loaded.
pub const MODELS: [&str; 12] = [
    "gpt2_gelu_new",
    "gpt2_gelu_hub",
    "gpt2_relu_untied",
    "llama_mha_untied",
    "llama_gqa_tied",
    "llama_biased",
    "llama_head_dim",
    "llama_rope_linear",
    "llama_rope_llama3",
    "mistral",
    "qwen2",
    "qwen3",
];

/// Those that read their prompt with an encoder; `benches/reference/encoder_fixtures.py` makes them.
pub const ENCODER_DECODERS: [&str; 2] = ["t5_v1_0", "t5_v1_1"];

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn start(lm: &dyn LanguageModel, rows: i64) -> State {
    lm.start(Source::Rows(rows), &Pass::default()).unwrap()
}

/// The tensors of a fixture's cases.
pub struct Cases(Safetensors);

impl Cases {
    pub fn open(name: &str) -> Self {
        Self(Safetensors::open(folder(name).join("cases.safetensors")).unwrap())
    }

    pub fn get(&self, name: &str) -> Option<Tensor> {
        let info = self.0.info(name)?;
        let mut tensor = Tensor::empty(info.shape, (info.kind, Device::Cpu));
        self.0.read(name, &mut tensor).unwrap();
        Some(tensor)
    }
}

/// The largest difference, where `keep` is true.
pub fn difference(a: &Tensor, b: &Tensor, keep: Option<&Tensor>) -> f64 {
    let diff = (a - b).abs();
    let diff = match keep {
        Some(keep) => diff.masked_fill(&keep.logical_not().unsqueeze(-1), 0.0),
        None => diff,
    };
    diff.max().double_value(&[])
}
