//! What every adapter promises: identity, sharing, slices, gradients, its written-out formula.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{difference, ids, logits, model, model_in, stir};
use controlgen_core::{
    Adapter, Controls, EnableGrad, Error, LanguageModel, Pass, Placement, SiteKind, SiteMap,
};
use controlgen_peft::{
    Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig, Targets, open,
};
use tch::{Device, Kind, Tensor};

fn lora(sites: &SiteMap, names: &[&str]) -> Lora {
    let config = LoraConfig { r: 3, target_modules: Targets::names(names.to_vec()), ..LoraConfig::default() };
    Lora::new(config, sites, 7).unwrap()
}

fn ia3(sites: &SiteMap, names: &[&str], before: &[&str]) -> Ia3 {
    let (target_modules, feedforward_modules) =
        (Targets::names(names.to_vec()), Targets::names(before.to_vec()));
    Ia3::new(Ia3Config { target_modules, feedforward_modules, ..Ia3Config::default() }, sites).unwrap()
}

fn bottleneck(sites: &SiteMap, names: &[&str], scale: f64, act: &str) -> Bottleneck {
    let target_modules = names.iter().map(|&name| name.to_owned()).collect();
    let config =
        BottleneckConfig { target_modules, reduction_factor: 5, scale, non_linearity: act.to_owned() };
    Bottleneck::new(config, sites, 11).unwrap()
}

fn tokens() -> Tensor {
    ids(&[&[5, 9, 14, 3, 40, 21], &[8, 8, 30, 12, 4, 50]])
}

type Case = (&'static str, Box<dyn LanguageModel>, Box<dyn Adapter>);

/// New adapters of every kind that begins as the identity, and a model each.
fn new_adapters() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for name in ["gpt2_gelu_new", "llama_biased"] {
        let lm = model(name);
        let (sites, gpt2) = (lm.sites(), name.starts_with("gpt2"));
        let attention = if gpt2 { "attn" } else { "self_attn" };
        let every = LoraConfig::default();
        let adapters: [Box<dyn Adapter>; 4] = [
            Box::new(Lora::new(every, sites, 1).unwrap()),
            Box::new(if gpt2 { lora(sites, &["c_attn.q", "c_attn.v"]) } else { lora(sites, &["q_proj"]) }),
            Box::new(if gpt2 {
                ia3(sites, &["c_attn.k", "c_attn.v", "mlp.c_proj"], &["mlp.c_proj"])
            } else {
                ia3(sites, &["k_proj", "v_proj", "down_proj"], &["down_proj"])
            }),
            Box::new(bottleneck(sites, &[attention, "mlp"], 0.5, "gelu")),
        ];
        all.extend(adapters.into_iter().map(|adapter| (name, model(name), adapter)));
    }
    all
}

#[test]
fn a_new_adapter_is_the_identity_to_the_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (name, _, adapter) in new_adapters() {
            let lm = model_in(name, Placement::new(Device::Cpu, kind));
            // Bound to another model of the same sites.
            let (with, without) =
                (logits(&*lm, &[&*adapter], &tokens(), None), logits(&*lm, &[], &tokens(), None));
            // (IA)³ before a product takes its part out of a fused product.
            assert!(with.equal(&without), "{name}, {kind:?}: {}", difference(&with, &without));
            stir(&*adapter, 1.0);
            let stirred = logits(&*lm, &[&*adapter], &tokens(), None);
            assert!(difference(&stirred, &without) > 0.05, "{name}, {kind:?}");
        }
    }
}

#[test]
fn handles_share_parameters_which_are_leaves() {
    for (name, lm, adapter) in new_adapters() {
        let other = adapter.adapter_handle();
        assert_eq!(other.id(), adapter.id());
        stir(&*adapter, 2.0);
        let [a, b] = [&adapter, &other].map(|it| logits(&*lm, &[&**it], &tokens(), None));
        assert!(a.equal(&b), "{name}");
        for (key, parameter) in adapter.parameters() {
            assert_eq!(parameter.kind(), Kind::Float, "{key}");
            assert!(parameter.is_leaf() && parameter.requires_grad(), "{key}");
        }
    }
}

