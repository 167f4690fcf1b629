//! Sampling against enumeration: what a search draws is the distribution that its controls define.
//!
//! The reference distributions are written out here, from the papers, on probabilities in f64; the searches and the
//! controls run on a table model whose every sequence can be enumerated.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;

use controlgen_core::testing::{TableLm, TableLmConfig, chi_square};
use controlgen_core::{Error, LanguageModel, Pass, TokenControl, TokenControls};
use controlgen_text::controls::{
    BannedWords, EpsilonCutoff, EtaCutoff, ForcedPrefix, FrequencyPresence, LogitBias, MinLength, MinP,
    NoRepeatNgram, RepetitionPenalty, Suppress, Temperature, TopK, TopP, Typical,
};
use controlgen_text::search::{Choice, Finish, Hypothesis, Search, Task};

const EOS: i64 = 1;
const PROMPT: [i64; 3] = [0, 2, 3];
const LENGTH: usize = 4;

fn lm() -> TableLm {
    TableLm::new(&TableLmConfig { vocab: 6, seed: 11, scale: 1.3, ..TableLmConfig::default() }).unwrap()
}

fn run(
    lm: &dyn LanguageModel,
    prompts: &[Vec<i64>],
    controls: &TokenControls,
    n: usize,
    choice: Choice,
) -> Result<Vec<Hypothesis>, Error> {
    let task = Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: LENGTH, eos: &[EOS], n };
    choice.run(&task, &mut ())
}

/// The whole continuation, the token that ended it included.
fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// Draws many continuations and tests their counts against what `edit` leaves of the enumerated model.
fn draws_the_distribution(name: &str, control: impl TokenControl, edit: impl Fn(&[i64], &mut [f64])) {
    const N: usize = 20_000;
    let lm = lm();
    let expected = lm.enumerate_with(&PROMPT, LENGTH, &mut |said, scores| edit(said, scores)).unwrap();
    let controls = TokenControls::new().with(control);
    let drawn = run(&lm, &[PROMPT.to_vec()], &controls, N, Choice::Sample { seed: 1, first: 0 }).unwrap();
    let mut counts: HashMap<Vec<i64>, u64> = HashMap::new();
    for hypothesis in &drawn {
        *counts.entry(said(hypothesis)).or_default() += 1;
    }
    // Rare continuations share a bin, so that each bin expects at least five.
    let (mut observed, mut probabilities, mut rare) = (vec![0], vec![0.0], 0);
    for (ids, log_p) in &expected {
        let (count, p) = (counts.remove(ids).unwrap_or(0), log_p.exp());
        if p * (N as f64) < 5.0 {
            observed[0] += count;
            probabilities[0] += p;
            rare += 1;
        } else {
            observed.push(count);
            probabilities.push(p);
        }
    }
    assert!(counts.is_empty(), "{name} drew what has no probability: {counts:?}");
    if probabilities[0] * (N as f64) < 5.0 {
        // Still too rare for a bin of its own.
        let (count, p) = (observed.remove(0), probabilities.remove(0));
        observed[0] += count;
        probabilities[0] += p;
    }
    let p = if observed.len() > 1 { chi_square(&observed, &probabilities).unwrap() } else { 1.0 };
    println!("{name}: {} continuations, {rare} of them rare, p = {p:.3}", expected.len());
    assert!(p > 0.001, "{name}: p = {p}");
}

// ---- the samplers, written out ------------------------------------------------------------------------------------

fn probabilities(scores: &[f64]) -> Vec<f64> {
    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|p| p / sum).collect()
}

/// Bans every token but those for which `keep` holds.
fn keep_only(scores: &mut [f64], keep: impl Fn(usize) -> bool) {
    for (i, score) in scores.iter_mut().enumerate() {
        if !keep(i) {
            *score = f64::NEG_INFINITY;
        }
    }
}

