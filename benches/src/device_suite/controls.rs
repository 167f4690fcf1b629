//! Whether controls inside a model do on a device what they do on the CPU: adapters row by row, attention edits.

use std::path::Path;

use controlgen_core::{
    Adapter, Attn, Control, Controls, Dims, Lane, Lanes, LanguageModel, LmInput, Mask, Pass, Placement,
    Result, SiteMap, Source,
};
use controlgen_guidance::{Edit, PromptToPrompt};
use controlgen_peft::{ActiveAdapters, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig, Targets};
use controlgen_text::models;
use tch::{Device, Kind, Tensor};

use super::Row;
use super::parity::{bound, largest_difference};

/// Five rows of one batch: LoRA, (IA)³, a prefix, all of them, none.
pub fn adapters(folder: &Path, placement: Placement, kind: &'static str) -> Result<Vec<Row>> {
    let folder = folder.join("llama_biased");
    let exact = logits(&*models::open(&folder, Placement::new(Device::Cpu, Kind::Double))?)?;
    let found = logits(&*models::open(&folder, placement)?)?;
    let off = largest_difference(&found, &exact)?;
    Ok(vec![Row::at_most("logits under adapters, row by row", kind, off, bound(placement.kind))])
}

fn logits(model: &dyn LanguageModel) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    let (sites, device) = (model.sites(), model.spec().placement.device);
    let config = Ia3Config {
        target_modules: Targets::names(["k_proj", "v_proj", "down_proj"]),
        feedforward_modules: Targets::names(["down_proj"]),
        ..Ia3Config::default()
    };
    let prefix = PrefixConfig { num_virtual_tokens: 3, ..PrefixConfig::default() };
    let all: [Box<dyn Adapter>; 3] = [
        Box::new(Lora::new(LoraConfig { r: 4, ..LoraConfig::default() }, sites, 1)?.to_device(device)?),
        Box::new(Ia3::new(config, sites)?.to_device(device)?),
        Box::new(Prefix::new(prefix, sites, 2)?.to_device(device)?),
    ];
    // As if trained: none of them is the identity.
    for (i, (_, mut parameter)) in all.iter().flat_map(|adapter| adapter.parameters()).enumerate() {
        let n = i64::try_from(parameter.numel()).unwrap_or(i64::MAX);
        let by = Tensor::f_arange(n, (Kind::Float, parameter.device()))?.f_add_scalar(i as f64)?.f_sin()?;
        let _ = parameter.f_add_(&by.f_mul_scalar(0.05)?.f_view_as(&parameter)?)?;
    }
    let controls = Controls::bind(sites, all.iter().map(|adapter| adapter.handle()).collect())?;
    let named: Vec<(&str, &dyn Adapter)> =
        ["lora", "ia3", "prefix"].into_iter().zip(all.iter().map(|adapter| &**adapter)).collect();
    let rows = [vec!["lora"], vec!["ia3"], vec!["prefix"], vec!["lora", "ia3", "prefix"], vec![]];
    let lanes = Lanes::samples(rows.len()).with(ActiveAdapters::new(&named, &rows)?.on(device)?);
    let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(&controls) };
    let ids = Tensor::f_arange(5 * 8, (Kind::Int64, device))?;
    let ids = ids.f_mul_scalar(7919)?.f_remainder(model.spec().vocab)?.f_view([5, 8])?;
    let mut state = model.start(Source::Rows(5), &pass)?;
    let first = model.forward(LmInput::ids(&ids.f_narrow(1, 0, 7)?), &mut state, &pass)?.logits;
    let last = model.forward(LmInput::ids(&ids.f_narrow(1, 7, 1)?), &mut state, &pass)?.logits;
    Ok(Tensor::f_cat(&[&first, &last], 1)?)
}

/// A chain of Prompt-to-Prompt's edits on one attention.
pub fn attention_edits(placement: Placement, kind: &'static str) -> Result<Vec<Row>> {
    let exact = edited(Placement::new(Device::Cpu, Kind::Double))?;
    let off = largest_difference(&edited(placement)?, &exact)?;
    Ok(vec![Row::at_most("edits of an attention", kind, off, bound(placement.kind))])
}

fn edited(placement: Placement) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    let mut sites = SiteMap::new();
    let dims = Dims::Attention { heads: 4, kv_heads: 4, head_dim: 32, cross: true };
    let site = sites.add("attn2", dims);
    let words = [(2..3, 2..4)];
    let chain = PromptToPrompt::new("attn2", 2, 3)
        .with(Edit::replace_words(&words, 8)?.blend(&[0.5; 8])?, 0..10)?
        .with(Edit::reweight(&[1.0, 2.0, 1.0, -1.0, 1.0, 1.0, 0.5, 1.0])?, 0..10)?;
    let controls = Controls::bind(&sites, vec![chain.handle()])?;
    let lane = |condition| Lane { condition, ..Lane::default() };
    let lanes = Lanes::new((0..4).map(lane).collect());
    let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(&controls) };
    let noise = |shape: &[i64], salt: f64| -> Result<Tensor> {
        let n: i64 = shape.iter().product();
        let numbers = Tensor::f_arange(n, (Kind::Double, Device::Cpu))?.f_mul_scalar(1.7)?;
        let numbers = numbers.f_add_scalar(salt)?.f_sin()?.f_view(shape)?;
        Ok(numbers.f_to_device(placement.device)?.f_to_kind(placement.kind)?)
    };
    let attn = Attn {
        q: noise(&[4, 4, 64, 32], 0.1)?,
        k: noise(&[4, 4, 8, 32], 0.2)?,
        v: noise(&[4, 4, 8, 32], 0.3)?,
        mask: Mask::Full,
        scale: None,
    };
    pass.attention(site, attn)
}
