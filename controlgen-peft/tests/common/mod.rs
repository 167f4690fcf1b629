//! The adapters of `tests/fixtures`, which `benches/reference/peft_fixtures.py` makes, and the models they are for.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)] // helpers of tests, not all of which every test uses

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Adapter, Controls, LanguageModel, LmInput, Pass, Placement, Source, copy_parameters};
use controlgen_text::models;
use tch::{Device, Kind, Tensor};

pub const ADAPTERS: [&str; 9] = [
    "lora_gpt2",
    "lora_llama",
    "lora_pattern",
    "lora_layers",
    "ia3_gpt2",
    "ia3_llama",
    "prefix_gpt2",
    "prefix_llama",
    "prefix_projected",
];

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn model_in(name: &str, placement: Placement) -> Box<dyn LanguageModel> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-text/tests/fixtures").join(name);
    models::open(&folder, placement).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A random model of controlgen-text's tests, in f32.
pub fn model(name: &str) -> Box<dyn LanguageModel> {
    model_in(name, Placement::CPU)
}

/// The tensors of a fixture's cases.
pub struct Cases(Safetensors);

impl Cases {
    pub fn open(name: &str) -> Self {
        Self(Safetensors::open(folder(name).join("cases.safetensors")).unwrap())
    }

    /// The model that the adapter is for.
    pub fn model(&self) -> String {
        let about = self.0.metadata("model").unwrap().unwrap();
        about.split(';').next().unwrap().to_owned()
    }

    pub fn get(&self, name: &str) -> Option<Tensor> {
        let info = self.0.info(name)?;
        let mut tensor = Tensor::empty(info.shape, (info.kind, Device::Cpu));
        self.0.read(name, &mut tensor).unwrap();
        Some(tensor)
    }

    /// Ids, what is no padding, and peft's logits.
    pub fn case(&self, case: &str) -> (Tensor, Option<Tensor>, Tensor) {
        let keep = self.get(&format!("{case}.attention_mask")).map(|mask| mask.to_kind(Kind::Bool));
        let [ids, logits] = ["input_ids", "logits"].map(|name| self.get(&format!("{case}.{name}")).unwrap());
        (ids, keep, logits)
    }
}

/// The logits of ids under adapters; zeros at padding.
pub fn logits(
    lm: &dyn LanguageModel,
    adapters: &[&dyn Adapter],
    ids: &Tensor,
    keep: Option<&Tensor>,
) -> Tensor {
    let _guard = tch::no_grad_guard();
    let controls = Controls::bind(lm.sites(), adapters.iter().map(|it| it.handle()).collect()).unwrap();
    let pass = Pass::with_controls(&controls);
    forward(lm, &pass, ids, keep)
}

pub fn forward(lm: &dyn LanguageModel, pass: &Pass<'_>, ids: &Tensor, keep: Option<&Tensor>) -> Tensor {
    let mut state = lm.start(Source::Rows(ids.size()[0]), pass).unwrap();
    let out = lm.forward(LmInput::ids(ids).keep(keep), &mut state, pass).unwrap().logits;
    match keep {
        Some(keep) => out.masked_fill(&keep.logical_not().unsqueeze(-1), 0.0),
        None => out,
    }
}

/// The largest difference.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Gives an adapter's parameters values that matter: what they are, plus waves.
pub fn stir(adapter: &dyn Adapter, salt: f64) {
    let _guard = tch::no_grad_guard();
    let parameters = adapter.parameters();
    let stirred = |(i, (name, value)): (usize, &(String, Tensor))| {
        let n = value.numel() as i64;
        let wave = (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 1.7 + salt + i as f64).sin();
        (name.clone(), value + wave.view(value.size().as_slice()) * 0.3)
    };
    let new: Vec<_> = parameters.iter().enumerate().map(stirred).collect();
    copy_parameters("stirred", &new, &parameters).unwrap();
}

pub fn ids(rows: &[&[i64]]) -> Tensor {
    Tensor::from_slice2(rows)
}
