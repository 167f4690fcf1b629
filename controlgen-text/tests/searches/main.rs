//! The searches that are not beams, against distributions that are written out.
#![allow(clippy::unwrap_used, clippy::panic)]

mod best_of;
mod contrastive;
mod smc;
mod speculative;
mod stochastic_beam;
#[path = "../common/told.rs"]
mod told;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use controlgen_core::testing::{TableLm, TableLmConfig, chi_square};
use controlgen_core::{LanguageModel, Pass, PerRow, Result, RowControl, TokenControls};
use controlgen_text::search::{Finish, Hypothesis, Task};
use tch::Tensor;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The token that ends what table models say.
const EOS: i64 = 1;
const PROMPT: [i64; 3] = [0, 2, 3];
const LENGTH: usize = 4;

/// A table model of `vocab` tokens.
fn table(vocab: i64, seed: u64) -> TableLm {
    // The models are small: threads would only wait for each other.
    tch::set_num_threads(1);
    TableLm::new(&TableLmConfig { vocab, seed, scale: 1.3, ..TableLmConfig::default() }).unwrap()
}

/// A task of one completion, four tokens at most.
fn task<'a>(lm: &'a dyn LanguageModel, prompts: &'a [Vec<i64>], controls: &'a TokenControls) -> Task<'a> {
    Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: LENGTH, eos: &[EOS], n: 1 }
}

/// The whole continuation, the token that ended it included.
fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// Every continuation of [`PROMPT`] with the sum of its scores: `edit` changes log-probabilities, normalised again or not.
fn all(lm: &TableLm, normalised: bool, edit: &dyn Fn(&[i64], &mut [f64])) -> Vec<(Vec<i64>, f64)> {
    let (mut open, mut done) = (vec![(Vec::new(), 0.0)], Vec::new());
    while let Some((said, sum)) = open.pop() {
        if said.len() == LENGTH || said.last() == Some(&EOS) {
            done.push((said, sum));
            continue;
        }
        let mut scores = lm.log_probs(&[&PROMPT[..], &said].concat()).unwrap();
        edit(&said, &mut scores);
        let norm = if normalised { scores.iter().map(|s| s.exp()).sum::<f64>().ln() } else { 0.0 };
        for (token, score) in (0i64..).zip(scores).filter(|(_, score)| score.is_finite()) {
            open.push(([said.as_slice(), &[token]].concat(), sum + score - norm));
        }
    }
    done
}

/// The p-value of what was drawn, of continuations with these probabilities.
fn p_value(drawn: &[Vec<i64>], expected: &[(Vec<i64>, f64)]) -> f64 {
    let mut counts: HashMap<&[i64], u64> = HashMap::new();
    for ids in drawn {
        *counts.entry(ids).or_default() += 1;
    }
    let observed: Vec<u64> = expected.iter().map(|(ids, _)| counts.remove(&ids[..]).unwrap_or(0)).collect();
    assert!(counts.is_empty(), "what has no probability was drawn: {counts:?}");
    chi_square(&observed, &expected.iter().map(|(_, p)| *p).collect::<Vec<_>>()).unwrap()
}

/// After 2 only 3 or nothing; after 3, 3 nothing at all. The log-weight is a half for each 4.
#[derive(Clone)]
struct Corners;

impl RowControl for Corners {
    type State = Vec<i64>;
    fn start(&self, _prompt: &[i64]) -> Result<Vec<i64>> {
        Ok(Vec::new())
    }
    fn score(&self, said: &Vec<i64>, row: &mut Tensor) -> Result<()> {
        let len = row.size()[0] as usize;
        let mut edited = vec![0f64; len];
        corners(said, &mut edited);
        let edited: Vec<f32> = edited.into_iter().map(|e| e as f32).collect();
        let _ = row.f_add_(&Tensor::from_slice(&edited))?;
        Ok(())
    }
    fn advance(&self, said: &mut Vec<i64>, token: i64) -> Result<()> {
        said.push(token);
        Ok(())
    }
    fn finish(&self, said: &Vec<i64>) -> Result<f64> {
        Ok(fours(said))
    }
}

fn corners(said: &[i64], scores: &mut [f64]) {
    for (token, score) in (0i64..).zip(scores) {
        let allowed = match said {
            [.., 3, 3] => false,
            [.., 2] => token == 3,
            _ => true,
        };
        *score = if allowed { *score } else { f64::NEG_INFINITY };
    }
}

fn fours(said: &[i64]) -> f64 {
    0.5 * said.iter().filter(|&&token| token == 4).count() as f64
}

fn cornered() -> TokenControls {
    TokenControls::new().with(PerRow(Corners))
}
