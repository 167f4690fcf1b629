//! Noise that makes a search for the best a draw.

use std::collections::HashMap;

use controlgen_core::testing::chi_square;
use controlgen_core::{Pass, TokenControls};
use controlgen_text::controls::GumbelNoise;
use controlgen_text::search::{BeamSearch, Choice, Finish, GridBeamSearch, Search, Task};

use super::*;

fn run(lm: &TableLm, seed: u64, temperature: f64, search: &dyn Search) -> Vec<i64> {
    let controls = TokenControls::new().with(GumbelNoise::new(seed, temperature).unwrap());
    let prompts = [PROMPT.to_vec()];
    let task = Task {
        lm,
        prompts: &prompts,
        controls: &controls,
        pass: Pass::default(),
        max_new_tokens: 3,
        eos: &[EOS],
        n: 1,
    };
    let found = search.run(&task, &mut ()).unwrap().remove(0);
    let end = match found.finish {
        Finish::Eos(token) => Some(token),
        _ => None,
    };
    found.ids.into_iter().chain(end).collect()
}

/// Greedy search under noise is sampling, at its temperature.
#[test]
fn greedy_search_under_noise_samples() {
    const N: u64 = 4000;
    let lm = table(9);
    for temperature in [1.0, 0.6] {
        let edit =
            &mut |_: &[i64], scores: &mut [f64]| scores.iter_mut().for_each(|score| *score /= temperature);
        let expected = lm.enumerate_with(&PROMPT, 3, edit).unwrap();
        let mut counts: HashMap<Vec<i64>, u64> = HashMap::new();
        for seed in 0..N {
            *counts.entry(run(&lm, seed, temperature, &Choice::Greedy)).or_default() += 1;
        }
        let (observed, probabilities) = binned(&mut counts, &expected, N);
        assert!(counts.is_empty(), "{counts:?}");
        let p = chi_square(&observed, &probabilities).unwrap();
        assert!(p > 0.001, "temperature {temperature}: p = {p}");
    }
}

/// Beams under noise keep the clauses, and find many texts.
#[test]
fn beams_under_noise_vary() {
    let (lm, formula) = (table(9), &formulas()[0]);
    let search = GridBeamSearch::new(BeamSearch::new(8).unwrap(), clauses(formula));
    let mut found: Vec<Vec<i64>> = (0..30).map(|seed| run(&lm, seed, 1.0, &search)).collect();
    for ids in &found {
        assert!(unmet(formula, &text(&PROMPT), &text(ids)).is_empty(), "{ids:?}");
    }
    found.sort();
    found.dedup();
    assert!(found.len() > 5, "{found:?}");
    assert!((0..3).all(|seed| run(&lm, seed, 0.0, &search) == run(&lm, 0, 0.0, &search)));
    for bad in [-0.1, f64::NAN, f64::INFINITY] {
        assert!(GumbelNoise::new(0, bad).is_err());
    }
}
