//! SmolLM2's tokenizer against transformers (`benches/reference/smollm2_truth.py`). It fails where the model is not
//! there; `cargo xtask setup` fetches it.
#![cfg(feature = "gguf")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use controlgen_core::gguf::Gguf;
use controlgen_text::chat::{ChatOptions, Message};
use controlgen_text::tokenizer::{Special, TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../.controlgen/models/smollm2-135m-instruct");
        let path: PathBuf = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
        assert!(path.exists(), "{} is not there: run `cargo xtask setup`", path.display());
        Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap()
    })
}

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn assert_strings(tokenizer: &Tokenizer) {
    let cases = fixture("strings.json");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 1000);
    let differ: Vec<&str> = cases
        .iter()
        .filter(|case| {
            tokenizer.encode(case["text"].as_str().unwrap(), Special::Add).unwrap() != ids(&case["ids"])
        })
        .map(|case| case["text"].as_str().unwrap())
        .collect();
    println!("{} of {} texts have transformers' ids", cases.len() - differ.len(), cases.len());
    assert!(differ.is_empty(), "{differ:?}");
}

#[test]
fn a_thousand_texts_have_transformers_ids() {
    let tokenizer = tokenizer();
    assert_strings(tokenizer);
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let again = Tokenizer::open(folder.path()).unwrap();
    assert_strings(&again);
    assert_eq!(
        (again.bos(), again.eos(), again.pad(), again.vocab_size()),
        (Some(1), &[2][..], Some(2), 49152)
    );
}

#[test]
fn ids_are_decoded_as_by_transformers() {
    let tokenizer = tokenizer();
    for case in fixture("decode.json").as_array().unwrap() {
        let ids = ids(&case["ids"]);
        for (skip, field) in [(false, "text"), (true, "text_without_special")] {
            assert_eq!(tokenizer.decode(&ids, skip).unwrap(), case[field].as_str().unwrap(), "{ids:?}");
        }
    }
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let tokenizer = tokenizer();
    let (template, fixture) = (tokenizer.chat_template().unwrap().unwrap(), fixture("chat.json"));
    for case in fixture["cases"].as_array().unwrap() {
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message::from_json(message.clone()).unwrap())
            .collect();
        let options = ChatOptions::new().generation_prompt(case["add_generation_prompt"].as_bool().unwrap());
        let text = template.render(&messages, &options).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text, Special::Keep).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn bytes_of_tokens_make_the_text() {
    let tokenizer = tokenizer();
    for case in fixture("strings.json").as_array().unwrap() {
        let ids = ids(&case["ids"]);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect();
        assert_eq!(String::from_utf8_lossy(&bytes), tokenizer.decode(&ids, false).unwrap());
    }
}

proptest! {
    #[test]
    fn streams_give_what_decoding_gives(ids in proptest::collection::vec(0..49152i64, 0..80), skip: bool) {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(tokenizer, skip);
        let mut text = String::new();
        for &id in &ids {
            text += &stream.push(id).unwrap();
        }
        prop_assert_eq!(text + &stream.finish().unwrap(), tokenizer.decode(&ids, skip).unwrap());
    }
}
