//! Regularised decoding against every text that there is, with R written out from the paper's definitions.
#![allow(clippy::unwrap_used, clippy::panic)]

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, Pass, TokenControl, TokenControls};
use controlgen_text::controls::{Regularised, Regulariser, Suppress};
use controlgen_text::search::{BeamSearch, Choice, EarlyStopping, Finish, Hypothesis, Search, Task};
use tch::{Kind, Tensor};

const EOS: i64 = 1;
const PROMPT: [i64; 3] = [0, 2, 3];
const ALL: [Regulariser; 5] =
    [Regulariser::Greedy, Regulariser::Variance, Regulariser::Local, Regulariser::Max, Regulariser::Squared];

/// R from its definition: the tokens' surprisals, and beside each the least of its row.
fn measure(regulariser: Regulariser, surprisals: &[(f64, f64)]) -> f64 {
    let n = surprisals.len() as f64;
    let u: Vec<f64> = surprisals.iter().map(|(u, _)| *u).collect();
    match regulariser {
        Regulariser::Greedy => surprisals.iter().map(|(u, least)| (u - least).powi(2)).sum(),
        Regulariser::Variance => {
            let mean = u.iter().sum::<f64>() / n;
            u.iter().map(|u| (u - mean).powi(2)).sum::<f64>() / n
        }
        Regulariser::Local => {
            let before = std::iter::once(0.0).chain(u.iter().copied());
            u.iter().zip(before).map(|(u, before)| (u - before).powi(2)).sum::<f64>() / n
        }
        Regulariser::Max => u.iter().copied().fold(0.0, f64::max),
        Regulariser::Squared => u.iter().map(|u| u * u).sum(),
    }
}

/// Every text of at most `length` tokens with Σ log p − λ R, best first.
fn every(lm: &TableLm, length: usize, objective: (Regulariser, f64)) -> Vec<(Vec<i64>, f64)> {
    let (mut open, mut done) = (vec![(Vec::new(), Vec::new())], Vec::new());
    while let Some((said, surprisals)) = open.pop() {
        if said.len() == length || said.last() == Some(&EOS) {
            let log_prob: f64 = surprisals.iter().map(|(u, _): &(f64, f64)| -u).sum();
            done.push((said, log_prob - objective.1 * measure(objective.0, &surprisals)));
            continue;
        }
        let row = lm.log_probs(&[&PROMPT, said.as_slice()].concat()).unwrap();
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (token, log_prob) in (0i64..).zip(row) {
            let next = [surprisals.as_slice(), &[(-log_prob, -best)]].concat();
            open.push(([said.as_slice(), &[token]].concat(), next));
        }
    }
    done.sort_by(|a, b| b.1.total_cmp(&a.1));
    done
}

fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

fn task<'a>(
    lm: &'a TableLm,
    prompts: &'a [Vec<i64>],
    controls: &'a TokenControls,
    length: usize,
) -> Task<'a> {
    Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: length, eos: &[EOS], n: 1 }
}

/// Beams as many as there are texts give all of them, in the order of the objective: the first is the optimum.
#[test]
fn full_width_beams_find_the_optimum() {
    let prompts = [PROMPT.to_vec()];
    // 4 tokens to a length of 5, 8 to a length of 3.
    for (vocab, length, width) in [(4, 5, 364), (8, 3, 400)] {
        for (seed, regulariser) in (0..2).flat_map(|seed| ALL.map(|regulariser| (seed, regulariser))) {
            for weight in [0.0, 0.3, 4.0] {
                let config = TableLmConfig { vocab, seed, scale: 1.3, ..TableLmConfig::default() };
                let lm = TableLm::new(&config).unwrap();
                let expected = every(&lm, length, (regulariser, weight));
                let controls = TokenControls::new().with(Regularised::new(regulariser, weight).unwrap());
                let search = BeamSearch::new(width).unwrap().length_penalty(0.0).unwrap();
                let search = search.early_stopping(EarlyStopping::Exhausted);
                let wanted = Task { n: width, ..task(&lm, &prompts, &controls, length) };
                let found = search.run(&wanted, &mut ()).unwrap();
                let name = format!("{regulariser:?}, weight {weight}, vocabulary {vocab}, seed {seed}");
                assert_eq!(found.len(), expected.len().min(width), "{name}");
                for (rank, (found, (ids, score))) in found.iter().zip(&expected).enumerate() {
                    assert!((found.score - score).abs() < 1e-4, "{name}, rank {rank}: {found:?}, {score}");
                    let alone =
                        |with: usize| expected.get(with).is_none_or(|(_, s)| (s - score).abs() > 1e-4);
                    if alone(rank + 1) && (rank == 0 || alone(rank - 1)) {
                        assert_eq!(&said(found), ids, "{name}, rank {rank}");
                    }
                }
            }
        }
    }
}

