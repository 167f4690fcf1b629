//! Checkpoints that are not the model that config.json describes.

use std::collections::BTreeSet;

use controlgen_core::checkpoint::{Safetensors, save};
use controlgen_core::{Error, LanguageModel, Placement, Result};
use controlgen_text::models;
use tch::{Kind, Tensor};

use crate::support::{fields, folder, load, refused, tensors, typed, weights};

/// One of each kind: stored transposed, with biases, with norms on queries and keys.
const MODELS: [&str; 4] = ["gpt2_relu_untied", "llama_biased", "qwen3", "gpt2_gelu_hub"];

/// The model `name` over other tensors.
fn with(name: &str, tensors: &[(String, Tensor)]) -> Result<Box<dyn LanguageModel>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&path, tensors, &[("format", "pt")]).unwrap();
    load(&fields(name, "config.json"), &Safetensors::open(&path)?)
}

/// Whether the model does without: the causal masks of old files.
fn ignored(name: &str) -> bool {
    name.ends_with(".attn.bias")
}

#[test]
fn a_missing_tensor_is_named() {
    for model in MODELS {
        let all = tensors(&weights(model));
        for i in 0..all.len() {
            let mut rest = copies(&all);
            let (name, _) = rest.remove(i);
            match with(model, &rest) {
                Ok(_) => assert!(ignored(&name), "{model} does without {name}"),
                Err(Error::Keys { missing, unexpected, .. }) => {
                    assert_eq!(unexpected, Vec::<String>::new(), "{model} without {name}");
                    assert_eq!(missing.len(), 1, "{model} without {name}: {missing:?}");
                    // The file may leave out a prefix.
                    assert!(missing[0].ends_with(&name), "{model} without {name}: {missing:?}");
                }
                Err(other) => panic!("{model} without {name}: {other}"),
            }
        }
    }
}

#[test]
fn all_that_is_missing_is_listed_at_once() {
    let all = tensors(&weights("llama_biased"));
    let names: BTreeSet<String> = all.iter().map(|(name, _)| name.clone()).collect();
    let Err(Error::Keys { missing, unexpected, .. }) =
        with("llama_biased", &[("x".into(), Tensor::from(1.0f32))])
    else {
        panic!("an empty checkpoint was accepted");
    };
    assert_eq!(missing.into_iter().collect::<BTreeSet<_>>(), names);
    assert_eq!(unexpected, ["x"]);
}

#[test]
fn an_unexpected_tensor_is_named() {
    for model in MODELS {
        for name in ["model.layers.9.mlp.up_proj.weight", "transformer.h.9.ln_1.weight", "x", "score.weight"]
        {
            let mut all = tensors(&weights(model));
            all.push((name.into(), Tensor::from_slice(&[1.0f32])));
            let error = refused(with(model, &all), &["1 unexpected", name]);
            assert!(matches!(error, Error::Keys { .. }));
        }
    }
}

/// Shapes of the same count, and shapes that would broadcast, are not taken for the right ones.
#[test]
fn shapes_are_exact() {
    for model in MODELS {
        let all = tensors(&weights(model));
        for (i, (name, tensor)) in all.iter().enumerate().filter(|(_, (name, _))| !ignored(name)) {
            let mut shapes =
                vec![tensor.flatten(0, -1).unsqueeze(0), tensor.unsqueeze(-1), tensor.narrow(0, 0, 1)];
            shapes.push(Tensor::cat(&[tensor, &tensor.narrow(0, 0, 1)], 0));
            shapes.push(tensor.narrow(0, 0, 0));
            shapes.push(Tensor::from(1.0f32).to_kind(tensor.kind()));
            if tensor.dim() == 2 && tensor.size()[0] != tensor.size()[1] {
                shapes.push(tensor.transpose(0, 1).contiguous());
            }
            for other in shapes {
                let mut changed = copies(&all);
                let (expected, found) = (format!("{:?}", tensor.size()), format!("{:?}", other.size()));
                changed[i].1 = other;
                let error = refused(with(model, &changed), &["model.safetensors", name, &expected, &found]);
                assert!(matches!(error, Error::Shape { .. }), "{error}");
            }
        }
    }
}

#[test]
fn integers_are_no_weights() {
    for model in MODELS {
        let all = tensors(&weights(model));
        for (i, (name, tensor)) in all.iter().enumerate().filter(|(_, (name, _))| !ignored(name)) {
            for kind in [Kind::Int64, Kind::Int8, Kind::Bool] {
                let mut changed = copies(&all);
                changed[i].1 = tensor.to_kind(kind);
                let error = refused(with(model, &changed), &[name]);
                assert!(matches!(error, Error::Kind { .. }), "{model}, {name}, {kind:?}: {error}");
            }
        }
        // Other floating types are read, rounded.
        let doubled: Vec<_> = all.iter().map(|(name, t)| (name.clone(), t.to_kind(Kind::Double))).collect();
        assert!(with(model, &doubled).is_ok());
    }
}

#[test]
fn shards() {
    let copy = || {
        let to = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(folder("llama_mha_untied")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
        }
        to
    };
    let open = |folder: &tempfile::TempDir| models::open(folder.path(), Placement::CPU);
    assert!(open(&copy()).is_ok());

    let gone = copy();
    std::fs::remove_file(gone.path().join("model-00002-of-00003.safetensors")).unwrap();
    refused(open(&gone), &["model-00002-of-00003.safetensors", "No such file"]);

    let edited = |from: &str, to: &str| {
        let folder = copy();
        let path = folder.path().join("model.safetensors.index.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        std::fs::write(&path, text.replace(from, to)).unwrap();
        refused(open(&folder), &[])
    };
    // A tensor in another file than the index says; a file outside of the folder; no index at all.
    edited("\"model.norm.weight\": \"model-00003", "\"model.norm.weight\": \"model-00001");
    edited("model-00003-of-00003.safetensors", "../model-00003-of-00003.safetensors");
    edited("model-00003-of-00003.safetensors", "/etc/hostname");
    edited("weight_map", "weight_maps");
    edited("\"model-00003-of-00003.safetensors\"", "7");
}

/// Truncated anywhere: the header or the tensors.
#[test]
fn truncated_files() {
    let bytes = std::fs::read(folder("mistral").join("model.safetensors")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    std::fs::copy(folder("mistral").join("config.json"), directory.path().join("config.json")).unwrap();
    let path = directory.path().join("model.safetensors");
    for len in (0..bytes.len()).step_by(397).chain([7, 8, 9, bytes.len() - 1]) {
        std::fs::write(&path, &bytes[..len]).unwrap();
        match models::open(directory.path(), Placement::CPU) {
            Ok(_) => panic!("{len} of {} bytes were enough", bytes.len()),
            Err(error) => typed(&error),
        }
    }
}

fn copies(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}
