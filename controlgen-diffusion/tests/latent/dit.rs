//! The diffusion transformer.

use controlgen_core::checkpoint::Weights;
use controlgen_core::testing::contract;
use controlgen_core::{
    Condition, Config, Denoiser, Error, Parameterisation, Pass, Placement, Result, SiteKind,
};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::Dit;
use serde_json::json;
use tch::{Kind, Tensor};

use super::support::{F64, altered, cases, config, distance, fixture, weights};

const MODELS: [&str; 2] = ["dit", "dit_old"];

fn load_as(config: &Config, name: &str, predicts: Predicts, placement: Placement) -> Result<Dit> {
    let source = weights(name);
    Dit::load(config, &Weights::new(&source, placement.options()), predicts, placement)
}

fn load(name: &str, placement: Placement) -> Dit {
    load_as(&config(name), name, Predicts::EPSILON, placement).unwrap()
}

fn conditions(labels: &Tensor, classes: i64) -> Vec<Condition> {
    let labels: Vec<i64> = labels.try_into().unwrap();
    labels.into_iter().map(|k| if k == classes { Condition::Null } else { Condition::Class(k) }).collect()
}

#[test]
fn outputs_are_diffusers() {
    let _no_gradients = tch::no_grad_guard();
    for name in MODELS {
        for (placement, limit) in [(Placement::CPU, 1e-5), (F64, 1e-5)] {
            let (model, tensors) = (load(name, placement), cases(name));
            for case in ["own", "none", "larger", "wide"] {
                let of = |field: &str| &tensors[&format!("{case}.{field}")];
                let conditions = conditions(of("class_labels"), model.config().num_embeds_ada_norm);
                let prepared = model.prepare(&conditions, &Pass::default()).unwrap();
                let made = model.predict(of("sample"), of("timestep"), &prepared, &Pass::default()).unwrap();
                assert_eq!(made.variance.is_some(), name == "dit", "{name}");
                let parts: Vec<&Tensor> = std::iter::once(&made.value).chain(&made.variance).collect();
                let far = distance(&Tensor::cat(&parts, 1), of("output"));
                assert!(far < limit, "{name}, {case}, {:?}: {far}", placement.kind);
            }
        }
    }
}

#[test]
fn it_keeps_the_contract() {
    let conditions = || [Condition::Class(1), Condition::Null, Condition::Class(3)];
    for name in MODELS {
        contract::denoiser(&load(name, F64), &conditions(), &[900.0, 13.5]).unwrap();
        contract::denoiser(&load(name, Placement::CPU), &conditions()[1..], &[0.0, 999.0]).unwrap();
    }
}

#[test]
fn what_it_predicts_is_told() {
    let v = Predicts { parameterisation: Parameterisation::V, learned_variance: false };
    let model = load_as(&config("dit"), "dit", v, Placement::CPU).unwrap();
    assert_eq!(model.spec().parameterisation, Parameterisation::V);
    assert!(model.spec().learned_variance, "six channels out of three in");
    assert_eq!((model.spec().channels, model.spec().multiple, model.spec().size), (3, 2, [8, 8]));
    let learned = Predicts { learned_variance: true, ..v };
    assert!(matches!(
        load_as(&config("dit_old"), "dit_old", learned, Placement::CPU),
        Err(Error::Value { .. })
    ));
}

#[test]
fn sites_have_the_names_of_diffusers() {
    let model = load("dit", Placement::CPU);
    for (kind, name) in [
        (SiteKind::Conv, "pos_embed.proj"),
        (SiteKind::Linear, "transformer_blocks.1.attn1.to_q"),
        (SiteKind::Linear, "transformer_blocks.1.attn1.to_out.0"),
        (SiteKind::Linear, "transformer_blocks.0.norm1.linear"),
        (SiteKind::Linear, "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"),
        (SiteKind::Embedding, "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"),
        (SiteKind::Linear, "transformer_blocks.1.ff.net.0.proj"),
        (SiteKind::Attention, "transformer_blocks.1.attn1"),
        (SiteKind::Hidden, "transformer_blocks.1.ff"),
        (SiteKind::Linear, "proj_out_1"),
    ] {
        assert_eq!(model.sites().select(kind, name).unwrap().len(), 1, "{name}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let model = load("dit", Placement::CPU);
    let refused = |condition| model.prepare(&[condition], &Pass::default()).err().unwrap();
    assert!(matches!(refused(Condition::Class(5)), Error::Value { .. }), "the row of no class is Null's");
    assert!(matches!(refused(Condition::Features(vec![])), Error::Unsupported { .. }));
    let prepared = model.prepare(&[Condition::Null], &Pass::default()).unwrap();
    let x = Tensor::zeros([1, 3, 8, 7], (Kind::Float, tch::Device::Cpu));
    let odd =
        model.predict(&x, &Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)), &prepared, &Pass::default());
    assert!(matches!(odd, Err(Error::Shape { .. })));

    let load = |fields: &[_]| {
        load_as(&altered("dit", fields), "dit", Predicts::EPSILON, Placement::CPU).err().unwrap()
    };
    for (field, value) in [
        ("_class_name", json!("UNet2DModel")),
        ("norm_type", json!("ada_norm_single")),
        ("activation_fn", json!("geglu")),
        ("cross_attention_dim", json!(64)),
        ("double_self_attention", json!(true)),
    ] {
        let error = load(&[(field, value)]);
        assert!(matches!(error, Error::Unsupported { .. }), "{field}: {error}");
    }
    for (field, value) in [
        ("attention_head_dim", json!(7)),
        ("out_channels", json!(5)),
        ("sample_size", json!(9)),
        ("num_layers", json!(0)),
        ("norm_eps", json!(-1.0)),
        ("patch_size", json!("two")),
    ] {
        let error = load(&[(field, value)]);
        assert!(matches!(error, Error::Config { .. }), "{field}: {error}");
    }
    assert!(matches!(load(&[("num_layers", json!(3))]), Error::Keys { missing, .. } if missing.len() == 19));
    assert!(
        matches!(load(&[("num_layers", json!(1))]), Error::Keys { unexpected, .. } if unexpected.len() == 19)
    );
    assert!(matches!(load(&[("num_embeds_ada_norm", json!(6))]), Error::Shape { .. }));
    assert!(fixture("dit").exists());
}
