//! Guidance against transformers': the cases of `benches/reference/guidance_fixtures.py`.

use controlgen_core::{Pass, Placement, TokenControls};
use controlgen_text::arithmetic::{ModelArithmetic, Term, classifier_free_guidance};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty};
use controlgen_text::models;
use controlgen_text::search::{Choice, Search, Task};
use serde_json::Value;

use crate::folder;

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

#[test]
fn greedy_texts_and_scores_are_those_of_transformers() {
    tch::set_num_threads(1);
    let fixture: Value = serde_json::from_slice(&std::fs::read(folder("guidance.json")).unwrap()).unwrap();
    let prompts: Vec<Vec<i64>> = fixture["prompts"].as_array().unwrap().iter().map(ids).collect();
    let (mut same, mut worst) = (0, 0f64);
    for case in fixture["cases"].as_array().unwrap() {
        let (name, config) = (case["model"].as_str().unwrap(), &case["config"]);
        let prompt = Term::new(models::open(&folder(name), Placement::CPU).unwrap());
        let negative = match config.get("negative_prompt_ids") {
            Some(negative) => prompt.instead(ids(negative)),
            None => prompt.last_token(),
        };
        let scale = config["guidance_scale"].as_f64().unwrap();
        let lm = ModelArithmetic::new(classifier_free_guidance(&prompt, &negative, scale)).unwrap();
        let mut controls = TokenControls::new();
        if let Some(penalty) = config.get("repetition_penalty") {
            controls.push(RepetitionPenalty::new(penalty.as_f64().unwrap()).unwrap());
            controls.push(NoRepeatNgram::new(2).unwrap());
        }
        let (pass, max_new_tokens) = (Pass::default(), config["max_new_tokens"].as_u64().unwrap() as usize);
        let task =
            Task { lm: &lm, prompts: &prompts, controls: &controls, pass, max_new_tokens, eos: &[], n: 1 };
        let found = Choice::Greedy.run(&task, &mut ()).unwrap();
        for (found, expected) in found.iter().zip(case["expected"].as_array().unwrap()) {
            assert_eq!(found.ids, ids(&expected["ids"]), "{name}, {config}");
            let score: f64 = expected["scores"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).sum();
            worst = worst.max((found.score - score).abs() / max_new_tokens as f64);
            same += 1;
        }
    }
    println!("{same} texts are the reference's; mean scores differ by {worst:.1e}");
    assert_eq!(same, 96);
    assert!(worst <= 1e-4, "mean scores differ by {worst}");
}
