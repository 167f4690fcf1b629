//! Sentence embeddings of a small random BERT, against the formula over its hidden states.
//!
//! `benches/src/bin/sentence-parity.rs` holds a real one to transformers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;

use common::{difference, folder};
use controlgen_core::{EncoderInput, Error, Pass, Placement, Tokens};
use controlgen_text::{Pooling, SentenceEncoder, models};
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tempfile::TempDir;

const TEXTS: [&str; 4] = ["w7 w9 w30", "w8", "w40 w41 w42 w43 w44 w45 w46", "w9 w7 w30"];

/// The `bert` fixture with a tokenizer of 53 words, as sentence-transformers writes a directory.
fn directory(modules: &Value, pooling: &Value) -> TempDir {
    let home = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder("bert").join(file), home.path().join(file)).unwrap();
    }
    let special = ["[PAD]", "[UNK]", "[SEP]", "[CLS]"];
    let name = |id: usize| special.get(id).map_or_else(|| format!("w{id}"), |token| (*token).to_owned());
    let vocab: serde_json::Map<String, Value> = (0..53).map(|id| (name(id), json!(id))).collect();
    let added: Vec<Value> = (0..4)
        .map(|id| {
            json!({ "id": id, "content": name(id), "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    let token = |name: &str| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let entry = |name: &str, id: i64| json!({ "id": name, "ids": [id], "tokens": [name] });
    let tokenizer = json!({
        "version": "1.0", "truncation": { "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right" },
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null,
        "post_processor": { "type": "TemplateProcessing",
            "single": [token("[CLS]"), { "Sequence": { "id": "A", "type_id": 0 } }, token("[SEP]")],
            "pair": [token("[CLS]"), { "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "[CLS]": entry("[CLS]", 3), "[SEP]": entry("[SEP]", 2) } },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
    });
    let write = |name: &str, value: &Value| fs::write(home.path().join(name), value.to_string()).unwrap();
    write("tokenizer.json", &tokenizer);
    write(
        "tokenizer_config.json",
        &json!({ "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]" }),
    );
    write("sentence_bert_config.json", &json!({ "max_seq_length": 7 }));
    if !modules.is_null() {
        write("modules.json", modules);
        fs::create_dir(home.path().join("1_Pooling")).unwrap();
        write("1_Pooling/config.json", pooling);
    }
    home
}

fn module(name: &str, path: &str) -> Value {
    json!({ "idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{name}") })
}

fn usual() -> Value {
    json!([module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")])
}

fn mean() -> Value {
    json!({ "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false })
}

fn open(modules: &Value, pooling: &Value) -> Result<SentenceEncoder, Error> {
    SentenceEncoder::open(directory(modules, pooling).path(), Placement::CPU)
}

/// The hidden states of a text by itself, `[T, D]`.
fn hidden(ids: &[i64]) -> Tensor {
    let encoder = models::open_encoder(&folder("bert"), Placement::CPU).unwrap();
    let ids = Tensor::from_slice(ids).unsqueeze(0);
    let input = EncoderInput::Text { tokens: Tokens::Ids(&ids), keep: None };
    encoder.encode(input, &Pass::default()).unwrap().hidden.get(0)
}

/// Each text alone, pooled as the definition says.
#[test]
fn embeddings_are_pooled_states() {
    let _guard = tch::no_grad_guard();
    let encoder = open(&usual(), &mean()).unwrap();
    assert_eq!(encoder.encode(TEXTS[0]).unwrap(), [3, 7, 9, 30, 2]);
    // Five of seven words are left between the tokens of the frame.
    assert_eq!(encoder.encode(TEXTS[2]).unwrap(), [3, 40, 41, 42, 43, 44, 2]);
    let of_each = |pool: &dyn Fn(Tensor) -> Tensor| -> Tensor {
        let rows: Vec<Tensor> =
            TEXTS.iter().map(|text| pool(hidden(&encoder.encode(text).unwrap()))).collect();
        Tensor::stack(&rows, 0)
    };
    let mean = |h: Tensor| h.mean_dim(&[0i64][..], false, Kind::Float);
    let unit = |v: Tensor| &v / v.norm();
    let found = encoder.embed(&TEXTS).unwrap();
    assert!(difference(&found, &of_each(&|h| unit(mean(h))), None) <= 1e-5);
    let plain = encoder.handle().normalise(false);
    assert!(difference(&plain.embed(&TEXTS).unwrap(), &of_each(&mean), None) <= 1e-5);
    let cls = encoder.handle().normalise(false).pooling(Pooling::Cls).embed(&TEXTS).unwrap();
    assert!(difference(&cls, &of_each(&|h| h.get(0)), None) <= 1e-5);
    let max = encoder.handle().normalise(false).pooling(Pooling::Max).embed(&TEXTS).unwrap();
    assert!(difference(&max, &of_each(&|h| h.amax(&[0i64][..], false)), None) <= 1e-5);
    // More texts than a batch holds come back in their order.
    let many: Vec<&str> = TEXTS.iter().copied().cycle().take(90).collect();
    let many = encoder.embed(&many).unwrap();
    let every: Vec<i64> = (0..90).map(|i| i % 4).collect();
    assert!(difference(&many, &found.index_select(0, &Tensor::from_slice(&every)), None) <= 1e-5);
}

#[test]
fn configurations_are_read_or_refused() {
    let text = ["w7 w9 w30"];
    let embed = |modules: &Value, pooling: &Value| open(modules, pooling).unwrap().embed(&text).unwrap();
    let whole = embed(&Value::Null, &Value::Null);
    let unnormalised = json!([module("Transformer", ""), module("Pooling", "1_Pooling")]);
    assert!(embed(&unnormalised, &mean()).equal(&whole), "without modules.json: the mean");
    assert!(embed(&unnormalised, &json!({ "pooling_mode": "mean" })).equal(&whole));
    assert!(!embed(&unnormalised, &json!({ "pooling_mode": "cls" })).equal(&whole));
    for (modules, pooling) in [
        (json!([module("Transformer", ""), module("Dense", "2_Dense")]), mean()),
        (json!([module("Transformer", "0_Transformer")]), mean()),
        (usual(), json!({ "pooling_mode_mean_sqrt_len_tokens": true })),
        (usual(), json!({ "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true })),
        (usual(), json!({})),
        (usual(), json!({ "pooling_mode": "lasttoken" })),
    ] {
        let error = open(&modules, &pooling).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    assert!(matches!(open(&json!({}), &mean()), Err(Error::Format { .. })));
    let encoder = open(&usual(), &mean()).unwrap();
    assert!(matches!(encoder.embed::<&str>(&[]), Err(Error::Value { .. })));
    for bad in [0, 41] {
        assert!(matches!(encoder.handle().max_tokens(bad), Err(Error::Value { .. })));
    }
}
