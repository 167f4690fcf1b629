//! Adapter directories for peft to read, each with the logits that we compute under it.
//!
//! `peft-directories OUT` writes `OUT/NAME/{adapter_config.json, adapter_model.safetensors, cases.safetensors}`: the
//! fixtures of controlgen-peft, opened and saved, and new adapters. `benches/reference/peft_fixtures.py --read OUT/*` then
//! compares peft's logits with ours.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use controlgen_core::checkpoint::save;
use controlgen_core::{
    Adapter, Controls, Error, LanguageModel, LmInput, Pass, Result, Source, copy_parameters,
};
use controlgen_peft::{Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig, Targets, open};
use tch::{Kind, Tensor};

/// The fixtures, and the models they are for.
const FIXTURES: [(&str, &str); 9] = [
    ("lora_gpt2", "gpt2_gelu_new"),
    ("lora_llama", "llama_gqa_tied"),
    ("lora_pattern", "llama_biased"),
    ("lora_layers", "llama_head_dim"),
    ("ia3_gpt2", "gpt2_gelu_hub"),
    ("ia3_llama", "llama_biased"),
    ("prefix_gpt2", "gpt2_gelu_new"),
    ("prefix_llama", "llama_gqa_tied"),
    ("prefix_projected", "qwen3"),
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn model(name: &str) -> Result<Box<dyn LanguageModel>> {
    benches::models::open(&repository().join("controlgen-text/tests/fixtures").join(name), "f32")
}

/// New adapters, with waves on what they begin as.
fn new(lm: &dyn LanguageModel, kind: &str) -> Result<Box<dyn Adapter>> {
    let sites = lm.sites();
    let gpt2 = lm.spec().architecture == "gpt2";
    let adapter: Box<dyn Adapter> = match kind {
        "all" => Box::new(Lora::new(LoraConfig { fan_in_fan_out: gpt2, ..LoraConfig::default() }, sites, 1)?),
        "ranks" => {
            let target_modules = Targets::names(["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]);
            let config = LoraConfig {
                r: 5,
                lora_alpha: 7.5,
                use_rslora: true,
                target_modules,
                rank_pattern: vec![("layers.1.*".into(), 2), ("down_proj".into(), 3)],
                alpha_pattern: vec![("up_proj".into(), 2.0)],
                layers_to_transform: vec![1],
                ..LoraConfig::default()
            };
            Box::new(Lora::new(config, sites, 2)?)
        }
        "pattern" => {
            let target_modules = Targets::Pattern(r".*\.\d\.mlp\.(gate|down)_proj".into());
            Box::new(Lora::new(LoraConfig { target_modules, ..LoraConfig::default() }, sites, 3)?)
        }
        "ia3" if gpt2 => {
            let (all, before) = (Targets::names(["c_attn", "mlp.c_proj"]), Targets::names(["mlp.c_proj"]));
            let config = Ia3Config {
                target_modules: all,
                feedforward_modules: before,
                fan_in_fan_out: true,
                ..Ia3Config::default()
            };
            Box::new(Ia3::new(config, sites)?)
        }
        "ia3" => Box::new(Ia3::new(Ia3Config::default(), sites)?),
        _ => Box::new(Prefix::new(PrefixConfig { num_virtual_tokens: 6, ..Default::default() }, sites, 4)?),
    };
    let _no_gradients = tch::no_grad_guard();
    let parameters = adapter.parameters();
    let mut stirred = Vec::new();
    for (i, (name, value)) in parameters.iter().enumerate() {
        let n = i64::try_from(value.numel()).unwrap_or(0);
        let wave = Tensor::f_arange(n, (Kind::Float, value.device()))?.f_mul_scalar(1.7)?;
        let wave = wave.f_add_scalar(i as f64)?.f_sin()?.f_mul_scalar(0.3)?;
        stirred.push((name.clone(), value.f_add(&wave.f_view(&value.size()[..])?)?));
    }
    copy_parameters(kind, &stirred, &parameters)?;
    Ok(adapter)
}

/// Saves an adapter, opens what was saved, and writes its logits beside it.
fn write(at: &Path, model_name: &str, lm: &dyn LanguageModel, adapter: &dyn Adapter) -> Result<()> {
    let _no_gradients = tch::no_grad_guard();
    adapter.save(at)?;
    let opened = open(at, lm.sites())?;
    let controls = Controls::bind(lm.sites(), vec![opened.handle()])?;
    let pass = Pass::with_controls(&controls);
    let tokens = |rows: i64, len: i64, factor: i64| {
        let all = Tensor::f_arange(rows * len, (Kind::Int64, tch::Device::Cpu))?;
        all.f_mul_scalar(factor)?.f_remainder(lm.spec().vocab - 3)?.f_add_scalar(3)?.f_view([rows, len])
    };
    let mask = Tensor::f_from_slice(&[0i64, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])?.f_view([2, 6])?;
    let cases = [("plain", tokens(2, 9, 17)?, None), ("left", tokens(2, 6, 23)?, Some(mask))];
    let mut tensors = Vec::new();
    for (case, ids, mask) in cases {
        let keep = mask.as_ref().map(|mask| mask.f_to_kind(Kind::Bool)).transpose()?;
        let mut state = lm.start(Source::Rows(ids.size()[0]), &pass)?;
        let logits = lm.forward(LmInput::ids(&ids).keep(keep.as_ref()), &mut state, &pass)?.logits;
        tensors.push((format!("{case}.input_ids"), ids));
        tensors.push((format!("{case}.logits"), logits));
        tensors.extend(mask.map(|mask| (format!("{case}.attention_mask"), mask)));
    }
    save(at.join("cases.safetensors"), &tensors, &[("model", model_name)])
}

fn run() -> Result<()> {
    let Some(out) = std::env::args().nth(1).map(PathBuf::from) else {
        return Err(Error::value("arguments", "a directory to write to", "none"));
    };
    let mut written = 0;
    for (name, model_name) in FIXTURES {
        let lm = model(model_name)?;
        let adapter = open(repository().join("controlgen-peft/tests/fixtures").join(name), lm.sites())?;
        write(&out.join(name), model_name, &*lm, &*adapter)?;
        written += 1;
    }
    for model_name in ["gpt2_gelu_new", "llama_gqa_tied", "llama_biased", "qwen3"] {
        let lm = model(model_name)?;
        let kinds: &[&str] = if model_name.starts_with("gpt2") {
            &["all", "ia3", "prefix"]
        } else {
            &["all", "ranks", "pattern", "ia3", "prefix"]
        };
        for kind in kinds {
            let adapter = new(&*lm, kind)?;
            write(&out.join(format!("{model_name}_{kind}")), model_name, &*lm, &*adapter)?;
            written += 1;
        }
    }
    println!("{written} directories in {}", out.display());
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
