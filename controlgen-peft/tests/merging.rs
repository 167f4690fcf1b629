//! Merging: the same logits, exactness of the way back, order, refusals.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{ADAPTERS, Cases, difference, folder, ids, logits, model, model_in, stir};
use controlgen_core::{Adapter, Error, LanguageModel, Placement};
use controlgen_peft::{Bottleneck, Ia3, Ia3Config, Lora, LoraConfig, Merged, Targets, open};
use tch::{Device, Kind, Tensor};

/// Against peft's logits, biases included.
#[test]
fn merged_logits_equal_pefts() {
    let mut worst: f64 = 0.0;
    for name in ADAPTERS {
        let cases = Cases::open(name);
        let lm = model(&cases.model());
        let adapter = open(folder(name), lm.sites()).unwrap();
        let (ids, keep, expected) = cases.case("left");
        let before = logits(&*lm, &[], &ids, keep.as_ref());
        let merged = Merged::new(lm, &[&*adapter]);
        if name.starts_with("prefix") {
            assert!(matches!(merged, Err(Error::Unsupported { .. })), "{name}");
            continue;
        }
        let merged = merged.unwrap();
        let diff = difference(&logits(merged.model(), &[], &ids, keep.as_ref()), &expected);
        assert!(diff <= 1e-4, "{name}: {diff}");
        worst = worst.max(diff);
        assert!(logits(&*merged.unmerge(), &[], &ids, keep.as_ref()).equal(&before), "{name}");
    }
    println!("largest difference of merged models from peft: {worst:.2e}");
}

/// All weights of a model, bit by bit.
fn weights(lm: &dyn LanguageModel) -> Vec<Tensor> {
    let mut all = Vec::new();
    let _ = lm.map_weights(&mut |_, w| {
        all.push(w.detach_copy());
        Ok(None)
    });
    all
}

#[test]
fn a_hundred_merges_in_bf16_leave_no_trace() {
    for name in ["llama_biased", "gpt2_gelu_new"] {
        let mut lm = model_in(name, Placement::new(Device::Cpu, Kind::BFloat16));
        let pristine = weights(&*lm);
        let tokens = ids(&[&[5, 9, 14, 3, 40, 21]]);
        let before = logits(&*lm, &[], &tokens, None);
        let adapter = Lora::new(LoraConfig::default(), lm.sites(), 1).unwrap();
        stir(&adapter, 1.0);
        for _ in 0..100 {
            let merged = Merged::new(lm, &[&adapter]).unwrap();
            let changed = weights(merged.model());
            assert!(changed.iter().zip(&pristine).any(|(a, b)| !a.equal(b)));
            lm = merged.unmerge();
        }
        let after = weights(&*lm);
        assert_eq!(after.len(), pristine.len());
        assert!(after.iter().zip(&pristine).all(|(a, b)| a.equal(b)), "{name}: a weight moved");
        assert!(logits(&*lm, &[], &tokens, None).equal(&before), "{name}");
    }
}

/// In any order a stack and its merge agree: additions, scales of outputs and of inputs at the same sites.
#[test]
fn several_merge_as_they_stack() {
    for (name, ia3) in [
        ("llama_biased", ["o_proj", "down_proj", "up_proj"]),
        ("gpt2_gelu_new", ["c_attn.v", "mlp.c_proj", "c_fc"]),
    ] {
        let lm = model(name);
        let tokens = ids(&[&[5, 9, 14, 3, 40, 21], &[8, 8, 30, 12, 4, 50]]);
        let config = Ia3Config {
            target_modules: Targets::names(ia3),
            feedforward_modules: Targets::names([ia3[1]]),
            ..Ia3Config::default()
        };
        let scale = Ia3::new(config, lm.sites()).unwrap();
        let one = Lora::new(LoraConfig::default(), lm.sites(), 1).unwrap();
        let two = Lora::new(LoraConfig { r: 2, ..LoraConfig::default() }, lm.sites(), 2).unwrap();
        stir(&scale, 0.0);
        stir(&one, 1.0);
        stir(&two, 2.0);
        let mut seen: Vec<Tensor> = Vec::new();
        let stacks: [[&dyn Adapter; 3]; 3] =
            [[&scale, &one, &two], [&one, &scale, &two], [&one, &two, &scale]];
        for adapters in stacks {
            let stacked = logits(&*lm, &adapters, &tokens, None);
            let merged = Merged::new(lm.handle(), &adapters).unwrap();
            let diff = difference(&logits(&*merged, &[], &tokens, None), &stacked);
            assert!(diff <= 1e-4, "{name}: {diff}");
            assert!(seen.iter().all(|other| difference(other, &stacked) > 1e-2), "the order matters here");
            seen.push(stacked);
        }
    }
}

/// Several are added in f32 and rounded once: nearer to the exact weight than one after the other.
#[test]
fn a_merge_rounds_once() {
    let lm = model_in("llama_gqa_tied", Placement::new(Device::Cpu, Kind::BFloat16));
    let config = |_| LoraConfig { target_modules: Targets::names(["q_proj"]), ..LoraConfig::default() };
    let adapters = [1, 2, 3, 4].map(|seed| Lora::new(config(seed), lm.sites(), seed).unwrap());
    adapters.iter().zip([1.0, 2.0, 3.0, 4.0]).for_each(|(it, salt)| stir(it, salt));
    let all: Vec<&dyn Adapter> = adapters.iter().map(|it| it as &dyn Adapter).collect();
    let merged = Merged::new(lm.handle(), &all).unwrap();
    let (old, new) = (weights(&*lm), weights(merged.model()));
    let _guard = tch::no_grad_guard();
    let mut checked = 0;
    for (old, new) in old.iter().zip(&new).filter(|(old, new)| !old.equal(new)) {
        let exact = adapters.iter().fold(old.to_kind(Kind::Float), |sum, it| {
            let [a, b] = [0, 1].map(|i| it.parameters().swap_remove(2 * checked + i).1);
            sum + b.matmul(&a) * 1.0
        });
        let rounded = exact.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let off = (rounded - new.to_kind(Kind::Float)).abs();
        // Equal but for sums that f32 noise tips over a rounding boundary.
        assert!(off.ne(0.0).sum(Kind::Int64).int64_value(&[]) <= 3);
        checked += 1;
    }
    assert_eq!(checked, 2, "q_proj of two layers");
}

#[test]
fn what_changes_no_weight_is_not_merged() {
    let lm = model("llama_biased");
    let bottleneck = Bottleneck::new(Default::default(), lm.sites(), 1).unwrap();
    let lora = Lora::new(LoraConfig::default(), lm.sites(), 1).unwrap();
    let refused = Merged::new(lm.handle(), &[&lora, &bottleneck]);
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
    let other = Merged::new(model("qwen3"), &[&lora]);
    assert!(matches!(other, Err(Error::Shape { .. } | Error::NoSite { .. })));
}
