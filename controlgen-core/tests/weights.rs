//! The loader that models are given.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use controlgen_core::Error;
use controlgen_core::checkpoint::{Safetensors, Weights, prefixes, save};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A checkpoint with these names, the shapes, and numbers that count from 0.
fn checkpoint(tensors: &[(&str, &[i64])]) -> Safetensors {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensors: Vec<(String, Tensor)> = tensors
        .iter()
        .map(|(name, shape)| {
            let numbers = Tensor::arange(shape.iter().product::<i64>(), FLOAT).reshape(*shape);
            ((*name).to_owned(), numbers)
        })
        .collect();
    save(&path, &tensors, &[]).unwrap();
    Safetensors::open(&path).unwrap()
}

fn layer() -> Safetensors {
    checkpoint(&[
        ("model.layers.0.q.weight", &[4, 3]),
        ("model.layers.0.k.weight", &[2, 3]),
        ("model.layers.0.v.weight", &[2, 3]),
        ("model.layers.0.q.bias", &[4]),
        ("model.layers.0.rotary_emb.inv_freq", &[2]),
        ("head", &[2, 2]),
    ])
}

#[test]
fn what_was_used_is_reported() {
    let source = layer();
    let weights = Weights::new(&source, (Kind::BFloat16, Device::Cpu));
    let scope = weights.scope("model.layers").scope("0");
    assert_eq!(scope.full("q.bias"), "model.layers.0.q.bias");
    assert_eq!(scope.shape("q.weight"), Some(vec![4, 3]));
    let fused = scope.fused(&[("q.weight", &[4, 3]), ("k.weight", &[2, 3]), ("v.weight", &[2, 3])]).unwrap();
    let expected =
        Tensor::cat(&[Tensor::arange(12, FLOAT), Tensor::arange(6, FLOAT), Tensor::arange(6, FLOAT)], 0);
    assert_eq!(fused, expected.reshape([8, 3]).to_kind(Kind::BFloat16));
    assert_eq!(fused.kind(), Kind::BFloat16);
    assert!(fused.is_contiguous());
    let bias = scope.placed(FLOAT).optional("q.bias", &[4]).unwrap().unwrap();
    assert_eq!((bias.kind(), bias), (Kind::Float, Tensor::arange(4, FLOAT)));
    assert!(scope.optional("k.bias", &[2]).unwrap().is_none());
    let head = weights.transposed("head", &[2, 2]).unwrap();
    assert_eq!(head.to_kind(Kind::Float), Tensor::from_slice(&[0.0_f32, 2.0, 1.0, 3.0]).reshape([2, 2]));
    assert!(head.is_contiguous());

    let report = weights.finish(&["*.rotary_emb.inv_freq"]).unwrap();
    assert_eq!(report.used.len(), 5);
    assert!(report.used.is_sorted() && report.missing.is_empty() && report.unexpected.is_empty());
    let error = weights.finish(&[]).unwrap_err().to_string();
    assert!(error.contains("1 unexpected: model.layers.0.rotary_emb.inv_freq"), "{error}");
}

#[test]
fn all_missing_names_are_listed_at_once() {
    let source = checkpoint(&[("a", &[2]), ("left", &[1]), ("q", &[2, 3])]);
    let weights = Weights::new(&source, FLOAT);
    let placeholder = weights.get("b", &[1 << 20, 1 << 20]).unwrap(); // four terabytes, were it real
    assert_eq!(placeholder.size(), [1 << 20, 1 << 20]);
    let _ = weights.scope("s").get("c", &[2]).unwrap();
    let _ = weights.transposed("d", &[2, 3]).unwrap();
    let fused = weights.fused(&[("q", &[2, 3]), ("k", &[5, 3])]).unwrap();
    assert_eq!(fused.size(), [7, 3]);
    assert!(weights.optional("e", &[2]).unwrap().is_none());
    let report = weights.finish_lenient(&[]);
    assert_eq!(report.missing, ["b", "d", "k", "s.c"]);
    assert_eq!(report.unexpected, ["a", "left"]);
    assert_eq!(report.used, ["q"]);
    match weights.finish(&["l*"]) {
        Err(Error::Keys { missing, unexpected, .. }) => {
            assert_eq!(missing, ["b", "d", "k", "s.c"]);
            assert_eq!(unexpected, ["a"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn other_shapes_are_refused() {
    let source = layer();
    let weights = Weights::new(&source, FLOAT);
    let text = |result: Result<Tensor, Error>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
        error.to_string()
    };
    let found = text(weights.get("head", &[4]));
    assert!(found.contains("tensor `head`: expected shape [4], found [2, 2]"), "{found}");
    text(weights.get("head", &[1, 2, 2]));
    text(weights.get("head", &[2, 1]));
    let scope = weights.scope("model.layers.0");
    text(scope.get("q.weight", &[3, 4]));
    text(scope.transposed("q.weight", &[4, 3]));
    text(scope.transposed("q.bias", &[4]));
    text(scope.fused(&[("q.weight", &[4, 3]), ("k.weight", &[4, 3])]));
    text(scope.fused(&[("q.weight", &[4, 3]), ("q.bias", &[4])]));
    text(scope.optional("q.bias", &[1]).map(Option::unwrap));
    assert!(matches!(scope.fused(&[]), Err(Error::Value { .. })));
    assert!(matches!(scope.get("absent", &[-1]), Err(Error::Value { .. })));
    let integers = weights.placed((Kind::Int64, Device::Cpu));
    assert!(matches!(integers.get("head", &[2, 2]), Err(Error::Kind { .. })));
    assert!(weights.finish_lenient(&[]).used.is_empty(), "what was refused was not used");
}

#[test]
fn names_have_alternatives() {
    let source = checkpoint(&[("transformer.wte", &[2]), ("wpe", &[3]), ("model.norm", &[4])]);
    let weights =
        Weights::new(&source, FLOAT).rename(prefixes(&[("model.", ""), ("model.", "transformer.")]));
    let model = weights.scope("model");
    let _ = model.get("wte", &[2]).unwrap();
    let _ = model.get("wpe", &[3]).unwrap();
    let _ = model.get("norm", &[4]).unwrap();
    let _ = model.get("absent", &[4]).unwrap();
    assert_eq!(model.find("wte").as_deref(), Some("transformer.wte"));
    let report = weights.finish_lenient(&[]);
    assert_eq!(report.used, ["model.norm", "transformer.wte", "wpe"]);
    assert_eq!(report.missing, ["model.absent"]);
    assert!(report.unexpected.is_empty());
}

#[test]
fn sources_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Safetensors>();
    #[cfg(feature = "gguf")]
    shared::<controlgen_core::gguf::Gguf>();
}