/// The fewest tokens, taken in this order, whose mass reaches `mass`.
fn smallest_set(order: &[usize], p: &[f64], mass: f64) -> Vec<usize> {
    let mut sum = 0.0;
    let mut set = Vec::new();
    for &i in order {
        set.push(i);
        sum += p[i];
        if sum >= mass {
            break;
        }
    }
    set
}

fn sorted(n: usize, key: impl Fn(usize) -> f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| key(a).total_cmp(&key(b)));
    order
}

fn entropy(p: &[f64]) -> f64 {
    -p.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>()
}

// ---- the tests ----------------------------------------------------------------------------------------------------

#[test]
fn no_control() {
    draws_the_distribution("the model", TokenControls::new(), |_, _| {});
}

#[test]
fn temperature() {
    draws_the_distribution("temperature", Temperature::new(0.7).unwrap(), |_, s| {
        s.iter_mut().for_each(|s| *s /= 0.7);
    });
}

#[test]
fn top_k() {
    draws_the_distribution("top-k", TopK::new(3).unwrap(), |_, s| {
        let order = sorted(s.len(), |i| -s[i]);
        keep_only(s, |i| order[..3].contains(&i));
    });
}

#[test]
fn top_p() {
    draws_the_distribution("top-p", TopP::new(0.8).unwrap(), |_, s| {
        let p = probabilities(s);
        let set = smallest_set(&sorted(s.len(), |i| -p[i]), &p, 0.8);
        keep_only(s, |i| set.contains(&i));
    });
}

#[test]
fn min_p() {
    draws_the_distribution("min-p", MinP::new(0.2).unwrap(), |_, s| {
        let p = probabilities(s);
        let least = 0.2 * p.iter().copied().fold(0.0, f64::max);
        keep_only(s, |i| p[i] >= least);
    });
}

#[test]
fn typical() {
    draws_the_distribution("typical", Typical::new(0.7).unwrap(), |_, s| {
        let p = probabilities(s);
        let h = entropy(&p);
        let set = smallest_set(&sorted(s.len(), |i| (-p[i].ln() - h).abs()), &p, 0.7);
        keep_only(s, |i| set.contains(&i));
    });
}

#[test]
fn epsilon_cutoff() {
    draws_the_distribution("epsilon", EpsilonCutoff::new(0.1).unwrap(), |_, s| {
        let p = probabilities(s);
        keep_only(s, |i| p[i] >= 0.1);
    });
}

#[test]
fn eta_cutoff() {
    draws_the_distribution("eta", EtaCutoff::new(0.1).unwrap(), |_, s| {
        let p = probabilities(s);
        let least = f64::min(0.1, 0.1f64.sqrt() * (-entropy(&p)).exp());
        keep_only(s, |i| p[i] >= least);
    });
}

/// Scores are only known up to a constant; CTRL's rule is about their signs, and the model's are log-probabilities
/// plus one. So its rule is tested in its normalised form, where nothing depends on that constant.
#[test]
fn repetition_penalty() {
    let control = RepetitionPenalty::new(1.5).unwrap().normalised();
    draws_the_distribution("repetition penalty", control, |said, s| {
        let p = probabilities(s);
        for i in 0..s.len() {
            s[i] = p[i].ln();
            if PROMPT.contains(&(i as i64)) || said.contains(&(i as i64)) {
                s[i] *= 1.5;
            }
        }
    });
}

#[test]
fn frequency_and_presence() {
    draws_the_distribution("frequency, presence", FrequencyPresence::new(0.4, 0.6).unwrap(), |said, s| {
        for (i, s) in s.iter_mut().enumerate() {
            let count = said.iter().filter(|&&token| token == i as i64).count() as f64;
            *s -= 0.4 * count + if count > 0.0 { 0.6 } else { 0.0 };
        }
    });
}

#[test]
fn no_repeated_bigram() {
    draws_the_distribution("no repeated bigram", NoRepeatNgram::new(2).unwrap(), |said, s| {
        let text = [&PROMPT[..], said].concat();
        let last = text[text.len() - 1];
        let followers: Vec<i64> = text.windows(2).filter(|w| w[0] == last).map(|w| w[1]).collect();
        keep_only(s, |i| !followers.contains(&(i as i64)));
    });
}

