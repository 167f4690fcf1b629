//! The mask and the potential under sampling.

use std::collections::HashMap;

use controlgen_core::testing::{chi_square, contract};
use controlgen_core::{Pass, TokenControl, TokenControls};
use controlgen_text::controls::LexicalConstraints;
use controlgen_text::search::{BeamSearch, Choice, Finish, Hypothesis, Search, Smc, Task};

use super::*;

fn sample(lm: &TableLm, control: &LexicalConstraints, n: usize, length: usize, seed: u64) -> Vec<Hypothesis> {
    let (prompts, controls) = ([PROMPT.to_vec()], TokenControls::new().with(control.clone()));
    let task = Task {
        lm,
        prompts: &prompts,
        controls: &controls,
        pass: Pass::default(),
        max_new_tokens: length,
        eos: &[EOS],
        n,
    };
    Choice::Sample { seed, first: 0 }.run(&task, &mut ()).unwrap()
}

fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// Whether a clause is lost for good: what stands at the end may still go on with a letter, so it is left out.
fn lost(formula: &[Vec<Lit>], prompt: &str, new: &str) -> bool {
    let settled = |literal: &Lit| match *literal {
        Least(..) => false,
        Most(..) | Before(..) => !holds(literal, prompt, &(new.to_owned() + "x")),
    };
    formula.iter().any(|clause| clause.iter().all(settled))
}

/// Sampling under the mask is the model normalised anew over what loses no clause and does not end too early.
#[test]
fn the_mask_draws_the_stated_distribution() {
    const N: usize = 20_000;
    const LENGTH: usize = 4;
    for (i, formula) in formulas().iter().enumerate() {
        let lm = table(20 + i as u64);
        let prompt = text(&PROMPT);
        let edit = &mut |said: &[i64], scores: &mut [f64]| {
            let new = text(said);
            for (token, score) in scores.iter_mut().enumerate() {
                let banned = if token as i64 == EOS {
                    !unmet(formula, &prompt, &new).is_empty()
                } else {
                    lost(formula, &prompt, &(new.clone() + TOKENS[token]))
                };
                if banned {
                    *score = f64::NEG_INFINITY;
                }
            }
        };
        let expected = lm.enumerate_with(&PROMPT, LENGTH, edit).unwrap();
        let control = LexicalConstraints::new(clauses(formula), [EOS]).unwrap();
        let mut counts: HashMap<Vec<i64>, u64> = HashMap::new();
        for hypothesis in sample(&lm, &control, N, LENGTH, 1) {
            let met = unmet(formula, &prompt, &text(&hypothesis.ids)).is_empty();
            assert_eq!(hypothesis.score.is_finite(), met, "{hypothesis:?}");
            *counts.entry(said(&hypothesis)).or_default() += 1;
        }
        let (mut observed, mut probabilities) = binned(&mut counts, &expected, N as u64);
        assert!(counts.is_empty(), "{formula:?} drew what is banned: {counts:?}");
        if probabilities[0] * (N as f64) < 5.0 {
            let (count, p) = (observed.remove(0), probabilities.remove(0));
            observed[0] += count;
            probabilities[0] += p;
        }
        let p = chi_square(&observed, &probabilities).unwrap();
        assert!(p > 0.001, "{formula:?}: p = {p}");
    }
}

/// Within a length that suffices, every text that is drawn meets its clauses; words are not glued to the end.
#[test]
fn within_a_length_all_clauses_hold() {
    for (i, formula) in formulas().iter().enumerate() {
        let (lm, clauses) = (table(40 + i as u64), clauses(formula));
        for (gap, reward) in [(0, 0.0), (2, 0.0), (2, 3.0)] {
            let control =
                LexicalConstraints::new(&clauses, [EOS]).unwrap().within(9).gap(gap).reward(reward).unwrap();
            for hypothesis in sample(&lm, &control, 300, 9, 7) {
                let missing = unmet(formula, &text(&PROMPT), &text(&hypothesis.ids));
                assert!(missing.is_empty(), "{formula:?}, gap {gap}: {hypothesis:?} misses {missing:?}");
                assert!(hypothesis.score.is_finite());
            }
        }
    }
    // A word of one token is begun early enough that two more may follow it.
    let clauses = clauses(&[vec![Least(1, "a")]]);
    let control = LexicalConstraints::new(&clauses, [EOS]).unwrap().within(9).gap(2);
    for hypothesis in sample(&table(60), &control, 300, 9, 3) {
        let cut = hypothesis.ids.len().min(7);
        let first = text(&hypothesis.ids[..cut]);
        let went_on = text(&hypothesis.ids[..(cut + 1).min(hypothesis.ids.len())]);
        assert!(
            [first, went_on].iter().any(|new| unmet(&[vec![Least(1, "a")]], &text(&PROMPT), new).is_empty()),
            "{:?}",
            text(&hypothesis.ids)
        );
    }
}

