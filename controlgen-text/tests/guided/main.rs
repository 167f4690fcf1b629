//! Control by models: arithmetic, guidance, GeDi, FUDGE, PPLM, against formulas that are written out on plain probabilities.
#![allow(clippy::unwrap_used, clippy::panic)]

mod arithmetic;
mod bad_input;
mod fudge;
mod gedi;
mod pplm;
mod reference;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use controlgen_core::testing::{TableLm, TableLmConfig, chi_square};
use controlgen_core::{LanguageModel, Pass, TokenControls};
use controlgen_text::search::{Finish, Hypothesis, Search, Task};

/// The token that ends what table models say.
const EOS: i64 = 1;
const PROMPT: [i64; 3] = [0, 2, 3];
const LENGTH: usize = 4;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A table model.
fn table(vocab: i64, seed: u64) -> TableLm {
    // The models are small: threads would only wait for each other.
    tch::set_num_threads(1);
    TableLm::new(&TableLmConfig { vocab, seed, scale: 1.3, ..TableLmConfig::default() }).unwrap()
}

fn run(
    lm: &dyn LanguageModel,
    prompts: &[Vec<i64>],
    controls: &TokenControls,
    search: &dyn Search,
    n: usize,
) -> Vec<Hypothesis> {
    let task = Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: LENGTH, eos: &[EOS], n };
    search.run(&task, &mut ()).unwrap()
}

/// The whole continuation, the token that ended it included.
fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// log of the softmax.
fn normalised(scores: &[f64]) -> Vec<f64> {
    let sum: f64 = scores.iter().map(|s| s.exp()).sum();
    scores.iter().map(|s| s - sum.ln()).collect()
}

/// Every continuation with the sum of the log-probabilities that `next` gives after what has been said.
fn enumerate(next: &dyn Fn(&[i64]) -> Vec<f64>) -> Vec<(Vec<i64>, f64)> {
    let (mut open, mut done) = (vec![(Vec::new(), 0.0)], Vec::new());
    while let Some((said, sum)) = open.pop() {
        if said.len() == LENGTH || said.last() == Some(&EOS) {
            done.push((said, sum));
            continue;
        }
        for (token, score) in (0i64..).zip(next(&said)).filter(|(_, score)| *score > f64::NEG_INFINITY) {
            open.push(([said.as_slice(), &[token]].concat(), sum + score));
        }
    }
    done
}

/// The p-value of what was drawn, of continuations with these log-probabilities.
fn p_value(drawn: &[Hypothesis], expected: &[(Vec<i64>, f64)]) -> f64 {
    let mut counts: HashMap<Vec<i64>, u64> = HashMap::new();
    for hypothesis in drawn {
        *counts.entry(said(hypothesis)).or_default() += 1;
    }
    let observed: Vec<u64> = expected.iter().map(|(ids, _)| counts.remove(ids).unwrap_or(0)).collect();
    assert!(counts.is_empty(), "what has no probability was drawn: {counts:?}");
    chi_square(&observed, &expected.iter().map(|(_, log_p)| log_p.exp()).collect::<Vec<_>>()).unwrap()
}
