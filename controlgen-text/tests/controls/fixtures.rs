//! Against transformers' logits processors: the same scores, the same tokens banned.

use std::collections::HashMap;
use std::path::Path;

use controlgen_core::TokenControls;
use controlgen_text::controls::*;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{after, assert_near, rows};

fn fixtures() -> (HashMap<String, Tensor>, Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/processors");
    let tensors = Tensor::read_safetensors(folder.join("processors.safetensors")).unwrap();
    let index = std::fs::read_to_string(folder.join("processors.json")).unwrap();
    (tensors.into_iter().collect(), serde_json::from_str(&index).unwrap())
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// The stack of a generation configuration, in the order in which transformers' generate builds it.
fn stack(p: &Value) -> TokenControls {
    let mut stack = TokenControls::new();
    let number = |name: &str| p.get(name).and_then(Value::as_f64);
    let whole = |name: &str| p.get(name).and_then(Value::as_u64).filter(|&n| n > 0).map(|n| n as usize);
    if let Some(biases) = p.get("sequence_bias").and_then(Value::as_array) {
        let biases = biases.iter().map(|pair| (ids(&pair[0]), pair[1].as_f64().unwrap()));
        stack.push(LogitBias::sequences(biases).unwrap());
    }
    if let Some(penalty) = number("repetition_penalty") {
        stack.push(RepetitionPenalty::new(penalty).unwrap());
    }
    if let Some(n) = whole("no_repeat_ngram_size") {
        stack.push(NoRepeatNgram::new(n).unwrap());
    }
    if let Some(words) = p.get("bad_words_ids").and_then(Value::as_array) {
        stack.push(BannedWords::new(words.iter().map(ids)).unwrap());
    }
    if let Some(n) = whole("min_length") {
        stack.push(MinLength::total(n, ids(&p["eos_token_id"])).unwrap());
    }
    if let Some(n) = whole("min_new_tokens") {
        stack.push(MinLength::new(n, ids(&p["eos_token_id"])).unwrap());
    }
    if let Some(temperature) = number("temperature") {
        stack.push(Temperature::new(temperature).unwrap());
    }
    if let Some(k) = whole("top_k") {
        stack.push(TopK::new(k).unwrap());
    }
    if let Some(p) = number("top_p") {
        stack.push(TopP::new(p).unwrap());
    }
    if let Some(p) = number("min_p") {
        stack.push(MinP::new(p).unwrap());
    }
    if let Some(mass) = number("typical_p") {
        stack.push(Typical::new(mass).unwrap());
    }
    if let Some(epsilon) = number("epsilon_cutoff") {
        stack.push(EpsilonCutoff::new(epsilon).unwrap());
    }
    if let Some(epsilon) = number("eta_cutoff") {
        stack.push(EtaCutoff::new(epsilon).unwrap());
    }
    stack
}

#[test]
fn controls_give_what_transformers_gives() {
    let (tensors, index) = fixtures();
    let history: Vec<Vec<i64>> = (&tensors["input_ids"].to_kind(Kind::Int64)).try_into().unwrap();
    let cases = index["cases"].as_array().unwrap();
    assert!(cases.len() > 60, "{} cases", cases.len());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let parameters = &case["parameters"];
        let logits = &tensors[case["input"].as_str().unwrap()];
        let expected = rows(&tensors[case["output"].as_str().unwrap()]);
        let length = history[0].len();
        let splits = match parameters.get("prompt_length").and_then(Value::as_u64) {
            Some(n) => vec![n as usize],
            // Where the prompt ends must not matter.
            None => vec![1, length - 2, length],
        };
        for split in splits {
            let (prompts, generated): (Vec<_>, Vec<_>) =
                history.iter().map(|row| (row[..split].to_vec(), row[split..].to_vec())).unzip();
            let found = if case["kind"] == "repetition_penalty_normalised" {
                let penalty = parameters["repetition_penalty"].as_f64().unwrap();
                let control = RepetitionPenalty::new(penalty).unwrap().normalised();
                after(&control, &prompts, &generated, logits)
            } else {
                let stack = stack(parameters);
                assert!(!stack.is_empty(), "{name}");
                after(&stack, &prompts, &generated, logits)
            };
            for (row, (found, expected)) in rows(&found.unwrap()).iter().zip(&expected).enumerate() {
                assert_near(&format!("{name}, prompt of {split}, row {row}"), found, expected, 1e-5);
            }
        }
    }
}