/// Rewards add up to nothing: with the log-weight at the end, the score is the model's own probability.
#[test]
fn rewards_telescope() {
    for (i, formula) in formulas().iter().enumerate() {
        let (lm, clauses, prompt) = (table(80 + i as u64), clauses(formula), text(&PROMPT));
        let control = LexicalConstraints::new(&clauses, [EOS]).unwrap().reward(2.5).unwrap();
        let plain = LexicalConstraints::new(&clauses, [EOS]).unwrap();
        let mut rewarded = 0;
        for (ids, log_p) in lm.enumerate_after(&PROMPT, 4).unwrap() {
            let (mut states, mut sums) = (
                [control.start(&[PROMPT.to_vec()]).unwrap(), plain.start(&[PROMPT.to_vec()]).unwrap()],
                [0.0; 2],
            );
            for (t, &token) in ids.iter().enumerate() {
                let scores = lm.log_probs(&[&PROMPT[..], &ids[..t]].concat()).unwrap();
                for ((control, state), sum) in [&control, &plain].into_iter().zip(&mut states).zip(&mut sums)
                {
                    let scores = tch::Tensor::from_slice(&scores).to_kind(tch::Kind::Float).view([1, -1]);
                    *sum += control.score(state, scores).unwrap().double_value(&[0, token]);
                    control.advance(state, &[token]).unwrap();
                }
            }
            rewarded += usize::from(sums[0].is_finite() && (sums[0] - sums[1]).abs() > 0.1);
            let ends = [control.finish(&states[0], 0).unwrap(), plain.finish(&states[1], 0).unwrap()];
            let met = unmet(formula, &prompt, &text(&ids)).is_empty();
            assert_eq!(ends[1] == f64::NEG_INFINITY, !met);
            if met {
                assert!((sums[0] + ends[0] - log_p).abs() < 1e-4, "{formula:?}, {:?}", text(&ids));
                assert!((sums[1] + ends[1] - log_p).abs() < 1e-4, "{formula:?}, {:?}", text(&ids));
            } else {
                assert_eq!(ends[0], f64::NEG_INFINITY);
            }
        }
        let positive = formula.iter().flatten().any(|literal| matches!(literal, Least(..)));
        assert!(!positive || rewarded > 10, "{formula:?}: {rewarded} texts had a reward");
    }
}

/// Sequential Monte Carlo samples the model given the clauses, with rewards as without: Z is the probability that they
/// hold, and each token begins a text as often as it does among all texts for which they hold.
#[test]
fn smc_samples_the_model_given_the_clauses() {
    const N: usize = 8_000;
    for (i, formula) in formulas().iter().enumerate() {
        let (lm, clauses, prompts) = (table(100 + i as u64), clauses(formula), [PROMPT.to_vec()]);
        let vocab = TOKENS.len();
        let (mut z, mut begins) = (0.0, vec![0.0; vocab]);
        for (ids, log_p) in lm.enumerate_after(&PROMPT, 4).unwrap() {
            if unmet(formula, &text(&PROMPT), &text(&ids)).is_empty() {
                z += log_p.exp();
                begins[ids[0] as usize] += log_p.exp();
            }
        }
        for reward in [0.0, 2.5] {
            let control = LexicalConstraints::new(&clauses, [EOS]).unwrap().reward(reward).unwrap();
            let controls = TokenControls::new().with(control);
            let task = Task {
                lm: &lm,
                prompts: &prompts,
                controls: &controls,
                pass: Pass::default(),
                max_new_tokens: 4,
                eos: &[EOS],
                n: 1,
            };
            let found = Smc::new(N, 3).unwrap().particles(&task, &mut ()).unwrap().remove(0);
            let at = format!("{formula:?}, reward {reward}");
            // As few particles as this say what holds, where nothing leads them.
            let few = N as f64 * z;
            let error = (found.log_normaliser - z.ln()).abs();
            assert!(error < 5.0 / few.sqrt(), "{at}: {}, {}", found.log_normaliser, z.ln());
            let mut estimate = vec![0.0; vocab];
            for (hypothesis, log_weight) in found.hypotheses.iter().zip(&found.log_weights) {
                estimate[said(hypothesis)[0] as usize] += log_weight.exp();
            }
            for (token, (estimate, p)) in estimate.iter().zip(&begins).enumerate() {
                let p = p / z;
                let bound = 5.0 * (p * (1.0 - p) / few).sqrt() + 1.0 / few;
                assert!((estimate - p).abs() < bound, "{at}, token {token}: {estimate}, {p}, within {bound}");
            }
        }
    }
}

/// Beams under the mask end with the best text that meets the clauses.
#[test]
fn beams_under_the_mask() {
    for (i, formula) in formulas().iter().enumerate() {
        let (lm, prompts) = (table(i as u64), [PROMPT.to_vec()]);
        let control = LexicalConstraints::new(clauses(formula), [EOS]).unwrap();
        let controls = TokenControls::new().with(control);
        let task = Task {
            lm: &lm,
            prompts: &prompts,
            controls: &controls,
            pass: Pass::default(),
            max_new_tokens: 4,
            eos: &[EOS],
            n: 1,
        };
        let found = BeamSearch::new(2401).unwrap().run(&task, &mut ()).unwrap();
        let all = lm.enumerate_after(&PROMPT, 4).unwrap();
        let met = all.iter().filter(|(ids, _)| unmet(formula, &text(&PROMPT), &text(ids)).is_empty());
        let best = met.map(|(ids, log_p)| log_p / ids.len() as f64).fold(f64::NEG_INFINITY, f64::max);
        assert!((found[0].score - best).abs() < 1e-4, "{formula:?}: {found:?}, {best}");
    }
}

#[test]
fn the_contract() {
    for formula in formulas() {
        let clauses = clauses(&formula);
        let plain = LexicalConstraints::new(&clauses, [EOS]).unwrap();
        for control in [
            plain.clone(),
            plain.clone().reward(2.0).unwrap(),
            plain.clone().within(6).gap(1),
            plain.within(9).reward(1.0).unwrap(),
        ] {
            contract::token_control(&control, TOKENS.len() as i64)
                .unwrap_or_else(|violation| panic!("{formula:?}, {control:?}: {violation}"));
        }
    }
}
