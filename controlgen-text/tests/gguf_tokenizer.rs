//! Tokenizers from GGUF metadata, against the tokenizers library and sentencepiece
//! (`benches/reference/tokenizer_fixtures.py`).
#![cfg(feature = "gguf")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use controlgen_core::gguf::Gguf;
use controlgen_core::{Error, Result};
use controlgen_text::chat::{ChatOptions, Message};
use controlgen_text::tokenizer::{Special, Tokenizer};
use serde_json::{Value, json};

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/gguf.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A GGUF file of metadata alone. Whole numbers are written as i32, others as f32.
fn gguf(metadata: &[(String, Value)]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn kind(value: &Value) -> u32 {
        match value {
            Value::Number(number) if number.is_i64() => 5,
            Value::Number(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => 9,
            other => panic!("{other}"),
        }
    }
    fn content(out: &mut Vec<u8>, value: &Value) {
        match value {
            Value::Number(number) if number.is_i64() => {
                out.extend(i32::try_from(number.as_i64().unwrap()).unwrap().to_le_bytes());
            }
            Value::Number(number) => out.extend((number.as_f64().unwrap() as f32).to_le_bytes()),
            Value::Bool(value) => out.push(u8::from(*value)),
            Value::String(value) => text(out, value),
            Value::Array(items) => {
                out.extend(items.first().map_or(8, kind).to_le_bytes());
                out.extend((items.len() as u64).to_le_bytes());
                items.iter().for_each(|item| content(out, item));
            }
            other => panic!("{other}"),
        }
    }
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(kind(value).to_le_bytes());
        content(&mut out, value);
    }
    out
}

/// Metadata of a vocabulary of the fixture, with further keys: `null` removes one.
fn metadata(vocabulary: &Value, more: &[(&str, Value)]) -> Vec<(String, Value)> {
    let mut all: Vec<(String, Value)> = ["tokens", "token_type", "merges", "scores"]
        .into_iter()
        .filter_map(|key| Some((format!("tokenizer.ggml.{key}"), vocabulary.get(key)?.clone())))
        .collect();
    for (key, value) in more {
        let key = if key.contains('.') { (*key).to_owned() } else { format!("tokenizer.ggml.{key}") };
        all.retain(|(known, _)| *known != key);
        if !value.is_null() {
            all.push((key, value.clone()));
        }
    }
    all
}

fn open(metadata: &[(String, Value)]) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, gguf(metadata)).unwrap();
    Tokenizer::from_gguf(&Gguf::open(&path)?)
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn assert_cases(tokenizer: &Tokenizer, cases: &Value, name: &str) {
    assert!(cases.as_array().unwrap().len() > 50, "{name}");
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Special::Keep).unwrap(), ids(&case["ids"]), "{name}: {text:?}");
    }
}

#[test]
fn each_pre_tokenizer_splits_as_its_models_do() {
    let vocabulary = &fixture()["byte_level"];
    for (pre, same_as) in [
        ("gpt-2", "gpt-2"),
        ("default", "gpt-2"),
        ("smollm", "smollm"),
        ("starcoder", "smollm"),
        ("llama-bpe", "llama-bpe"),
        ("qwen2", "qwen2"),
    ] {
        let tokenizer =
            open(&metadata(vocabulary, &[("model", "gpt2".into()), ("pre", pre.into())])).unwrap();
        assert_cases(&tokenizer, &vocabulary["cases"][same_as], pre);
        // Written and read again.
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        assert_cases(&Tokenizer::open(folder.path()).unwrap(), &vocabulary["cases"][same_as], pre);
    }
}

#[test]
fn scores_merge_as_sentencepiece_does() {
    let vocabulary = &fixture()["pieces"];
    let base = [("model", "llama".into()), ("bos_token_id", 1.into()), ("eos_token_id", 2.into())];
    let tokenizer = open(&metadata(vocabulary, &base)).unwrap();
    assert_cases(&tokenizer, &vocabulary["cases"], "pieces");
    // A BOS token is added unless the file says otherwise; an EOS token only if it says so.
    assert_eq!(tokenizer.encode("", Special::Add).unwrap(), [1]);
    let text = "naïve 12";
    let plain = tokenizer.encode(text, Special::Keep).unwrap();
    let framed = [&[1], plain.as_slice(), &[2]].concat();
    for (add_bos, add_eos) in [(true, true), (false, true), (false, false), (true, false)] {
        let more =
            [&base[..], &[("add_bos_token", add_bos.into()), ("add_eos_token", add_eos.into())]].concat();
        let tokenizer = open(&metadata(vocabulary, &more)).unwrap();
        let expected = &framed[usize::from(!add_bos)..framed.len() - usize::from(!add_eos)];
        assert_eq!(tokenizer.encode(text, Special::Add).unwrap(), expected);
        assert_eq!(tokenizer.encode(text, Special::Keep).unwrap(), plain);
        assert_eq!(tokenizer.decode(expected, true).unwrap(), text);
    }
    // Without the space in front, the text's own first space stays.
    let more = [&base[..], &[("add_space_prefix", false.into())]].concat();
    let bare = open(&metadata(vocabulary, &more)).unwrap();
    assert_eq!(bare.encode(" naïve 12", Special::Keep).unwrap(), plain);
    assert_eq!(bare.decode(&plain, true).unwrap(), " naïve 12");
}

