//! SmolLM2-135M-Instruct against transformers: token ids, logits, greedy continuations.
//!
//! The truth is made by `benches/reference/smollm2_truth.py`; the model is what `cargo xtask setup` fetches, which
//! `cargo xtask test` does first. Without it these tests fail: skipped, they would show nothing.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use controlgen_core::{LanguageModel, LmInput, Pass, Placement, Source};
use controlgen_text::search::Finish;
use controlgen_text::tokenizer::{Special, Tokenizer};
use controlgen_text::{TextModel, models};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.controlgen/models/smollm2-135m-instruct");
const TRUTH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../controlgen-text/tests/fixtures/smollm2");
/// How far logits may be from transformers'.
const NEAR: f64 = 2e-3;
/// Where transformers itself is this undecided between its two best tokens, either may follow.
const UNDECIDED: f64 = 1e-4;

fn part_of_the_model(name: &str) -> PathBuf {
    let path = Path::new(MODEL).join(name);
    assert!(
        path.exists(),
        "{} is not there: run `cargo xtask setup`, which fetches the model",
        path.display()
    );
    path
}

/// The weights rounded to bf16, as a Hugging Face directory.
fn directory() -> PathBuf {
    part_of_the_model("hf/model.safetensors").parent().unwrap().to_owned()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(Path::new(TRUTH).join(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// The prompts of a part of prompts.json, in token ids.
fn prompts(part: &str) -> Vec<Vec<i64>> {
    json("prompts.json")[part].as_array().unwrap().iter().map(|prompt| ids(&prompt["ids"])).collect()
}

/// The tensors of truth.safetensors, as numbers.
struct Truth(BTreeMap<String, Vec<f64>>);

impl Truth {
    fn read() -> Self {
        let bytes = fs::read(Path::new(TRUTH).join("truth.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let numbers = |dtype, data: &[u8]| match dtype {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            other => panic!("{other:?}"),
        };
        Self(file.iter().map(|(name, t)| (name.to_owned(), numbers(t.dtype(), t.data()))).collect())
    }

    fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in truth.safetensors"))
    }

    fn ids(&self, name: &str) -> Vec<i64> {
        self.get(name).iter().map(|&id| id as i64).collect()
    }
}

fn largest(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// Largest differences from the truth: of logits; of the prompt's log-probabilities, and their mean.
fn differences(lm: &dyn LanguageModel, truth: &Truth, variant: &str) -> (f64, f64, f64) {
    let _guard = tch::no_grad_guard();
    let (mut logit, mut logprob, mut sum, mut count): (f64, f64, f64, usize) = (0.0, 0.0, 0.0, 0);
    let index = |name: &str| Tensor::from_slice(&truth.ids(name));
    for (n, prompt) in prompts("logits").iter().enumerate() {
        let name = |part: &str| format!("{variant}.logits.{n}.{part}");
        let input = Tensor::from_slice(prompt).unsqueeze(0);
        let mut state = lm.start(Source::Rows(1), &Pass::default()).unwrap();
        let logits = lm.forward(LmInput::ids(&input), &mut state, &Pass::default()).unwrap().logits;
        let logits = logits.get(0).to_kind(Kind::Float); // (T, V)
        let last = logits.get(-1);
        for (part, at) in [("columns", index("columns")), ("top_values", index(&name("top_ids")))] {
            logit = logit.max(largest(&numbers(&last.index_select(0, &at)), truth.get(&name(part))));
        }
        logit = logit.max(largest(&numbers(&last.logsumexp(0i64, false)), truth.get(&name("logsumexp"))));
        let len = prompt.len() as i64 - 1;
        let next = input.get(0).narrow(0, 1, len).unsqueeze(1);
        let said = logits.narrow(0, 0, len).log_softmax(-1, None).gather(1, &next, false);
        let (said, expected) = (numbers(&said), truth.get(&name("prompt_logprobs")));
        logprob = logprob.max(largest(&said, expected));
        sum += said.iter().zip(expected).map(|(a, b)| (a - b).abs()).sum::<f64>();
        count += said.len();
    }
    (logit, logprob, sum / count as f64)
}

#[test]
fn a_thousand_texts_have_transformers_ids() {
    let tokenizer = Tokenizer::open(directory()).unwrap();
    let cases = json("strings.json");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 1000);
    let text = |case: &Value| case["text"].as_str().unwrap().to_owned();
    let differ: Vec<String> = cases
        .iter()
        .filter(|case| tokenizer.encode(&text(case), Special::Add).unwrap() != ids(&case["ids"]))
        .map(text)
        .collect();
    println!("{} of {} texts have transformers' ids", cases.len() - differ.len(), cases.len());
    assert!(differ.is_empty(), "{differ:?}");
}

/// Of the directory, in f32 and bf16 arithmetic.
#[test]
fn logits_of_the_directory_are_transformers() {
    let (folder, truth) = (directory(), Truth::read());
    let lm = models::open(&folder, Placement::CPU).unwrap();
    let (logit, logprob, _) = differences(&*lm, &truth, "bf16_weights");
    println!("f32: logits differ by {logit:.1e}, log-probabilities of prompts by {logprob:.1e}");
    assert!(logit <= NEAR && logprob <= NEAR, "{logit}, {logprob}");

    let bf16 = models::open(&folder, Placement::new(Device::Cpu, Kind::BFloat16)).unwrap();
    let (logit, logprob, mean) = differences(&*bf16, &truth, "bf16_weights");
    println!(
        "bf16: logits differ by {logit:.2}, log-probabilities of prompts by {logprob:.2}, {mean:.3} in the mean"
    );
    // transformers' own bf16 differs from its f32 by 0.044 in the mean; half as much again is allowed.
    assert!(mean <= 0.066, "log-probabilities differ by {mean} in the mean");
}

/// Of the GGUF file, whose weights are de-quantised to f32 and not rounded further.
#[test]
fn logits_of_the_gguf_file_are_transformers() {
    let file = part_of_the_model("SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = TextModel::open(file, Placement::CPU).unwrap();
    let (logit, logprob, _) = differences(model.lm(), &Truth::read(), "f32_weights");
    println!("f32, GGUF: logits differ by {logit:.1e}, log-probabilities of prompts by {logprob:.1e}");
    assert!(logit <= NEAR && logprob <= NEAR, "{logit}, {logprob}");
}

/// 64 tokens on 20 prompts: all of them in one batch; and some of them alone, where other kernels run.
#[test]
fn greedy_continuations_are_transformers() {
    const TOKENS: usize = 64;
    let model = TextModel::open(directory(), Placement::CPU).unwrap();
    let (truth, prompts) = (Truth::read(), prompts("greedy"));
    assert_eq!(prompts.len(), 20);
    let mut runs: Vec<(String, Vec<usize>)> = vec![("in one batch".into(), (0..prompts.len()).collect())];
    runs.extend([0, 6, 11, 19].map(|n| (format!("prompt {n} alone"), vec![n])));
    let (mut exceptions, mut wrong, mut worst) = (Vec::new(), Vec::new(), 0f64);
    for (how, which) in &runs {
        let given = which.iter().map(|&n| prompts[n].clone());
        // No token ends the continuations, as none did in the truth.
        let done = model.generate_ids(given).max_new_tokens(TOKENS).eos([]).run().unwrap();
        println!("{how}: {:.1} tokens a second", done.tokens_per_second());
        for (&n, completion) in which.iter().zip(&done.completions) {
            let expected = truth.ids(&format!("bf16_weights.greedy.{n}.new_ids"));
            let gaps = truth.get(&format!("bf16_weights.greedy.{n}.gaps"));
            assert_eq!((completion.ids.len(), &completion.finish), (TOKENS, &Finish::Length));
            let parts = completion.ids.iter().zip(&expected).position(|(a, b)| a != b);
            let logprobs = truth.get(&format!("bf16_weights.greedy.{n}.logprobs"));
            let same = parts.unwrap_or(TOKENS);
            worst = worst.max(largest(&completion.logprobs[..same], &logprobs[..same]));
            let Some(step) = parts else { continue };
            let line = format!(
                "{how}, prompt {n}, step {step}: {} instead of {}, where transformers' two best are {:.1e} apart",
                completion.ids[step], expected[step], gaps[step]
            );
            if gaps[step] < UNDECIDED { exceptions.push(line) } else { wrong.push(line) }
        }
    }
    let all: usize = runs.iter().map(|(_, which)| which.len()).sum();
    let least = (0..prompts.len()).flat_map(|n| truth.get(&format!("bf16_weights.greedy.{n}.gaps")));
    let least = least.copied().fold(f64::INFINITY, f64::min);
    println!(
        "{} of {all} continuations of {TOKENS} tokens are transformers'; log-probabilities differ by {worst:.1e}; \
         its least gap of the two best is {least:.1e}",
        all - exceptions.len() - wrong.len()
    );
    exceptions.iter().for_each(|line| println!("exception: {line}"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(worst <= NEAR, "log-probabilities differ by {worst}");
}