#[test]
fn banned_words() {
    let control = BannedWords::new([vec![4], vec![3, 2], vec![5, 5, 2]]).unwrap();
    draws_the_distribution("banned words", control, |said, s| {
        let text = [&PROMPT[..], said].concat();
        keep_only(s, |i| {
            let ends = |word: &[i64]| text.ends_with(word);
            i != 4 && !(i == 2 && (ends(&[3]) || ends(&[5, 5])))
        });
    });
}

#[test]
fn suppressed_tokens() {
    draws_the_distribution("suppressed", Suppress::new([2, 5]).unwrap(), |_, s| {
        keep_only(s, |i| i != 2 && i != 5);
    });
}

#[test]
fn logit_bias() {
    draws_the_distribution("logit bias", LogitBias::new([(2, 1.5), (3, -0.5)]).unwrap(), |_, s| {
        s[2] += 1.5;
        s[3] -= 0.5;
    });
}

#[test]
fn forced_prefix() {
    draws_the_distribution("forced prefix", ForcedPrefix::new([4, 2]).unwrap(), |said, s| {
        if let Some(&forced) = [4usize, 2].get(said.len()) {
            keep_only(s, |i| i == forced);
        }
    });
}

#[test]
fn min_length() {
    draws_the_distribution("min length", MinLength::new(3, [EOS]).unwrap(), |said, s| {
        if said.len() < 3 {
            s[EOS as usize] = f64::NEG_INFINITY;
        }
    });
}

#[test]
fn a_stack_acts_in_order() {
    let stack = TokenControls::new()
        .with(Suppress::new([5]).unwrap())
        .with(Temperature::new(1.5).unwrap())
        .with(TopK::new(3).unwrap());
    draws_the_distribution("a stack", stack, |_, s| {
        s[5] = f64::NEG_INFINITY;
        s.iter_mut().for_each(|s| *s /= 1.5);
        let order = sorted(s.len(), |i| -s[i]);
        keep_only(s, |i| order[..3].contains(&i));
    });
}

#[test]
fn log_probabilities_and_scores_are_those_enumerated() {
    let lm = lm();
    let controls = TokenControls::new().with(Temperature::new(0.5).unwrap());
    let sharp: HashMap<Vec<i64>, f64> = lm
        .enumerate_with(&PROMPT, LENGTH, &mut |_, s| s.iter_mut().for_each(|s| *s /= 0.5))
        .unwrap()
        .into_iter()
        .collect();
    let drawn = run(&lm, &[PROMPT.to_vec()], &controls, 50, Choice::Sample { seed: 3, first: 0 }).unwrap();
    for hypothesis in &drawn {
        assert!((hypothesis.score - sharp[&said(hypothesis)]).abs() < 1e-4, "{hypothesis:?}");
        let total: f64 = hypothesis.logprobs.iter().sum();
        assert!((total - lm.log_prob(&PROMPT, &hypothesis.ids).unwrap()).abs() < 1e-4, "{hypothesis:?}");
        assert_eq!(hypothesis.ids.len(), hypothesis.logprobs.len());
    }
}

#[test]
fn greedy_takes_the_best_token_each_time() {
    let lm = lm();
    let done = run(&lm, &[PROMPT.to_vec()], &TokenControls::new(), 1, Choice::Greedy).unwrap();
    let mut text = PROMPT.to_vec();
    for token in said(&done[0]) {
        let scores = lm.log_probs(&text).unwrap();
        let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
        assert_eq!(token, best as i64);
        text.push(token);
    }
}

fn stack() -> TokenControls {
    TokenControls::new()
        .with(RepetitionPenalty::new(1.2).unwrap())
        .with(NoRepeatNgram::new(3).unwrap())
        .with(Temperature::new(0.9).unwrap())
        .with(TopP::new(0.9).unwrap())
}