#[test]
fn special_tokens_and_templates_are_read() {
    let vocabulary = &fixture()["byte_level"];
    let last = vocabulary["tokens"].as_array().unwrap().len() as i64 - 1;
    let tokenizer = open(&metadata(
        vocabulary,
        &[
            ("model", "gpt2".into()),
            ("pre", "llama-bpe".into()),
            ("bos_token_id", 0.into()),
            ("eos_token_id", 2.into()),
            ("eot_token_id", 1.into()),
            ("padding_token_id", 2.into()),
            ("general.architecture", "llama".into()),
            ("llama.context_length", 4096.into()),
            ("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into()),
            ("tokenizer.chat_templates", json!(["short"])),
            ("tokenizer.chat_template.short", "s".into()),
        ],
    ))
    .unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(0), &[2, 1][..], Some(2)));
    assert_eq!(tokenizer.vocab_size(), last + 1);
    assert!(
        (0..3).all(|id| tokenizer.is_special(id)) && !tokenizer.is_special(3) && !tokenizer.is_special(last)
    );
    // Llama 3 begins a text with its BOS token, stated or not.
    let ids = tokenizer.encode("a<think><|turn|>", Special::Add).unwrap();
    assert_eq!((ids[0], ids[2], ids[3]), (0, last, 2));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<think>");
    let template = tokenizer.chat_template().unwrap().unwrap();
    let text = |options: ChatOptions| template.render(&[Message::user("hi")], &options).unwrap();
    assert_eq!(text(ChatOptions::new()), "<|begin|>hi<|turn|>");
    assert_eq!(text(ChatOptions::new().template("short")), "s");
    let config: Value = serde_json::from_str(&tokenizer.config_json()).unwrap();
    assert_eq!(
        (config["model_max_length"].as_i64(), config["eos_token"].as_str()),
        (Some(4096), Some("<|turn|>"))
    );
}

#[test]
fn metadata_that_makes_no_sense_is_refused() {
    let fixture = fixture();
    let (byte_level, pieces) = (&fixture["byte_level"], &fixture["pieces"]);
    let gpt2 = ("model", Value::from("gpt2"));
    let llama = ("model", Value::from("llama"));
    let size = byte_level["tokens"].as_array().unwrap().len();
    let with = |vocabulary: &Value, more: &[(&str, Value)]| open(&metadata(vocabulary, more)).map(|_| ());
    for (result, field) in [
        (with(byte_level, &[]), "model"),
        (with(byte_level, &[("model", 3.into())]), "model"),
        (with(byte_level, &[gpt2.clone(), ("tokens", Value::Null)]), "tokens"),
        (with(byte_level, &[gpt2.clone(), ("tokens", json!([1, 2]))]), "tokens"),
        (with(byte_level, &[gpt2.clone(), ("merges", Value::Null)]), "merges"),
        (with(byte_level, &[gpt2.clone(), ("merges", json!(["a"]))]), "merges"),
        (with(byte_level, &[gpt2.clone(), ("merges", json!(["a "]))]), "merges"),
        (with(byte_level, &[gpt2.clone(), ("merges", json!(["a aaaaaaaaaaaaaaaaaaaaaaaaaaaa"]))]), "merges"),
        (with(byte_level, &[gpt2.clone(), ("token_type", json!([1]))]), "token_type"),
        (with(byte_level, &[gpt2.clone(), ("token_type", json!(vec![7; size]))]), "token_type"),
        (with(byte_level, &[gpt2.clone(), ("bos_token_id", size.into())]), "bos_token_id"),
        (with(byte_level, &[gpt2.clone(), ("eos_token_id", (-1).into())]), "eos_token_id"),
        (with(byte_level, &[gpt2.clone(), ("eot_token_id", "x".into())]), "eot_token_id"),
        (with(byte_level, &[gpt2.clone(), ("add_bos_token", 1.into())]), "add_bos_token"),
        (with(pieces, &[llama.clone(), ("scores", Value::Null)]), "scores"),
        (with(pieces, &[llama.clone(), ("scores", json!([0.5]))]), "scores"),
    ] {
        match result {
            Err(Error::Config { field: found, .. }) => assert_eq!(found, format!("tokenizer.ggml.{field}")),
            other => panic!("{field}: {other:?}"),
        }
    }
    let mut twice = byte_level["tokens"].clone();
    twice[9] = twice[8].clone();
    assert!(matches!(with(byte_level, &[gpt2.clone(), ("tokens", twice)]), Err(Error::Config { .. })));
    let mut long = pieces["tokens"].clone();
    long[600] = "x".repeat(2000).into();
    assert!(matches!(with(pieces, &[llama, ("tokens", long)]), Err(Error::Config { .. })));
    for more in [[("model", Value::from("bert")), gpt2.clone()], [gpt2, ("pre", Value::from("chameleon"))]] {
        let more = if more[0].1 == "bert" { &more[..1] } else { &more[..] };
        let error = with(byte_level, more).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("gpt"), "{error}");
    }
}
