//! Stochastic beam search against sampling without replacement, written out.

use std::collections::HashMap;

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, LanguageModel, TokenControls};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty, Suppress, Temperature};
use controlgen_text::search::{Drawn, Finish, Search, StochasticBeamSearch, Task};

use crate::told::Told;
use crate::{EOS, LENGTH, PROMPT, all, cornered, p_value, said, table, task};

fn draw(
    lm: &TableLm,
    controls: &TokenControls,
    max_new_tokens: usize,
    beams: usize,
    seed: u64,
) -> Vec<Drawn> {
    let prompts = [PROMPT.to_vec()];
    let search = StochasticBeamSearch::new(beams, seed).unwrap();
    let task = Task { max_new_tokens, ..task(lm, &prompts, controls) };
    search.draw(&task, &mut ()).unwrap().remove(0)
}

/// Every continuation with its probability.
fn probabilities(lm: &TableLm) -> Vec<(Vec<i64>, f64)> {
    all(lm, true, &|_, _| ()).into_iter().map(|(ids, log_p)| (ids, log_p.exp())).collect()
}

/// Ordered pairs: p(x) p(y) / (1 − p(x)), at α = 0.001.
#[test]
fn two_are_drawn_without_replacement() {
    let bans = TokenControls::new().with(Suppress::new([2]).unwrap()).with(Temperature::new(1.6).unwrap());
    for (name, controls) in [("nothing", TokenControls::new()), ("a ban, and a temperature", bans)] {
        let lm = table(4, 4);
        let mut edit = |_: &[i64], scores: &mut [f64]| {
            if !controls.is_empty() {
                scores[2] = f64::NEG_INFINITY;
                scores.iter_mut().for_each(|s| *s /= 1.6);
            }
        };
        let each = lm.enumerate_with(&PROMPT, 2, &mut edit).unwrap();
        let mut pairs = Vec::new();
        for (x, log_p) in &each {
            for (y, log_q) in each.iter().filter(|(y, _)| y != x) {
                let p = (log_p + log_q).exp() / (1.0 - log_p.exp());
                pairs.push(([&x[..], &[-1], y].concat(), p));
            }
        }
        let pair = |seed| {
            let found = draw(&lm, &controls, 2, 2, seed);
            assert!(found[0].perturbed > found[1].perturbed);
            [said(&found[0].hypothesis), vec![-1], said(&found[1].hypothesis)].concat()
        };
        let p = p_value(&(0..6000).map(pair).collect::<Vec<_>>(), &pairs);
        println!("{name}: {} ordered pairs, p = {p:.3}", pairs.len());
        assert!(p > 0.001, "{name}: p = {p}");
    }
}

/// Where the beams are as many as all there is, all is given, with its probability.
#[test]
fn everything_is_found() {
    let lm = table(4, 6);
    let controls =
        TokenControls::new().with(NoRepeatNgram::new(2).unwrap()).with(Suppress::new([3]).unwrap());
    for controls in [TokenControls::new(), controls] {
        let banned = !controls.is_empty();
        let expected: HashMap<Vec<i64>, f64> = all(&lm, true, &|said, scores| {
            let text = [&PROMPT[..], said].concat();
            for token in 0..4 {
                let pair = [text[text.len() - 1], token];
                if banned && (token == 3 || text.windows(2).any(|w| w == pair)) {
                    scores[token as usize] = f64::NEG_INFINITY;
                }
            }
        })
        .into_iter()
        .collect();
        let found = draw(&lm, &controls, LENGTH, 400, 3);
        assert_eq!(found.len(), expected.len());
        for drawn in &found {
            let log_p = expected[&said(&drawn.hypothesis)];
            assert!((drawn.log_prob - log_p).abs() < 1e-5, "{drawn:?}: {log_p}");
            assert!((drawn.hypothesis.score - log_p).abs() < 1e-5);
            assert!(drawn.log_inclusion.abs() < 1e-9, "{drawn:?}");
        }
    }
}

/// Σ f(x) p(x) / P(x is included) has no bias.
#[test]
fn weighted_estimates_have_no_bias() {
    let lm = table(5, 7);
    const RUNS: u64 = 3000;
    let each = probabilities(&lm);
    for beams in [1, 3, 6] {
        let f = |ids: &[i64]| ids.iter().map(|&id| id as f64).sum::<f64>() + f64::from(ids.len() == LENGTH);
        let expected: f64 = each.iter().map(|(ids, p)| p * f(ids)).sum();
        let (mut sum, mut squares) = (0.0, 0.0);
        for seed in 0..RUNS {
            let estimate: f64 = draw(&lm, &TokenControls::new(), LENGTH, beams, seed)
                .iter()
                .map(|d| (d.log_prob - d.log_inclusion).exp() * f(&said(&d.hypothesis)))
                .sum();
            (sum, squares) = (sum + estimate, squares + estimate * estimate);
        }
        let mean = sum / RUNS as f64;
        let error = ((squares / RUNS as f64 - mean * mean) / RUNS as f64).sqrt();
        println!("{beams} beams: {mean:.4} ± {error:.4} of {expected:.4}");
        assert!((mean - expected).abs() < 3.5 * error, "{beams} beams: {mean} ± {error} of {expected}");
    }
}

