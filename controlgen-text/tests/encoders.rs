//! Encoders, masked language models and classifiers against transformers, on small random models.
//!
//! The fixtures are made by `benches/reference/encoder_fixtures.py`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Cases, difference, folder};
use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights, save};
use controlgen_core::energy::Text;
use controlgen_core::{
    Classifier, EnableGrad, Encoder, EncoderInput, Error, MaskedLm, Pass, Placement, Reads, Result, Tokens,
};
use controlgen_text::models::{self, Bert, BertClassifier, BertInput, BertMaskedLm, Config, FramingTokens};
use tch::{Device, Kind, Tensor};

const ENCODERS: [&str; 5] =
    ["bert", "bert_masked_lm", "bert_classifier", "roberta_masked_lm", "roberta_classifier"];
const MASKED: [&str; 2] = ["bert_masked_lm", "roberta_masked_lm"];
const CLASSIFIERS: [&str; 2] = ["bert_classifier", "roberta_classifier"];
const CASES: [&str; 6] = ["plain", "right", "left", "masked", "types", "positions"];

fn loaded<T>(name: &str, load: impl FnOnce(&Config, &Weights<'_>) -> Result<T>) -> T {
    let config = Config::open(&folder(name).join("config.json")).unwrap();
    let source = Safetensors::open(folder(name)).unwrap();
    load(&config, &Weights::new(&source, Placement::CPU.options())).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn bert(name: &str) -> Bert {
    loaded(name, |config, weights| Bert::load(config, weights, Placement::CPU))
}

fn masked_lm(name: &str) -> BertMaskedLm {
    let tokens = FramingTokens { mask: 4, cls: None, sep: Some(2) };
    loaded(name, |config, weights| BertMaskedLm::load(config, weights, Placement::CPU, tokens))
}

fn classifier(name: &str) -> BertClassifier {
    loaded(name, |config, weights| BertClassifier::load(config, weights, Placement::CPU))
}

/// Runs every case of a fixture: its name, input and mask.
fn each_case(name: &str, mut run: impl FnMut(&str, &Cases, BertInput<'_>)) {
    let cases = Cases::open(name);
    for case in CASES {
        let get = |what: &str| cases.get(&format!("{case}.{what}"));
        let Some(ids) = get("input_ids") else { continue };
        let keep = get("attention_mask").map(|mask| mask.to_kind(Kind::Bool));
        let (types, positions) = (get("token_type_ids"), get("position_ids"));
        let input = BertInput {
            token_types: types.as_ref(),
            positions: positions.as_ref(),
            ..BertInput::new(Tokens::Ids(&ids), keep.as_ref())
        };
        run(case, &cases, input);
    }
}

#[test]
fn hidden_states_equal_transformers() {
    let _guard = tch::no_grad_guard();
    let (mut worst, mut count): (f64, usize) = (0.0, 0);
    for name in ENCODERS {
        let model = bert(name);
        each_case(name, |case, cases, input| {
            let found = model.forward(input, &Pass::default()).unwrap();
            let expected = cases.get(&format!("{case}.last_hidden_state")).unwrap();
            let diff = difference(&found.hidden, &expected, input.keep);
            assert!(diff <= 1e-4, "{name}, {case}: {diff}");
            let pooled = cases.get(&format!("{case}.pooler_output"));
            assert_eq!(found.pooled.is_some(), pooled.is_some(), "{name}, {case}");
            let pooled = found.pooled.zip(pooled).map_or(0.0, |(a, b)| difference(&a, &b, None));
            assert!(pooled <= 1e-4, "{name}, {case}, pooled: {pooled}");
            worst = worst.max(diff).max(pooled);
            count += 1;
        });
    }
    assert_eq!(count, 28, "cases that were there to run");
    println!("largest difference from transformers: {worst:.2e}");
}

#[test]
fn logits_of_gaps_equal_transformers() {
    let _guard = tch::no_grad_guard();
    let mut worst: f64 = 0.0;
    for name in MASKED {
        let model = masked_lm(name);
        each_case(name, |case, cases, input| {
            let found = model.forward(input, &Pass::default()).unwrap();
            let expected = cases.get(&format!("{case}.logits")).unwrap();
            let diff = difference(&found, &expected, input.keep);
            assert!(diff <= 1e-4, "{name}, {case}: {diff}");
            worst = worst.max(diff);
            if input.token_types.is_none() && input.positions.is_none() {
                let by_trait = MaskedLm::logits(&model, input.tokens, input.keep, &Pass::default()).unwrap();
                assert!(by_trait.equal(&found), "{name}, {case}");
            }
        });
        assert_eq!((model.mask(), &model.spec().eos[..]), (4, &[2][..]), "{name}");
        assert_eq!(model.spec().context, if name.starts_with("roberta") { 38 } else { 40 }, "{name}");
    }
    println!("largest difference from transformers: {worst:.2e}");
}

#[test]
fn logits_of_classes_equal_transformers() {
    let _guard = tch::no_grad_guard();
    let mut worst: f64 = 0.0;
    for name in CLASSIFIERS {
        let model = classifier(name);
        assert_eq!(model.classes(), ["bad", "so so", "good"], "{name}");
        let opened = models::open_classifier(&folder(name), Placement::CPU).unwrap();
        each_case(name, |case, cases, input| {
            let found = model.forward(input, &Pass::default()).unwrap();
            let expected = cases.get(&format!("{case}.logits")).unwrap();
            let diff = difference(&found, &expected, None);
            assert!(diff <= 1e-4, "{name}, {case}: {diff}");
            worst = worst.max(diff);
            if let (Tokens::Ids(ids), None, None) = (input.tokens, input.token_types, input.positions) {
                let ids = ids.shallow_clone();
                let keep = input.keep.map(Tensor::shallow_clone);
                assert!(opened.logits(&Text::Hard { ids, keep }).unwrap().equal(&found), "{name}, {case}");
            }
        });
    }
    println!("largest difference from transformers: {worst:.2e}");
}

/// Soft tokens that are sure of a token are that token, and the classes' logits have a gradient in them.
#[test]
fn soft_tokens_are_read_and_differentiable() {
    for name in CLASSIFIERS {
        let model = classifier(name);
        let ids = Cases::open(name).get("plain.input_ids").unwrap();
        let one_hot = ids.one_hot(53).to_kind(Kind::Float);
        let hard = model.logits(&Text::hard(ids.shallow_clone())).unwrap();
        let soft = model.logits(&Text::soft(one_hot.shallow_clone())).unwrap();
        assert!(difference(&soft, &hard, None) <= 1e-5, "{name}");

        let _gradients = EnableGrad::new();
        let leaf = one_hot.detach().set_requires_grad(true);
        let logit = |probs: Tensor| model.logits(&Text::soft(probs)).unwrap().select(1, 2);
        let gradient =
            &Tensor::run_backward(&[logit(leaf.shallow_clone()).sum(Kind::Float)], &[&leaf], false, false)[0];
        // Along a direction of its own in every row and position, by differences in f32.
        let direction = Tensor::arange(one_hot.numel() as i64, tch::kind::FLOAT_CPU).sin().view_as(&one_hot);
        let slope = (gradient * &direction).sum(Kind::Double).double_value(&[]);
        let at = |step: f64| logit(&one_hot + &direction * step).sum(Kind::Double).double_value(&[]);
        let (h, largest) = (1e-3, slope.abs().max(0.1));
        let expected = (at(h) - at(-h)) / (2.0 * h);
        assert!(
            (slope - expected).abs() <= 2e-2 * largest,
            "{name}: {slope} where differences say {expected}"
        );
    }
}

/// What a text says must not depend on what pads it, nor on which side.
#[test]
fn rows_do_not_see_padding_nor_each_other() {
    let _guard = tch::no_grad_guard();
    for name in ENCODERS {
        let (model, cases) = (bert(name), Cases::open(name));
        let ids = cases.get("right.input_ids").unwrap();
        let keep = cases.get("right.attention_mask").unwrap().to_kind(Kind::Bool);
        let whole = encode(&model, Tokens::Ids(&ids), Some(&keep));
        for row in 0..3 {
            let len = keep.get(row).sum(Kind::Int64).int64_value(&[]);
            let alone = ids.narrow(0, row, 1).narrow(1, 0, len);
            let alone = encode(&model, Tokens::Ids(&alone), None);
            let found = whole.narrow(0, row, 1).narrow(1, 0, len);
            assert!(difference(&found, &alone, None) <= 1e-5, "{name}, row {row}");
        }
        let table = model.embeddings().unwrap();
        let embeds = table.index_select(0, &ids.flatten(0, -1)).view([3, 9, -1]);
        let found = encode(&model, Tokens::Embeds(&embeds), Some(&keep));
        assert!(difference(&found, &whole, Some(&keep)) <= 1e-5, "{name}: embeddings are tokens");
    }
}

fn encode(model: &dyn Encoder, tokens: Tokens<'_>, keep: Option<&Tensor>) -> Tensor {
    model.encode(EncoderInput::Text { tokens, keep }, &Pass::default()).unwrap().hidden
}

#[test]
fn what_makes_no_sense_is_refused() {
    let _guard = tch::no_grad_guard();
    let model = models::open_encoder(&folder("roberta_masked_lm"), Placement::CPU).unwrap();
    assert_eq!(model.spec().reads, Reads::Text { vocab: 53, context: Some(38) });
    let run = |ids: &Tensor, keep: Option<&Tensor>| {
        model.encode(EncoderInput::Text { tokens: Tokens::Ids(ids), keep }, &Pass::default())
    };
    let ids = |t| Tensor::full([2, t], 7, (Kind::Int64, Device::Cpu));
    assert!(run(&ids(38), None).is_ok());
    assert!(matches!(run(&ids(39), None), Err(Error::Context { limit: 38, needed: 39 })));
    assert!(matches!(run(&(ids(3) + 50), None), Err(Error::Value { .. })));
    assert!(matches!(run(&ids(3).to_kind(Kind::Int), None), Err(Error::Kind { .. })));
    let keep = Tensor::from_slice(&[true, true, false, false]).view([2, 2]);
    assert!(matches!(run(&ids(2), Some(&keep)), Err(Error::Value { .. })), "a row of padding alone");
    assert!(matches!(run(&ids(3), Some(&keep)), Err(Error::Shape { .. })));
    let image = model.encode(EncoderInput::Image(&ids(2)), &Pass::default());
    assert!(matches!(image, Err(Error::Unsupported { .. })));
    let bert = bert("bert");
    for bad in [3, -1] {
        let (ids, types) = (ids(2), Tensor::full([2, 2], bad, (Kind::Int64, Device::Cpu)));
        let input = BertInput { token_types: Some(&types), ..BertInput::new(Tokens::Ids(&ids), None) };
        assert!(matches!(bert.forward(input, &Pass::default()), Err(Error::Value { .. })));
    }
    let classifier = classifier("bert_classifier");
    let narrow = Tensor::ones([1, 2, 52], tch::kind::FLOAT_CPU);
    assert!(matches!(classifier.logits(&Text::soft(narrow)), Err(Error::Shape { .. })));
}

/// config.json with one field changed, over the same weights.
fn changed(name: &str, field: &str, value: serde_json::Value) -> Config {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    fields.insert(field.into(), value);
    Config::from_fields("config.json", fields)
}

#[test]
fn configurations_that_are_not_served_are_refused() {
    let refused = |field: &str, value: serde_json::Value| {
        let source = Safetensors::open(folder("bert_classifier")).unwrap();
        let config = changed("bert_classifier", field, value);
        let weights = Weights::new(&source, Placement::CPU.options());
        BertClassifier::load(&config, &weights, Placement::CPU).err().unwrap()
    };
    for (field, value) in [
        ("model_type", "distilbert".into()),
        ("position_embedding_type", "relative_key".into()),
        ("is_decoder", true.into()),
        ("add_cross_attention", true.into()),
        ("problem_type", "multi_label_classification".into()),
    ] {
        assert!(matches!(refused(field, value), Error::Unsupported { .. }), "{field}");
    }
    for (field, value) in [
        ("num_attention_heads", 5.into()),
        ("hidden_size", 0.into()),
        ("layer_norm_eps", (-1.0).into()),
        ("pad_token_id", 53.into()),
        ("id2label", serde_json::json!({ "0": "a", "2": "b" })),
        ("id2label", serde_json::json!({})),
    ] {
        assert!(matches!(refused(field, value), Error::Config { .. }), "{field}");
    }
    let error = refused("id2label", serde_json::json!({ "0": "a", "1": "b" }));
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    // A masked language model has no classes.
    let error = models::open_classifier(&folder("bert_masked_lm"), Placement::CPU).err().unwrap();
    assert!(matches!(error, Error::Keys { .. }), "{error}");
    // Without a tokenizer nobody knows what stands for a gap.
    assert!(models::open_masked_lm(&folder("bert_masked_lm"), Placement::CPU).is_err());
}

/// A tied output that is stored all the same is shared; one that differs is used.
#[test]
fn an_output_of_its_own_is_used() {
    let _guard = tch::no_grad_guard();
    let name = "bert_masked_lm";
    let expected = Cases::open(name).get("plain.logits").unwrap();
    let ids = Cases::open(name).get("plain.input_ids").unwrap();
    let home = tempfile::tempdir().unwrap();
    let source = Safetensors::open(folder(name)).unwrap();
    for scale in [1.0, 2.0] {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for name in source.names() {
            let info = source.info(&name).unwrap();
            let mut tensor = Tensor::empty(info.shape, (info.kind, Device::Cpu));
            source.read(&name, &mut tensor).unwrap();
            tensors.push((name, tensor));
        }
        let (_, table) = tensors.iter().find(|(name, _)| name.ends_with("word_embeddings.weight")).unwrap();
        tensors.push(("cls.predictions.decoder.weight".into(), table * scale));
        let file = home.path().join(format!("{scale}.safetensors"));
        save(&file, &tensors, &[]).unwrap();
        let config = Config::open(&folder(name).join("config.json")).unwrap();
        let source = Safetensors::open(&file).unwrap();
        let weights = Weights::new(&source, Placement::CPU.options());
        let tokens = FramingTokens { mask: 4, ..FramingTokens::default() };
        let model = BertMaskedLm::load(&config, &weights, Placement::CPU, tokens).unwrap();
        let logits = model.logits(Tokens::Ids(&ids), None, &Pass::default()).unwrap();
        assert_eq!(difference(&logits, &expected, None) <= 1e-4, scale == 1.0, "scaled by {scale}");
    }
}
