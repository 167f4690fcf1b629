//! The cases of `benches/reference/beam_fixtures.py`.

use controlgen_core::{LanguageModel, Pass, Placement, TokenControls};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty};
use controlgen_text::models;
use controlgen_text::search::{BeamSearch, DiverseBeamSearch, EarlyStopping, Hypothesis, Task};
use serde_json::Value;

use crate::{Search, folder, said};

/// How far scores may be from the reference's.
const NEAR: f64 = 1e-3;

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn number(config: &Value, field: &str, default: f64) -> f64 {
    config.get(field).map_or(default, |value| value.as_f64().unwrap())
}

fn count(config: &Value, field: &str, default: u64) -> usize {
    usize::try_from(config.get(field).map_or(default, |value| value.as_u64().unwrap())).unwrap()
}

fn search(config: &Value) -> Search {
    let early_stopping = match config.get("early_stopping") {
        Some(Value::Bool(true)) => EarlyStopping::WhenFull,
        Some(Value::String(_)) => EarlyStopping::Never,
        _ => EarlyStopping::Heuristic,
    };
    let search = BeamSearch::new(count(config, "num_beams", 1)).unwrap();
    let search = search.length_penalty(number(config, "length_penalty", 1.0)).unwrap();
    let search = search.early_stopping(early_stopping);
    match count(config, "num_beam_groups", 1) {
        1 => Search::Beam(search),
        groups => {
            let penalty = number(config, "diversity_penalty", 0.0);
            Search::Diverse(DiverseBeamSearch::new(search, groups, penalty).unwrap())
        }
    }
}

fn controls(config: &Value) -> TokenControls {
    let mut controls = TokenControls::new();
    if config.get("repetition_penalty").is_some() {
        controls.push(RepetitionPenalty::new(number(config, "repetition_penalty", 1.0)).unwrap());
    }
    if config.get("no_repeat_ngram_size").is_some() {
        controls.push(NoRepeatNgram::new(count(config, "no_repeat_ngram_size", 0)).unwrap());
    }
    controls
}

#[test]
fn hypotheses_and_scores_are_the_references() {
    // The models are too small for more threads.
    tch::set_num_threads(1);
    let path = folder("beams.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let prompts: Vec<Vec<i64>> = fixture["prompts"].as_array().unwrap().iter().map(ids).collect();
    let cases = fixture["cases"].as_array().unwrap();
    let (mut same, mut worst, mut wrong) = (0, 0f64, Vec::new());
    let mut lm: Option<(&str, Box<dyn LanguageModel>)> = None;
    for case in cases {
        let (name, config) = (case["model"].as_str().unwrap(), &case["config"]);
        if lm.as_ref().is_none_or(|(open, _)| *open != name) {
            lm = Some((name, models::open(&folder(name), Placement::CPU).unwrap()));
        }
        let (eos, controls) = (ids(&config["eos_token_id"]), controls(config));
        let task = Task {
            lm: &*lm.as_ref().unwrap().1,
            prompts: &prompts,
            controls: &controls,
            pass: Pass::default(),
            max_new_tokens: count(config, "max_new_tokens", 0),
            eos: &eos,
            n: count(config, "num_return_sequences", 1),
        };
        let found = search(config).run(&task, &mut ()).unwrap();
        for (prompt, expected) in case["expected"].as_array().unwrap().iter().enumerate() {
            let found: Vec<&Hypothesis> = found.iter().filter(|h| h.prompt == prompt).collect();
            let expected = expected.as_array().unwrap();
            let expected_ids: Vec<_> = expected.iter().map(|e| ids(&e["ids"])).collect();
            let found_ids: Vec<_> = found.iter().map(|h| said(h)).collect();
            if found_ids == expected_ids {
                same += 1;
                for (found, expected) in found.iter().zip(expected) {
                    worst = worst.max((found.score - expected["score"].as_f64().unwrap()).abs());
                }
            } else {
                wrong.push(format!("{name}, prompt {prompt}, {config}\n{found_ids:?}\n{expected_ids:?}"));
            }
        }
    }
    println!(
        "{same} of {} n-best lists are the reference's; scores differ by {worst:.1e}",
        same + wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(worst <= NEAR, "scores differ by {worst}");
}