/// Every parameter gets the gradient that finite differences give.
#[test]
fn gradients_reach_every_parameter() {
    let mut all = new_adapters();
    let lm = model("llama_gqa_tied");
    let prefix =
        Prefix::new(PrefixConfig { num_virtual_tokens: 3, ..Default::default() }, lm.sites(), 1).unwrap();
    all.push(("llama_gqa_tied", lm, Box::new(prefix)));
    for (name, lm, adapter) in all {
        stir(&*adapter, 3.0);
        let _guard = tch::no_grad_guard();
        let loss = || {
            let controls = Controls::bind(lm.sites(), vec![adapter.handle()]).unwrap();
            let out = common::forward(&*lm, &Pass::with_controls(&controls), &tokens(), None);
            out.log_softmax(-1, Kind::Double).select(-1, 7).mean(Kind::Double)
        };
        let (keys, leaves): (Vec<_>, Vec<_>) = adapter.parameters().into_iter().unzip();
        let gradients = {
            let _on = EnableGrad::new();
            Tensor::f_run_backward(&[loss()], &leaves, false, false).unwrap()
        };
        let step = 2e-3;
        for (key, (leaf, gradient)) in keys.iter().zip(leaves.iter().zip(&gradients)) {
            assert!(gradient.defined(), "{name}: {key}");
            let direction = gradient.sign();
            let along = |sign: f64| {
                let _ = leaf.shallow_clone().g_add_(&(&direction * (sign * step)));
                let value = loss().double_value(&[]);
                let _ = leaf.shallow_clone().g_add_(&(&direction * (-sign * step)));
                value
            };
            let numeric = (along(1.0) - along(-1.0)) / (2.0 * step);
            let exact = gradient.abs().sum(Kind::Double).double_value(&[]);
            assert!((numeric - exact).abs() <= 0.05 * exact + 2e-3, "{name}: {key}: {numeric} for {exact}");
        }
    }
}

/// A LoRA at all of c_attn whose B acts on the queries alone is a LoRA at the slice c_attn.q.
#[test]
fn a_slice_is_the_whole_with_zeros_elsewhere() {
    let lm = model("gpt2_gelu_new");
    let (slice, whole) = (lora(lm.sites(), &["c_attn.v"]), lora(lm.sites(), &["c_attn"]));
    stir(&slice, 4.0);
    let _guard = tch::no_grad_guard();
    for ((_, part), (key, all)) in slice.parameters().iter().zip(whole.parameters()) {
        if key.ends_with("lora_B.weight") {
            assert_eq!((part.size(), all.size()), (vec![24, 3], vec![72, 3]));
            all.narrow(0, 48, 24).copy_(part);
        } else {
            all.shallow_clone().copy_(part);
        }
    }
    let [a, b] = [&slice, &whole].map(|it| logits(&*lm, &[it as &dyn Adapter], &tokens(), None));
    assert!(difference(&a, &b) <= 1e-5);

    let (slices, whole) =
        (ia3(lm.sites(), &["c_attn.k", "c_attn.v"], &[]), ia3(lm.sites(), &["c_attn"], &[]));
    stir(&slices, 5.0);
    for (i, (key, all)) in whole.parameters().into_iter().enumerate() {
        for (j, start) in [24, 48].into_iter().enumerate() {
            let (name, part) = slices.parameters().swap_remove(2 * i + j);
            assert!(name.ends_with(["c_attn.k.ia3_l", "c_attn.v.ia3_l"][j]) && key.ends_with("c_attn.ia3_l"));
            all.narrow(0, start, 24).copy_(&part);
        }
    }
    let [a, b] = [&slices, &whole].map(|it| logits(&*lm, &[it as &dyn Adapter], &tokens(), None));
    assert!(difference(&a, &b) <= 1e-5);

    // PEFT's format has no name for a slice.
    let temporary = tempfile::tempdir().unwrap();
    for adapter in [&slice as &dyn Adapter, &slices] {
        assert!(matches!(adapter.save(temporary.path()), Err(Error::Unsupported { .. })));
    }
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0, "nothing was written");
}

