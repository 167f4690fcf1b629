//! FUDGE with the exact discriminator: the exact posterior.

use std::collections::HashMap;
use std::sync::Arc;

use controlgen_core::testing::TableLm;
use controlgen_core::testing::contract;
use controlgen_core::{Result, Rows, TokenControl, TokenControls};
use controlgen_text::controls::{ForcedPrefix, Fudge, FutureDiscriminator, Temperature};
use controlgen_text::search::{BeamSearch, Choice, EarlyStopping, Search, Smc, Speculative};
use tch::Tensor;

use crate::{LENGTH, PROMPT, enumerate, normalised, p_value, run, said, table};

/// Whether a whole text has the attribute: an even number of 4s, and no 2 at its end.
fn attribute(text: &[i64]) -> bool {
    text.iter().filter(|&&token| token == 4).count() % 2 == 0 && text.last() != Some(&2)
}

/// Knows p(attribute | beginning) of all texts of a table after [`PROMPT`].
#[derive(Clone)]
struct Exact {
    vocab: i64,
    probability: Arc<HashMap<Vec<i64>, f64>>,
}

impl Exact {
    fn new(lm: &TableLm, vocab: i64) -> Self {
        let mut sums: HashMap<Vec<i64>, (f64, f64)> = HashMap::new();
        for (text, log_p) in lm.enumerate_after(&PROMPT, LENGTH).unwrap() {
            for end in 0..=text.len() {
                let (with, all) = sums.entry(text[..end].to_vec()).or_default();
                *all += log_p.exp();
                *with += if attribute(&text) { log_p.exp() } else { 0.0 };
            }
        }
        let probability = sums.into_iter().map(|(text, (with, all))| (text, with / all)).collect();
        Self { vocab, probability: Arc::new(probability) }
    }
}

impl FutureDiscriminator for Exact {
    type State = Vec<Vec<i64>>;

    fn vocab(&self) -> i64 {
        self.vocab
    }

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        Ok(vec![Vec::new(); prompts.len()])
    }

    fn log_probs(&self, state: &mut Self::State, candidates: &Tensor) -> Result<Tensor> {
        let k = candidates.size()[1] as usize;
        let all: Vec<i64> = Vec::try_from(candidates.reshape([-1]))?;
        let told = |(text, candidates): (&Vec<i64>, &[i64])| {
            let after = |token: &i64| self.probability.get(&[text.as_slice(), &[*token]].concat()).copied();
            candidates.iter().map(|token| after(token).unwrap_or(0.5).ln() as f32).collect::<Vec<f32>>()
        };
        let told: Vec<f32> = state.iter().zip(all.chunks_exact(k)).flat_map(told).collect();
        Ok(Tensor::from_slice(&told).view([-1, k as i64]))
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        state.iter_mut().zip(tokens).for_each(|(text, &token)| text.push(token));
        Ok(())
    }
}

/// log p(text | attribute), of all that have it.
fn posterior(lm: &TableLm) -> Vec<(Vec<i64>, f64)> {
    let all = lm.enumerate_after(&PROMPT, LENGTH).unwrap();
    let with: Vec<_> = all.into_iter().filter(|(text, _)| attribute(text)).collect();
    let sum: f64 = with.iter().map(|(_, log_p)| log_p.exp()).sum();
    with.into_iter().map(|(text, log_p)| (text, log_p - sum.ln())).collect()
}

#[test]
fn the_exact_discriminator_draws_the_exact_posterior() {
    let lm = table(6, 21);
    let controls = TokenControls::new().with(Fudge::new(Exact::new(&lm, 6), 1.0, 6).unwrap());
    let expected = posterior(&lm);
    let sampled = Choice::Sample { seed: 2, first: 0 };
    let searches: [(&str, Box<dyn Search>, usize); 3] = [
        ("sampling", Box::new(sampled), 20_000),
        ("speculative decoding", Box::new(Speculative::prompt_lookup(sampled, 2, 2).unwrap()), 1500),
        ("particles", Box::new(Smc::new(40_000, 8).unwrap()), 2000),
    ];
    for (name, search, n) in searches {
        let drawn = run(&lm, &[PROMPT.to_vec()], &controls, &*search, n);
        let p = p_value(&drawn, &expected);
        println!("{name}: {} texts, p = {p:.3}", expected.len());
        assert!(p > 0.001, "{name}: p = {p}");
    }
}

/// Σ over a text is log p + λ log p(a | text): what beams rank by.
#[test]
fn beams_rank_by_the_whole_text() {
    let lm = table(5, 21);
    let exact = Exact::new(&lm, 5);
    let controls = TokenControls::new().with(Fudge::new(exact.clone(), 0.7, 5).unwrap());
    let search =
        BeamSearch::new(700).unwrap().length_penalty(0.0).unwrap().early_stopping(EarlyStopping::Exhausted);
    let found = run(&lm, &[PROMPT.to_vec()], &controls, &search, 10);
    let mut expected: Vec<_> = lm.enumerate_after(&PROMPT, LENGTH).unwrap();
    expected.retain(|(text, _)| attribute(text));
    // 0.7 · log 1 = 0.
    expected.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (found, (text, log_p)) in found.iter().zip(&expected) {
        assert_eq!(said(found), *text);
        assert!((found.score - log_p).abs() < 1e-4, "{found:?} {log_p}");
    }
}