#[test]
fn n_together_is_n_runs() {
    let (lm, controls) = (lm(), stack());
    let prompts = [PROMPT.to_vec()];
    let together = run(&lm, &prompts, &controls, 12, Choice::Sample { seed: 5, first: 0 }).unwrap();
    for (k, hypothesis) in together.iter().enumerate() {
        let alone = run(&lm, &prompts, &controls, 1, Choice::Sample { seed: 5, first: k as u64 }).unwrap();
        assert_eq!(said(hypothesis), said(&alone[0]), "sample {k}");
    }
    let different: std::collections::HashSet<_> = together.iter().map(said).collect();
    assert!(different.len() > 1, "samples are not all the same");
}

#[test]
fn a_batch_in_any_order_is_one_by_one() {
    let (lm, controls) = (lm(), stack());
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0], vec![0, 5, 5]];
    let choice = Choice::Sample { seed: 8, first: 0 };
    let batch = run(&lm, &prompts, &controls, 3, choice).unwrap();
    let reversed: Vec<_> = prompts.iter().rev().cloned().collect();
    let backwards = run(&lm, &reversed, &controls, 3, choice).unwrap();
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = run(&lm, std::slice::from_ref(prompt), &controls, 3, choice).unwrap();
        let there = prompts.len() - 1 - i;
        for k in 0..3 {
            assert_eq!(said(&batch[3 * i + k]), said(&alone[k]), "prompt {i}, sample {k}");
            assert_eq!(said(&backwards[3 * there + k]), said(&alone[k]), "prompt {i}, sample {k}");
        }
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let lm = lm();
    let none = TokenControls::new();
    let try_prompts = |prompts: &[Vec<i64>], n| run(&lm, prompts, &none, n, Choice::Greedy).unwrap_err();
    assert!(matches!(try_prompts(&[], 1), Error::Value { .. }));
    assert!(matches!(try_prompts(&[vec![]], 1), Error::Value { .. }));
    assert!(matches!(try_prompts(&[vec![0, 6]], 1), Error::Value { .. }));
    assert!(matches!(try_prompts(&[vec![0, -1]], 1), Error::Value { .. }));
    assert!(matches!(try_prompts(&[vec![0]], 0), Error::Value { .. }));
    assert!(matches!(try_prompts(&[vec![0; 65]], 1), Error::Context { limit: 64, needed: 65 }));
}

#[test]
fn all_banned_names_the_completion_and_the_step() {
    let lm = lm();
    // After the first token nothing may follow.
    let controls = TokenControls::new()
        .with(Suppress::new([EOS]).unwrap())
        .with(BannedWords::new((0..6).flat_map(|a| (0..6).map(move |b| vec![a, b]))).unwrap());
    let error = run(&lm, &[vec![0], vec![0, 2]], &controls, 1, Choice::Greedy).unwrap_err();
    assert!(matches!(error, Error::AllBanned { step: 0, .. }), "{error}");
}

#[test]
fn nan_logits_are_caught() {
    let mut logits = vec![0.0; 2 * 2];
    logits[3] = f64::NAN;
    let config = TableLmConfig { vocab: 2, order: 1, ..TableLmConfig::default() };
    // A table that says NaN is refused where it is made, or where it is sampled.
    let found = TableLm::from_logits(&config, &logits)
        .and_then(|lm| run(&lm, &[vec![0]], &TokenControls::new(), 4, Choice::Sample { seed: 0, first: 0 }));
    assert!(found.is_err(), "{found:?}");
}

#[test]
fn generation_ends_with_the_context() {
    let config = TableLmConfig { vocab: 6, context: 5, seed: 11, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    let done = run(&lm, &[vec![0, 2, 3]], &controls, 1, Choice::Greedy).unwrap();
    assert_eq!(done[0].finish, Finish::Context);
    assert_eq!(
        done[0].ids.len(),
        3,
        "five positions hold two more tokens, and a third is predicted from the last"
    );
}
