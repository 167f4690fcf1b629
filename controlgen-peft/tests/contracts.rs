//! Every adapter keeps the contract of adapters.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::model;
use controlgen_core::testing::contract::{self, Options};
use controlgen_core::{Adapter, LanguageModel};
use controlgen_peft::{
    Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig, Targets,
};

/// A model, and the names of some of its sites: attention's outputs k and v, the input of the MLP's last product, and
/// branches.
fn models() -> Vec<(Box<dyn LanguageModel>, [&'static str; 2], &'static str)> {
    vec![
        (model("gpt2_gelu_new"), ["c_attn", "c_fc"], "mlp.c_proj"),
        (model("llama_biased"), ["k_proj", "v_proj"], "down_proj"),
        (model("qwen3"), ["k_proj", "v_proj"], "down_proj"),
    ]
}

#[test]
fn low_rank() {
    for (lm, ..) in models() {
        contract::adapter(&*lm, || {
            Ok(Box::new(Lora::new(LoraConfig { r: 3, ..LoraConfig::default() }, lm.sites(), 1)?)
                as Box<dyn Adapter>)
        })
        .unwrap();
    }
}

#[test]
fn ia3() {
    for (lm, outputs, input) in models() {
        contract::adapter(&*lm, || {
            let config = Ia3Config {
                target_modules: Targets::names(outputs.into_iter().chain([input]).collect::<Vec<_>>()),
                feedforward_modules: Targets::names(vec![input]),
                ..Ia3Config::default()
            };
            Ok(Box::new(Ia3::new(config, lm.sites())?) as Box<dyn Adapter>)
        })
        .unwrap();
    }
}

#[test]
fn prefix() {
    // It acts from the start: keys that no training has moved are keys all the same.
    let options = Options { identity: false, ..Options::default() };
    for (lm, ..) in models() {
        options
            .adapter(&*lm, || {
                let config = PrefixConfig { num_virtual_tokens: 3, ..PrefixConfig::default() };
                Ok(Box::new(Prefix::new(config, lm.sites(), 2)?) as Box<dyn Adapter>)
            })
            .unwrap();
    }
}

#[test]
fn bottleneck() {
    for (lm, ..) in models() {
        contract::adapter(&*lm, || {
            let config =
                BottleneckConfig { target_modules: vec!["mlp".into()], ..BottleneckConfig::default() };
            Ok(Box::new(Bottleneck::new(config, lm.sites(), 3)?) as Box<dyn Adapter>)
        })
        .unwrap();
    }
}