/// A great weight on the greedy regulariser leaves the greedy text, whatever the beams.
#[test]
fn a_great_greedy_weight_is_greedy_search() {
    let (prompts, none) = ([PROMPT.to_vec()], TokenControls::new());
    for seed in 0..8 {
        let lm = TableLm::new(&TableLmConfig { vocab: 6, seed, ..TableLmConfig::default() }).unwrap();
        let greedy = Choice::Greedy.run(&task(&lm, &prompts, &none, 6), &mut ()).unwrap();
        let controls = TokenControls::new().with(Regularised::new(Regulariser::Greedy, 1e5).unwrap());
        let search = BeamSearch::new(20).unwrap().length_penalty(0.0).unwrap();
        let found = search.run(&task(&lm, &prompts, &controls, 6), &mut ()).unwrap();
        assert_eq!(said(&found[0]), said(&greedy[0]), "seed {seed}");
    }
}

/// What reaches the control is normalised: shifted scores give the same changes, and bans before it count.
#[test]
fn scores_need_not_be_normalised() {
    let log_probs = Tensor::from_slice(&[0.5f32, 0.25, 0.125, 0.125]).log().view([1, 4]);
    for regulariser in ALL {
        let controls = TokenControls::new()
            .with(Suppress::new([3]).unwrap())
            .with(Regularised::new(regulariser, 1.0).unwrap());
        let change = |logits: &Tensor| -> Vec<f32> {
            let mut state = controls.start(&[vec![0]]).unwrap();
            for token in [1, 0] {
                let _ = controls.score(&mut state, logits.copy()).unwrap();
                controls.advance(&mut state, &[token]).unwrap();
            }
            let scored = controls.score(&mut state, logits.copy()).unwrap();
            Vec::try_from((scored - logits).narrow(1, 0, 3).to_kind(Kind::Float).view(-1)).unwrap()
        };
        // Without the banned token, the first three have 4/7, 2/7 and 1/7.
        let u = [7.0f64 / 4.0, 7.0 / 2.0, 7.0].map(f64::ln);
        let history = [(u[1], u[0]), (u[0], u[0])];
        let before = measure(regulariser, &history);
        for (shift, found) in [(0.0, change(&log_probs)), (40.0, change(&(&log_probs + 40.0)))] {
            for (token, found) in found.iter().enumerate() {
                let after = measure(regulariser, &[history[0], history[1], (u[token], u[0])]);
                let expected = before - after;
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{regulariser:?}, shift {shift}: {found}, {expected}"
                );
            }
        }
    }
}

#[test]
fn bad_input() {
    for bad in [f64::NAN, f64::INFINITY, -0.1, 1e7] {
        let error = Regularised::new(Regulariser::Squared, bad).unwrap_err();
        assert!(matches!(&error, Error::Value { what, .. } if what == "regularizer_weight"), "{error}");
    }
    let control = Regularised::new(Regulariser::Variance, 1.0).unwrap();
    let mut state = control.start(&[vec![0]]).unwrap();
    let unscored = control.advance(&mut state, &[0]).unwrap_err();
    assert!(matches!(&unscored, Error::Value { expected, .. } if expected.contains("scored")), "{unscored}");
    let _ = control.score(&mut state, Tensor::zeros([1, 3], tch::kind::FLOAT_CPU)).unwrap();
    let beyond = control.advance(&mut state, &[3]).unwrap_err();
    assert!(matches!(beyond, Error::Value { .. }), "{beyond}");
    assert_eq!(serde_json::to_string(&Regulariser::Local).unwrap(), "\"local\"");
}