/// The first of any number is a sample of the model.
#[test]
fn the_first_is_a_sample() {
    let lm = table(5, 9);
    let expected = probabilities(&lm);
    for beams in [1, 4] {
        let first = |seed| said(&draw(&lm, &TokenControls::new(), LENGTH, beams, seed)[0].hypothesis);
        let p = p_value(&(10_000..13_000).map(first).collect::<Vec<_>>(), &expected);
        println!("{beams} beams: p = {p:.3}");
        assert!(p > 0.001, "{beams} beams: p = {p}");
    }
}

#[test]
fn a_batch_in_any_order_is_one_by_one() {
    let lm = table(7, 5);
    let controls =
        TokenControls::new().with(RepetitionPenalty::new(1.2).unwrap()).with(NoRepeatNgram::new(2).unwrap());
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0], vec![0, 5, 5]];
    let search = StochasticBeamSearch::new(5, 3).unwrap();
    let run = |prompts: &[Vec<i64>]| {
        let task = Task { max_new_tokens: 9, n: 4, ..task(&lm, prompts, &controls) };
        search.run(&task, &mut Told::new(prompts.len())).unwrap()
    };
    let batch = run(&prompts);
    assert_eq!(batch.len(), 16);
    for (i, prompt) in prompts.iter().enumerate() {
        for (k, alone) in run(std::slice::from_ref(prompt)).iter().enumerate() {
            let other = &batch[4 * i + k];
            assert_eq!((said(alone), &alone.finish), (said(other), &other.finish), "prompt {i}");
            assert_eq!((other.prompt, other.sample, alone.sample), (i, k, k));
            assert!((alone.score - other.score).abs() < 1e-4);
        }
        let mut ids: Vec<Vec<i64>> = batch[4 * i..4 * i + 4].iter().map(said).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 4, "without replacement");
    }
}

#[test]
fn what_a_listener_ends_is_finished() {
    let (lm, none, prompts) = (table(7, 1), TokenControls::new(), vec![vec![0, 3], vec![0, 2, 4]]);
    let search = StochasticBeamSearch::new(6, 2).unwrap();
    let run = |eos: &[i64], stop: i64| {
        let mut told = Told { stop: vec![stop], ..Told::new(2) };
        search.run(&Task { max_new_tokens: 8, eos, n: 6, ..task(&lm, &prompts, &none) }, &mut told).unwrap()
    };
    let (ended, stopped) = (run(&[6, 1], -1), run(&[1], 6));
    assert!(stopped.iter().any(|h| h.finish == Finish::Stopped));
    for (ended, stopped) in ended.iter().zip(&stopped) {
        assert_eq!(said(ended), said(stopped));
        assert_eq!(ended.finish == Finish::Eos(6), stopped.finish == Finish::Stopped);
    }
    let mut told = Told { cancel_at: 3, ..Told::new(2) };
    let task = Task { max_new_tokens: 8, eos: &[], n: 4, ..task(&lm, &prompts, &none) };
    let found = search.run(&task, &mut told).unwrap();
    assert_eq!((told.steps, found.len()), (3, 8));
    assert!(found.iter().all(|h| h.ids.len() == 3 && h.finish == Finish::Cancelled));
}

#[test]
fn what_cannot_be_run_is_refused() {
    assert!(matches!(StochasticBeamSearch::new(0, 1), Err(Error::Value { .. })));
    let (lm, none, prompts) = (table(6, 1), TokenControls::new(), [vec![0], vec![0, 2]]);
    let run = |lm: &dyn LanguageModel, controls: &TokenControls, beams, n| {
        let search = StochasticBeamSearch::new(beams, 1).unwrap();
        search.run(&Task { n, ..task(lm, &prompts, controls) }, &mut ()).unwrap_err()
    };
    let many = run(&lm, &none, 4, 5).to_string();
    assert!(many.contains("at most num_beams = 4") && many.contains('5'), "{many}");
    let huge = run(&lm, &none, usize::MAX, 1).to_string();
    assert!(huge.contains("1048576"), "{huge}");
    let banned = TokenControls::new().with(Suppress::new(0..6).unwrap());
    let error = run(&lm, &banned, 4, 1);
    assert!(matches!(error, Error::AllBanned { row: 0, step: 0 }), "{error}");
    let error = run(&lm, &cornered().with(Suppress::new([0, 1, 2, 4, 5]).unwrap()), 4, 1);
    assert!(matches!(error, Error::AllBanned { row: 0, step: 2 }), "{error}");
    let nan = lm.map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    let error = run(&*nan, &none, 4, 1).to_string();
    assert!(error.contains("prompt 0, step 0"), "{error}");

    let config = TableLmConfig { vocab: 6, context: 5, seed: 11, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    let prompts = [PROMPT.to_vec()];
    let long = Task { max_new_tokens: usize::MAX, ..task(&lm, &prompts, &controls) };
    let found = StochasticBeamSearch::new(3, 1).unwrap().run(&long, &mut ()).unwrap();
    assert!(found.iter().all(|h| h.ids.len() == 3 && h.finish == Finish::Context));
    let none =
        StochasticBeamSearch::new(3, 1).unwrap().run(&Task { max_new_tokens: 0, ..long }, &mut ()).unwrap();
    assert_eq!((none.len(), none[0].ids.len(), none[0].score), (1, 0, 0.0));
}
