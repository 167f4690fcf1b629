//! Beams of SmolLM2-135M-Instruct in f32, against `benches/reference/beam_fixtures.py`.
//!
//! The model is what `cargo xtask setup` fetches, which `cargo xtask test` does first. Without it this test fails:
//! skipped, it would show nothing.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use controlgen_core::Placement;
use controlgen_text::search::Finish;
use controlgen_text::{Completion, GenerationConfig, TextModel};
use serde_json::Value;

/// How far scores may be from the reference's.
const NEAR: f64 = 1e-3;
/// Where two numbers that the reference compared are this close, either may win.
const UNDECIDED: f64 = 1e-4;

fn directory() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.controlgen/models/smollm2-135m-instruct/hf");
    assert!(
        folder.join("model.safetensors").exists(),
        "{} is not there: run `cargo xtask setup`, which fetches the model",
        folder.display()
    );
    folder
}

/// The whole continuation, the token that ended it included.
fn said(completion: &Completion) -> Vec<i64> {
    let mut ids = completion.ids.clone();
    if let Finish::Eos(token) = completion.finish {
        ids.push(token);
    }
    ids
}

#[test]
fn n_best_lists_are_the_references() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../controlgen-text/tests/fixtures/smollm2")
        .join("beams.json");
    let fixture: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let prompts: Vec<Vec<i64>> = serde_json::from_value(fixture["prompts"].clone()).unwrap();
    let model = TextModel::open(directory(), Placement::CPU).unwrap();
    let (mut all, mut worst, mut exceptions, mut wrong) = (0, 0f64, Vec::new(), Vec::new());
    for case in fixture["cases"].as_array().unwrap() {
        let config: GenerationConfig = serde_json::from_value(case["config"].clone()).unwrap();
        let done = model.generate_ids(prompts.iter().cloned()).config(&config).run().unwrap();
        println!("{}: {:.1} tokens a second", case["config"], done.tokens_per_second());
        for (prompt, expected) in case["expected"].as_array().unwrap().iter().enumerate() {
            let found: Vec<&Completion> = done.completions.iter().filter(|c| c.prompt == prompt).collect();
            let ids = |e: &Value| -> Vec<i64> { serde_json::from_value(e["ids"].clone()).unwrap() };
            let expected = expected.as_array().unwrap();
            let same = found.iter().map(|c| said(c)).eq(expected.iter().map(ids));
            all += 1;
            if same {
                for (found, expected) in found.iter().zip(expected) {
                    worst = worst.max((found.score - expected["score"].as_f64().unwrap()).abs());
                }
                continue;
            }
            let gap = case["gaps"][prompt].as_f64().unwrap_or(f64::INFINITY);
            let line = format!("{}, prompt {prompt}: two scores were {gap:.1e} apart", case["config"]);
            if gap < UNDECIDED { exceptions.push(line) } else { wrong.push(line) }
        }
    }
    let same = all - exceptions.len() - wrong.len();
    println!("{same} of {all} n-best lists are the reference's; scores differ by {worst:.1e}");
    exceptions.iter().for_each(|line| println!("exception: {line}"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(worst <= NEAR, "scores differ by {worst}");
}