/// λ and the k best, written out; after a temperature, which changes what the k best get.
#[test]
fn the_weight_and_the_best_few() {
    let lm = table(6, 5);
    let (weight, k) = (1.7, 3);
    let controls = TokenControls::new()
        .with(Temperature::new(0.8).unwrap())
        .with(Fudge::new(Letters { vocab: 6 }, weight, k).unwrap());
    let drawn = run(&lm, &[PROMPT.to_vec()], &controls, &Choice::Sample { seed: 4, first: 0 }, 20_000);
    let expected = enumerate(&|said| {
        let text = [&PROMPT[..], said].concat();
        let log_p = lm.log_probs(&text).unwrap();
        let mut order: Vec<usize> = (0..log_p.len()).collect();
        order.sort_by(|&a, &b| log_p[b].total_cmp(&log_p[a]));
        let mut scores = vec![f64::NEG_INFINITY; log_p.len()];
        for &i in &order[..k] {
            let sum = text.iter().sum::<i64>() + i as i64;
            let future = 1.0 / (1.0 + (-(0.3 * sum as f64).sin()).exp());
            scores[i] = log_p[i] / 0.8 + weight * future.ln();
        }
        normalised(&scores)
    });
    let p = p_value(&drawn, &expected);
    println!("{} texts, p = {p:.3}", expected.len());
    assert!(p > 0.001, "p = {p}");
}

/// A token that was not weighed, since another control forces it after: the next step knows its share all the same.
#[test]
fn a_token_that_was_not_weighed() {
    let lm = table(6, 5);
    let exact = Exact::new(&lm, 6);
    let best = lm.log_probs(&PROMPT).unwrap();
    let worst = (2..6).min_by(|&a, &b| best[a as usize].total_cmp(&best[b as usize])).unwrap();
    let forced = ForcedPrefix::new([worst]).unwrap();
    let scored = |controls| run(&lm, &[PROMPT.to_vec()], &controls, &Choice::Greedy, 1).remove(0);
    // After: among the two best it is not, and so it is banned before it is forced.
    let fudge = |k| Fudge::new(exact.clone(), 1.0, k).unwrap();
    let before = scored(TokenControls::new().with(forced.clone()).with(fudge(2)));
    let after = scored(TokenControls::new().with(fudge(6)).with(forced));
    assert_eq!(before.ids[0], worst);
    assert_eq!(after.ids[0], worst);
    // A step that asks nothing: the token was chosen before anything was weighed.
    let control = fudge(6);
    let (mut asked, mut forced) =
        (control.start(&[PROMPT.to_vec()]).unwrap(), control.start(&[PROMPT.to_vec()]).unwrap());
    let logits = || Tensor::zeros([1, 6], (tch::Kind::Float, tch::Device::Cpu));
    let _ = control.score(&mut asked, logits()).unwrap();
    for state in [&mut asked, &mut forced] {
        control.advance(state, &[worst]).unwrap();
    }
    let (asked, forced) =
        (control.score(&mut asked, logits()).unwrap(), control.score(&mut forced, logits()).unwrap());
    assert_eq!(asked, forced);
    let expected = exact.probability[&vec![worst, 3]].ln() - exact.probability[&vec![worst]].ln();
    assert!((asked.double_value(&[0, 3]) - expected).abs() < 1e-5);
}

#[test]
fn contract() {
    let lm = table(6, 3);
    for (weight, k) in [(1.0, 6), (0.5, 3), (4.0, 1)] {
        let control = Fudge::new(Letters { vocab: 6 }, weight, k).unwrap();
        contract::token_control(&control, 6).unwrap();
    }
    // A state that follows its rows is needed for this one to hold.
    contract::token_control(&Fudge::new(Exact::new(&lm, 6), 1.0, 6).unwrap(), 6).unwrap();
    let mut rows = vec![vec![1i64], vec![2]];
    rows.reorder(&[1, 1]).unwrap();
}

/// Of the sum of all tokens, prompt included.
#[derive(Clone)]
pub struct Letters {
    pub vocab: i64,
}

impl FutureDiscriminator for Letters {
    type State = Tensor;

    fn vocab(&self) -> i64 {
        self.vocab
    }

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Tensor> {
        Ok(Tensor::from_slice(&prompts.iter().map(|p| p.iter().sum()).collect::<Vec<i64>>()).unsqueeze(1))
    }

    fn log_probs(&self, state: &mut Tensor, candidates: &Tensor) -> Result<Tensor> {
        Ok(((&*state + candidates) * 0.3).sin().to_kind(tch::Kind::Float).log_sigmoid())
    }

    fn advance(&self, state: &mut Tensor, tokens: &[i64]) -> Result<()> {
        *state = &*state + Tensor::from_slice(tokens).unsqueeze(1);
        Ok(())
    }
}