/// Two LoRAs in a stack add up to one of twice the rank.
#[test]
fn several_at_once_add_up() {
    let lm = model("llama_gqa_tied");
    let config = |r| LoraConfig { r, lora_alpha: r as f64 * 1.5, ..LoraConfig::default() };
    let [one, two] = [1, 2].map(|seed| Lora::new(config(2), lm.sites(), seed).unwrap());
    let both = Lora::new(config(4), lm.sites(), 3).unwrap();
    stir(&one, 1.0);
    stir(&two, 2.0);
    let _guard = tch::no_grad_guard();
    for (((key, joint), (_, a)), (_, b)) in
        both.parameters().iter().zip(one.parameters()).zip(two.parameters())
    {
        let dim = if key.ends_with("lora_A.weight") { 0 } else { 1 };
        joint.shallow_clone().copy_(&Tensor::cat(&[a, b], dim));
    }
    let stacked = logits(&*lm, &[&one, &two], &tokens(), None);
    assert!(difference(&stacked, &logits(&*lm, &[&both], &tokens(), None)) <= 1e-4);
    assert!(difference(&stacked, &logits(&*lm, &[&one], &tokens(), None)) > 0.05);
}

/// h + s·(U act(D h + d) + u), written out on what a tap saw.
#[test]
fn a_bottleneck_is_its_formula() {
    use controlgen_core::{At, Binding, Control, Result, Taps};
    struct Tap;
    impl Control for Tap {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.select(SiteKind::Hidden, "layers.1.mlp")?.into_iter().for_each(|site| to.at(site, 0));
            Ok(())
        }
        fn hidden(&self, at: At<'_>, h: Tensor, _residual: &Tensor) -> Result<Tensor> {
            at.pass.taps.unwrap().push(at.site, h.shallow_clone());
            Ok(h)
        }
    }
    let lm = model("llama_biased");
    let adapter = bottleneck(lm.sites(), &["layers.1.mlp"], 0.7, "relu");
    stir(&adapter, 6.0);
    let controls = Controls::bind(lm.sites(), vec![Box::new(Tap), adapter.handle(), Box::new(Tap)]).unwrap();
    let taps = Taps::new();
    let _guard = tch::no_grad_guard();
    let pass = Pass { taps: Some(&taps), ..Pass::with_controls(&controls) };
    let _ = common::forward(&*lm, &pass, &tokens(), None);
    let seen = taps.take();
    let (h, after) = (&seen[0].1, &seen[1].1);
    let [down, down_bias, up, up_bias]: [Tensor; 4] =
        adapter.parameters().into_iter().map(|(_, t)| t).collect::<Vec<_>>().try_into().unwrap();
    assert_eq!((down.size(), up.size()), (vec![4, 24], vec![24, 4]));
    let narrow = (h.matmul(&down.transpose(0, 1)) + down_bias).clamp_min(0.0);
    let expected = h + (narrow.matmul(&up.transpose(0, 1)) + up_bias) * 0.7;
    assert!(difference(after, &expected) <= 1e-5);
    assert!(difference(after, h) > 0.05);
}

