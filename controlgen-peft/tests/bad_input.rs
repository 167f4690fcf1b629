//! Adapters and directories that are not what they should be: a typed error each, and nothing changed.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{ADAPTERS, Cases, difference, folder, ids, logits, model, stir};
use controlgen_core::checkpoint::save;
use controlgen_core::{Controls, Error, LanguageModel, Result};
use controlgen_peft::{
    Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig, Targets, open,
};
use serde_json::{Value, json};
use tch::Tensor;

/// The error, whose text names all of these.
fn refused<T>(result: Result<T>, parts: &[&str]) -> Error {
    let Err(error) = result.map(drop) else { panic!("taken; expected an error that says {parts:?}") };
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}; expected {parts:?}");
    error
}

/// A copy of a fixture's directory with another configuration.
fn with_config(name: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(folder(name).join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    change(&mut config);
    std::fs::write(to.path().join("adapter_config.json"), config.to_string()).unwrap();
    let tensors = "adapter_model.safetensors";
    std::fs::copy(folder(name).join(tensors), to.path().join(tensors)).unwrap();
    to
}

/// A copy of a fixture's directory with other tensors.
fn with_tensors(name: &str, change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> tempfile::TempDir {
    let to = with_config(name, |_| {});
    let path = to.path().join("adapter_model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    change(&mut tensors);
    save(&path, &tensors, &[]).unwrap();
    to
}

fn lm_of(name: &str) -> Box<dyn LanguageModel> {
    model(&Cases::open(name).model())
}

#[test]
fn an_adapter_of_another_model() {
    for (name, other, parts) in [
        ("lora_gpt2", "llama_biased", &["c_attn", "linear"][..]),
        ("lora_llama", "llama_mha_untied", &["k_proj.lora_B.weight", "[24, 2]", "[12, 2]"]),
        ("lora_layers", "llama_gqa_tied", &["unexpected", "layers.2"]),
        ("ia3_llama", "gpt2_gelu_new", &["down_proj", "linear"]),
        ("ia3_gpt2", "gpt2_relu_untied", &["missing", "h.2"]),
        ("prefix_gpt2", "llama_gqa_tied", &["num_attention_heads", "2", "3"]),
        ("prefix_llama", "gpt2_gelu_new", &["num_attention_heads", "3", "2"]),
    ] {
        let lm = model(other);
        refused(open(folder(name), lm.sites()), parts);
    }
    // Shapes are listed, as they are in the file and as the model has them.
    let wide = with_tensors("lora_gpt2", |tensors| {
        let (_, t) = tensors.iter_mut().find(|(name, _)| name.ends_with("c_fc.lora_B.weight")).unwrap();
        *t = Tensor::cat(&[&*t, &*t], 0);
    });
    let error = refused(
        Lora::open(wide.path(), lm_of("lora_gpt2").sites()),
        &["adapter_model.safetensors", "mlp.c_fc.lora_B.weight", "[96, 3]", "[192, 3]"],
    );
    assert!(matches!(error, Error::Shape { .. }));
    // Bound to another model than it was made for.
    for (name, other) in
        [("lora_gpt2", "llama_biased"), ("ia3_llama", "gpt2_gelu_new"), ("prefix_gpt2", "qwen3")]
    {
        let adapter = open(folder(name), lm_of(name).sites()).unwrap();
        refused(Controls::bind(model(other).sites(), vec![adapter.handle()]), &[]);
    }
    let neck = Bottleneck::new(BottleneckConfig::default(), lm_of("lora_gpt2").sites(), 1).unwrap();
    refused(Controls::bind(model("qwen3").sites(), vec![Box::new(neck)]), &["hidden-state"]);
}

#[test]
fn keys_that_are_missing_or_too_many() {
    for name in ADAPTERS {
        let lm = lm_of(name);
        let mut gone = String::new();
        let fewer = with_tensors(name, |tensors| gone = tensors.swap_remove(0).0);
        let error =
            refused(open(fewer.path(), lm.sites()), &["adapter_model.safetensors", "1 missing", &gone]);
        assert!(matches!(error, Error::Keys { .. }));
        let more = with_tensors(name, |tensors| {
            let extra = tensors[0].1.copy();
            tensors.push(("base_model.model.lm_head.weight".into(), extra));
        });
        let error = refused(open(more.path(), lm.sites()), &["1 unexpected", "lm_head.weight"]);
        assert!(matches!(error, Error::Keys { .. }));
    }
}

#[test]
fn parameters_that_are_no_numbers() {
    for name in ADAPTERS {
        let lm = lm_of(name);
        let mut key = String::new();
        let poisoned = with_tensors(name, |tensors| {
            let (name, t) = &mut tensors[0];
            key = name.clone();
            let _ = t.view([-1]).narrow(0, 3, 1).fill_(f64::NAN);
        });
        let error = refused(open(poisoned.path(), lm.sites()), &[&key, "NaN"]);
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        let integers = with_tensors(name, |tensors| tensors[0].1 = tensors[0].1.to_kind(tch::Kind::Int64));
        assert!(matches!(refused(open(integers.path(), lm.sites()), &[&key]), Error::Kind { .. }));
        // What is loaded into an adapter that is there changes nothing either.
        let mut adapter = open(folder(name), lm.sites()).unwrap();
        let before = adapter.parameters().into_iter().map(|(_, t)| t.detach_copy()).collect::<Vec<_>>();
        assert!(adapter.load(poisoned.path()).is_err());
        assert!(adapter.parameters().iter().zip(&before).all(|((_, a), b)| a.equal(b)), "{name}");
        adapter.load(&folder(name)).unwrap();
    }
}

#[test]
fn loading_goes_to_every_handle() {
    let lm = lm_of("lora_llama");
    let tokens = ids(&[&[5, 9, 14, 3]]);
    let mut adapter = open(folder("lora_llama"), lm.sites()).unwrap();
    let handle = adapter.adapter_handle();
    let as_read = logits(&*lm, &[&*adapter], &tokens, None);
    stir(&*adapter, 1.0);
    let stirred = logits(&*lm, &[&*handle], &tokens, None);
    assert!(difference(&stirred, &as_read) > 0.1);
    adapter.load(&folder("lora_llama")).unwrap();
    assert!(logits(&*lm, &[&*handle], &tokens, None).equal(&as_read));
    // Of another rank, another scale, another kind.
    let scaled = with_config("lora_llama", |config| config["lora_alpha"] = json!(6));
    assert!(matches!(refused(adapter.load(scaled.path()), &["scale"]), Error::Config { .. }));
    let higher = with_config("lora_llama", |config| config["r"] = json!(4));
    assert!(matches!(refused(adapter.load(higher.path()), &["rank 3", "rank 4"]), Error::Config { .. }));
    let other = refused(adapter.load(&folder("ia3_llama")), &["peft_type", "LORA", "IA3"]);
    assert!(matches!(other, Error::Config { .. }));
    let mut prefix = open(folder("prefix_llama"), lm.sites()).unwrap();
    let longer = with_config("prefix_llama", |config| config["num_virtual_tokens"] = json!(6));
    refused(prefix.load(longer.path()), &["num_virtual_tokens", "5", "6"]);
}

#[test]
fn configurations_that_make_no_sense() {
    let lora = |change: fn(&mut Value)| {
        let at = with_config("lora_gpt2", change);
        open(at.path(), lm_of("lora_gpt2").sites())
    };
    refused(lora(|c| c["r"] = json!(0)), &["`r`", "> 0", "0"]);
    refused(lora(|c| c["r"] = json!("8")), &["`r`"]);
    refused(lora(|c| c["rank_pattern"] = json!({"c_attn": 0})), &["rank_pattern"]);
    refused(lora(|c| c["rank_pattern"] = json!({"(c_attn": 2})), &["rank_pattern", "(c_attn"]);
    refused(lora(|c| c["lora_alpha"] = json!("8")), &["lora_alpha"]);
    refused(lora(|c| c["target_modules"] = json!(null)), &["target_modules"]);
    refused(lora(|c| c["target_modules"] = json!([1])), &["target_modules"]);
    refused(lora(|c| c["layers_to_transform"] = json!("0")), &["layers_to_transform"]);
    refused(lora(|c| c["use_rslora"] = json!("yes")), &["use_rslora"]);
}

#[test]
fn what_is_not_supported_is_said() {
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 14] = [
        (|c| c["use_dora"] = json!(true), "use_dora"),
        (|c| c["use_qalora"] = json!(true), "use_qalora"),
        (|c| c["lora_bias"] = json!(true), "lora_bias"),
        (|c| c["bias"] = json!("lora_only"), "lora_only"),
        (|c| c["bias"] = json!("all"), "all"),
        (|c| c["modules_to_save"] = json!(["lm_head"]), "modules_to_save"),
        (|c| c["exclude_modules"] = json!("c_fc"), "exclude_modules"),
        (|c| c["layer_replication"] = json!([[0, 1]]), "layer_replication"),
        (|c| c["trainable_token_indices"] = json!([1]), "trainable_token_indices"),
        (|c| c["target_parameters"] = json!(["x"]), "target_parameters"),
        (|c| c["alora_invocation_tokens"] = json!([1]), "alora_invocation_tokens"),
        (|c| c["init_lora_weights"] = json!("pissa"), "pissa"),
        (|c| c["init_lora_weights"] = json!("loftq"), "loftq"),
        (|c| c["layers_pattern"] = json!("h"), "layers_pattern"),
    ];
    let lm = lm_of("lora_gpt2");
    for (change, part) in changes {
        let at = with_config("lora_gpt2", change);
        assert!(matches!(refused(open(at.path(), lm.sites()), &[part]), Error::Unsupported { .. }));
    }
    let kind = with_config("lora_gpt2", |c| c["peft_type"] = json!("VERA"));
    let error = refused(open(kind.path(), lm.sites()), &["VERA", "LORA", "PREFIX_TUNING"]);
    assert!(matches!(error, Error::Unsupported { .. }));
    // What is unknown and idle is passed over.
    let more = with_config("lora_gpt2", |c| c["a_field_of_tomorrow"] = json!({"x": [1]}));
    assert!(open(more.path(), lm.sites()).is_ok());
}

#[test]
fn directories_that_are_none() {
    let lm = lm_of("lora_gpt2");
    let missing = open(Path::new("/nowhere/at/all"), lm.sites());
    assert!(matches!(refused(missing, &["adapter_config.json"]), Error::Io { .. }));
    let to = with_config("lora_gpt2", |_| {});
    std::fs::remove_file(to.path().join("adapter_model.safetensors")).unwrap();
    let error = refused(open(to.path(), lm.sites()), &["adapter_model.safetensors"]);
    assert!(matches!(error, Error::Io { .. }));
    for text in ["", "{", "[1]", "{\"peft_type\": 3}", "{}"] {
        std::fs::write(to.path().join("adapter_config.json"), text).unwrap();
        let error = refused(open(to.path(), lm.sites()), &["adapter_config.json"]);
        assert!(matches!(error, Error::Format { .. } | Error::Config { .. }), "{error}");
    }
    let cut = with_config("lora_gpt2", |_| {});
    let path = cut.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    assert!(matches!(refused(open(cut.path(), lm.sites()), &[]), Error::Format { .. }));
}

#[test]
fn new_adapters_that_cannot_be() {
    let lm = model("gpt2_gelu_new");
    let sites = lm.sites();
    let lora = |change: fn(&mut LoraConfig)| {
        let mut config = LoraConfig { target_modules: Targets::names(["c_attn"]), ..LoraConfig::default() };
        change(&mut config);
        Lora::new(config, sites, 1)
    };
    assert!(matches!(refused(lora(|c| c.r = 0), &["rank", ">= 1"]), Error::Value { .. }));
    refused(lora(|c| c.r = -3), &["rank", "-3"]);
    refused(lora(|c| c.lora_alpha = f64::NAN), &["lora_alpha", "NaN"]);
    refused(lora(|c| c.rank_pattern = vec![("c_attn".into(), 0)]), &["rank"]);
    refused(lora(|c| c.alpha_pattern = vec![("c_attn".into(), f64::INFINITY)]), &["lora_alpha"]);
    refused(lora(|c| c.layers_to_transform = vec![9]), &["layers_to_transform", "9"]);
    let typo =
        refused(lora(|c| c.target_modules = Targets::names(["c_attn", "c_prj"])), &["c_prj", "c_proj"]);
    assert!(matches!(typo, Error::NoSite { .. }));
    refused(lora(|c| c.target_modules = Targets::names(["c_attn.x"])), &["c_attn.x"]);
    refused(lora(|c| c.target_modules = Targets::names(Vec::<String>::new())), &["no linear site"]);
    refused(lora(|c| c.target_modules = Targets::Pattern("c_attn".into())), &["no linear site", "c_attn"]);
    refused(lora(|c| c.target_modules = Targets::Pattern("(?=x)".into())), &["target_modules", "lookaround"]);

    let both = Targets::names(["c_attn.k"]);
    let ia3 = Ia3Config { target_modules: both.clone(), feedforward_modules: both, ..Ia3Config::default() };
    refused(Ia3::new(ia3, sites), &["feedforward_modules", "c_attn.k"]);
    for num_virtual_tokens in [0, -1, i64::MAX] {
        let config = PrefixConfig { num_virtual_tokens, ..PrefixConfig::default() };
        refused(Prefix::new(config, sites, 1), &["num_virtual_tokens"]);
    }
    let neck = |change: fn(&mut BottleneckConfig)| {
        let mut config = BottleneckConfig::default();
        change(&mut config);
        Bottleneck::new(config, sites, 1)
    };
    refused(neck(|c| c.reduction_factor = 0), &["reduction_factor"]);
    refused(neck(|c| c.scale = f64::NAN), &["scale"]);
    refused(neck(|c| c.non_linearity = "cube".into()), &["cube", "relu"]);
    refused(neck(|c| c.target_modules = vec!["mpl".into()]), &["mpl", "mlp"]);
    refused(neck(|c| c.target_modules.clear()), &["target_modules"]);
}