#[test]
fn a_bottleneck_is_saved_and_opened() {
    let lm = model("gpt2_gelu_new");
    let config = BottleneckConfig {
        target_modules: vec!["attn".into(), "mlp".into()],
        reduction_factor: 7,
        non_linearity: "gelu_new".into(),
        scale: 4.0,
    };
    let adapter = Bottleneck::new(config.clone(), lm.sites(), 1).unwrap();
    stir(&adapter, 7.0);
    let temporary = tempfile::tempdir().unwrap();
    adapter.save(temporary.path()).unwrap();
    let opened = open(temporary.path(), lm.sites()).unwrap();
    assert_eq!(Bottleneck::open(temporary.path(), lm.sites()).unwrap().config(), &config);
    let [a, b] = [&adapter as &dyn Adapter, &*opened].map(|it| logits(&*lm, &[it], &tokens(), None));
    assert!(a.equal(&b));
    let text = std::fs::read_to_string(temporary.path().join("adapter_config.json")).unwrap();
    assert!(text.contains("\"peft_type\": \"BOTTLENECK\""), "{text}");
    assert_eq!(adapter.parameters()[0].0, "transformer.h.0.attn.adapter_down.weight");
}

/// Initial values are functions of the seed and the place alone.
#[test]
fn a_seed_says_all() {
    let lm = model("llama_gqa_tied");
    let new = |names: &[&str], seed| {
        let config =
            LoraConfig { r: 4, target_modules: Targets::names(names.to_vec()), ..Default::default() };
        Lora::new(config, lm.sites(), seed).unwrap().parameters()
    };
    tch::manual_seed(1);
    let first = new(&["q_proj"], 5);
    tch::manual_seed(2);
    assert!(first.iter().zip(new(&["q_proj"], 5)).all(|((_, a), (_, b))| a.equal(&b)));
    assert!(!first[0].1.equal(&new(&["q_proj"], 6)[0].1));
    let bound = 1.0 / 24f64.sqrt();
    let a = &first[0].1;
    assert!(a.abs().max().double_value(&[]) <= bound && a.abs().max().double_value(&[]) > 0.9 * bound);
    // Of 96 uniforms on (−b, b): their mean within four of its deviations.
    assert!(a.mean(Kind::Double).double_value(&[]).abs() < 4.0 * bound / (3.0f64 * 96.0).sqrt());
    assert_eq!(first[1].1.abs().max().double_value(&[]), 0.0);
}

/// In bf16, the change is computed in f32 and the sum rounded once, as in peft.
#[test]
fn in_bf16_the_sum_is_rounded_once() {
    let lm = model_in("llama_gqa_tied", Placement::new(Device::Cpu, Kind::BFloat16));
    let adapter = lora(lm.sites(), &["lm_head"]);
    stir(&adapter, 8.0);
    let _guard = tch::no_grad_guard();
    use controlgen_core::{At, Binding, Control, Result, Taps};
    struct Tap;
    impl Control for Tap {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.select(SiteKind::Linear, "lm_head")?.into_iter().for_each(|site| to.at(site, 0));
            Ok(())
        }
        fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
            at.pass.taps.unwrap().push(at.site, x.shallow_clone());
            at.pass.taps.unwrap().push(at.site, y.shallow_clone());
            Ok(y)
        }
    }
    let controls = Controls::bind(lm.sites(), vec![Box::new(Tap), adapter.handle()]).unwrap();
    let taps = Taps::new();
    let pass = Pass { taps: Some(&taps), ..Pass::with_controls(&controls) };
    let out = common::forward(&*lm, &pass, &tokens(), None);
    let seen = taps.take();
    let (x, y) = (seen[0].1.to_kind(Kind::Float), seen[1].1.to_kind(Kind::Float));
    let [a, b] = [0, 1].map(|i| adapter.parameters().swap_remove(i).1);
    let expected = y + x.matmul(&a.transpose(0, 1)).matmul(&b.transpose(0, 1)) * (8.0 / 3.0);
    // Within half a unit of bf16's last place, which f32 noise may tip.
    let relative = (out.to_kind(Kind::Float) - &expected).abs() / expected.abs().clamp_min(1e-2);
    assert!(relative.max().double_value(&[]) <= 0.00392, "{relative:?}");
    assert_eq!(out.kind(), Kind::BFloat16);
}
