//! Sequential Monte Carlo against enumeration.

use std::collections::HashMap;
use std::f64::consts::PI;

use controlgen_core::energy::{Energy, Text};
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, LanguageModel, PerRow, TokenControls};
use controlgen_text::controls::{LogitBias, NoRepeatNgram, Suppress, Temperature, TopK};
use controlgen_text::search::{Choice, Finish, Particles, Search, Smc, Task};
use tch::{Kind, Tensor};

use crate::told::Told;
use crate::{Corners, EOS, LENGTH, PROMPT, all, cornered, corners, fours, p_value, said, table, task};

/// What is to be sampled, with its name and γ of every continuation.
struct Case {
    name: &'static str,
    controls: TokenControls,
    energy: Option<Energy<Text>>,
    log_gamma: HashMap<Vec<i64>, f64>,
}

/// 0.8 for each 2 and 3, +∞ for 2 2.
fn cost(ids: &[i64]) -> f64 {
    if ids.windows(2).any(|w| w == [2, 2]) {
        return f64::INFINITY;
    }
    0.8 * ids.iter().filter(|&&token| token == 2 || token == 3).count() as f64
}

fn energy() -> Energy<Text> {
    Energy::from_fn(|x: &Text| {
        let Text::Hard { ids, keep } = x else { panic!("token ids") };
        let rows = ids.size()[0];
        let text = |row| -> Vec<i64> {
            let ids = Vec::<i64>::try_from(ids.get(row)).unwrap();
            let keep = keep.as_ref().map(|keep| Vec::<bool>::try_from(keep.get(row)).unwrap());
            (0..ids.len()).filter(|&t| keep.as_ref().is_none_or(|k| k[t])).map(|t| ids[t]).collect()
        };
        Ok(Tensor::from_slice(&(0..rows).map(|row| cost(&text(row))).collect::<Vec<_>>()))
    })
}

/// Without the token that ended it.
fn without_end(ids: &[i64]) -> &[i64] {
    ids.strip_suffix(&[EOS]).unwrap_or(ids)
}

fn cases(lm: &TableLm) -> Vec<Case> {
    let none = |_: &[i64], _: &mut [f64]| ();
    let biased = |_: &[i64], s: &mut [f64]| {
        s[2] += 1.2;
        s[4] -= 0.7;
    };
    let gamma = |edit: &dyn Fn(&[i64], &mut [f64]), last: &dyn Fn(&[i64]) -> f64| -> HashMap<Vec<i64>, f64> {
        let all = all(lm, false, edit).into_iter().map(|(ids, sum)| (ids.clone(), sum + last(&ids)));
        all.filter(|(_, sum)| sum.is_finite()).collect()
    };
    let bias = || LogitBias::new([(2, 1.2), (4, -0.7)]).unwrap();
    let (hot, cold) = (Temperature::new(1.6).unwrap(), Temperature::new(0.6).unwrap());
    let made = |name, controls, energy, log_gamma| Case { name, controls, energy, log_gamma };
    let both = |ids: &[i64]| fours(ids) - cost(without_end(ids));
    vec![
        made("nothing", TokenControls::new(), None, gamma(&none, &|_| 0.0)),
        made("a potential", TokenControls::new().with(bias()), None, gamma(&biased, &|_| 0.0)),
        made("a constraint", cornered(), None, gamma(&corners, &fours)),
        made("a proposal", TokenControls::new().with(hot), None, gamma(&none, &|_| 0.0)),
        made(
            "a constraint between two proposals",
            TokenControls::new().with(hot).with(PerRow(Corners)).with(cold),
            None,
            gamma(&corners, &fours),
        ),
        made("an energy", TokenControls::new(), Some(energy()), gamma(&none, &|ids| -cost(without_end(ids)))),
        made(
            "all of it",
            cornered().with(hot).with(bias()),
            Some(energy()),
            gamma(
                &|said, s| {
                    corners(said, s);
                    biased(said, s);
                },
                &both,
            ),
        ),
    ]
}

fn settings(case: &Case, particles: usize, seed: u64, on_prefixes: bool) -> Smc {
    let mut smc = Smc::new(particles, seed).unwrap();
    if let Some(energy) = &case.energy {
        smc = smc.energy(energy.clone());
    }
    if on_prefixes { smc.on_prefixes() } else { smc }
}

fn run(lm: &TableLm, case: &Case, smc: &Smc) -> Particles {
    smc.particles(&task(lm, &[PROMPT.to_vec()], &case.controls), &mut ()).unwrap().remove(0)
}

/// The weighted particles of one large run are the target, and log Z is its sum.
#[test]
fn particles_are_the_target() {
    let lm = table(5, 3);
    for case in cases(&lm) {
        let log_z = case.log_gamma.values().map(|g| g.exp()).sum::<f64>().ln();
        for (on_prefixes, threshold) in [(false, 0.5), (true, 1.0), (false, 0.0)] {
            let smc = settings(&case, 10_000, 5, on_prefixes).ess_threshold(threshold).unwrap();
            let found = run(&lm, &case, &smc);
            let mut mass: HashMap<Vec<i64>, f64> = HashMap::new();
            for (hypothesis, log_weight) in found.hypotheses.iter().zip(&found.log_weights) {
                if log_weight.is_finite() {
                    *mass.entry(said(hypothesis)).or_default() += log_weight.exp();
                    let gamma = case.log_gamma[&said(hypothesis)];
                    assert!(
                        (hypothesis.score - gamma).abs() < 1e-4,
                        "{}: {hypothesis:?}, {gamma}",
                        case.name
                    );
                }
            }
            let target = |ids: &[i64]| (case.log_gamma[ids] - log_z).exp();
            let distance: f64 =
                case.log_gamma.keys().map(|ids| (mass.get(ids).unwrap_or(&0.0) - target(ids)).abs()).sum();
            let name = format!("{}, prefixes {on_prefixes}, threshold {threshold}", case.name);
            println!(
                "{name}: total variation {:.4}, log Z {:.4} of {log_z:.4}, ESS {:.0}",
                distance / 2.0,
                found.log_normaliser,
                found.effective_sample_size()
            );
            // What as many independent draws as the particles are worth would have: E|x| of a normal x is σ √(2/π).
            let worth = found.effective_sample_size();
            let spread = |ids: &Vec<i64>| (2.0 * target(ids) * (1.0 - target(ids)) / (worth * PI)).sqrt();
            let chance: f64 = case.log_gamma.keys().map(spread).sum();
            assert!(
                distance < 2.0 * chance && distance / 2.0 < 0.08,
                "{name}: {distance}, {chance} by chance"
            );
            assert!((found.log_normaliser - log_z).abs() < 0.1, "{name}: {}", found.log_normaliser);
            assert!((found.log_weights.iter().map(|w| w.exp()).sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
}

/// What the weights exist for: token by token, the same constraint gives another distribution.
#[test]
fn without_weights_it_is_another_distribution() {
    let lm = table(5, 3);
    let case = &cases(&lm)[6];
    let log_z = case.log_gamma.values().map(|g| g.exp()).sum::<f64>().ln();
    let controls = TokenControls::new().with(LogitBias::new([(2, 1.2), (4, -0.7)]).unwrap());
    let prompts = [PROMPT.to_vec()];
    let task = Task { n: 20_000, ..task(&lm, &prompts, &controls) };
    let drawn = Choice::Sample { seed: 5, first: 0 }.run(&task, &mut ()).unwrap();
    let mut mass: HashMap<Vec<i64>, f64> = HashMap::new();
    drawn.iter().for_each(|h| *mass.entry(said(h)).or_default() += 1.0 / 20_000.0);
    let target = |ids: &[i64]| case.log_gamma.get(ids).map_or(0.0, |g| (g - log_z).exp());
    let seen: f64 = mass.iter().map(|(ids, m)| (m - target(ids)).abs()).sum();
    let unseen: f64 =
        case.log_gamma.keys().filter(|ids| !mass.contains_key(*ids)).map(|ids| target(ids)).sum();
    println!("total variation without weights {:.3}", (seen + unseen) / 2.0);
    assert!((seen + unseen) / 2.0 > 0.3);
}

type Function = Box<dyn Fn(&[i64]) -> f64>;

/// Few particles, many runs: the mean of Ẑ · Σ w f is Σ γ f, for f that look at all parts of a text. A bias of the order
/// 1/N, which a single large run hides, would show.
#[test]
fn estimates_have_no_bias() {
    let lm = table(5, 8);
    const RUNS: u64 = 1500;
    for case in cases(&lm) {
        for on_prefixes in [false, true] {
            let mut of: Vec<(String, Function)> = vec![("1".into(), Box::new(|_| 1.0))];
            for token in 0..5 {
                of.push((format!("first = {token}"), Box::new(move |x| f64::from(x[0] == token))));
                of.push((format!("last = {token}"), Box::new(move |x| f64::from(x.last() == Some(&token)))));
            }
            for len in 1..=LENGTH {
                of.push((format!("length = {len}"), Box::new(move |x| f64::from(x.len() == len))));
            }
            let mut sums = vec![(0.0, 0.0); of.len()];
            for seed in 0..RUNS {
                let found = match settings(&case, 8, seed, on_prefixes)
                    .particles(&task(&lm, &[PROMPT.to_vec()], &case.controls), &mut ())
                {
                    Ok(mut found) => found.remove(0),
                    // No particle is left: the estimate is 0.
                    Err(Error::NoParticles { particles: 8, .. }) => continue,
                    Err(error) => panic!("{error}"),
                };
                for ((_, f), (sum, squares)) in of.iter().zip(&mut sums) {
                    let alive =
                        found.hypotheses.iter().zip(&found.log_weights).filter(|(_, w)| w.is_finite());
                    let x =
                        found.log_normaliser.exp() * alive.map(|(h, w)| w.exp() * f(&said(h))).sum::<f64>();
                    (*sum, *squares) = (*sum + x, *squares + x * x);
                }
            }
            for ((what, f), (sum, squares)) in of.iter().zip(sums) {
                let expected: f64 = case.log_gamma.iter().map(|(x, g)| g.exp() * f(x)).sum();
                let mean = sum / RUNS as f64;
                let error = ((squares / RUNS as f64 - mean * mean) / RUNS as f64).sqrt();
                let z = (mean - expected) / error.max(1e-7);
                // 7 cases, 2 ways, 15 functions: α = 0.001 for all together is 4.9 for each.
                assert!(z.abs() < 4.9, "{}, {what}: {mean} ± {error} of {expected}", case.name);
            }
        }
    }
}

/// One draw a run: the distribution of completions, at α = 0.001.
#[test]
fn completions_are_drawn_from_the_target() {
    let lm = table(4, 2);
    for case in cases(&table(5, 3)).into_iter().take(1).chain(four(&lm)) {
        let lm: &TableLm = if case.name == "nothing" { &table(5, 3) } else { &lm };
        let log_z = case.log_gamma.values().map(|g| g.exp()).sum::<f64>().ln();
        let expected: Vec<(Vec<i64>, f64)> =
            case.log_gamma.iter().map(|(ids, g)| (ids.clone(), (g - log_z).exp())).collect();
        let draw = |seed| {
            let prompts = [PROMPT.to_vec()];
            let task = Task { n: 2, ..task(lm, &prompts, &case.controls) };
            let drawn = settings(&case, 200, seed, false).run(&task, &mut ()).unwrap();
            assert_eq!(drawn.iter().map(|h| (h.prompt, h.sample)).collect::<Vec<_>>(), [(0, 0), (0, 1)]);
            said(&drawn[1])
        };
        let p = p_value(&(0..2000).map(draw).collect::<Vec<_>>(), &expected);
        println!("{}: p = {p:.3}", case.name);
        assert!(p > 0.001, "{}: p = {p}", case.name);
    }
}

fn four(lm: &TableLm) -> Vec<Case> {
    let log_gamma = all(lm, false, &corners).into_iter().collect();
    let controls = cornered().with(Temperature::new(1.5).unwrap());
    vec![Case { name: "a constraint and a proposal", controls, energy: None, log_gamma }]
}

/// What is cut off is no part of the target.
#[test]
fn a_proposal_that_cuts_off_restricts_the_target() {
    let lm = table(5, 3);
    let controls = TokenControls::new().with(TopK::new(2).unwrap());
    let kept = all(&lm, false, &|_, s| {
        let mut sorted = s.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        s.iter_mut().filter(|s| **s < sorted[1]).for_each(|s| *s = f64::NEG_INFINITY);
    });
    let log_z = kept.iter().map(|(_, g)| g.exp()).sum::<f64>().ln();
    let found = Smc::new(5000, 1).unwrap();
    let found = found.particles(&task(&lm, &[PROMPT.to_vec()], &controls), &mut ()).unwrap();
    assert!((found[0].log_normaliser - log_z).abs() < 0.03, "{} {log_z}", found[0].log_normaliser);
}

/// Prompts together and alone, in any order, of different lengths.
#[test]
fn a_batch_in_any_order_is_one_by_one() {
    let lm = table(7, 5);
    let controls = cornered().with(NoRepeatNgram::new(2).unwrap()).with(Temperature::new(1.3).unwrap());
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0], vec![0, 5, 5]];
    let reversed: Vec<_> = prompts.iter().rev().cloned().collect();
    let settings = Smc::new(30, 9).unwrap().ess_threshold(0.7).unwrap();
    let run = |prompts: &[Vec<i64>]| {
        let task = Task { max_new_tokens: 9, ..task(&lm, prompts, &controls) };
        settings.particles(&task, &mut Told::new(prompts.len())).unwrap()
    };
    let (batch, backwards) = (run(&prompts), run(&reversed));
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = &run(std::slice::from_ref(prompt))[0];
        for other in [&batch[i], &backwards[prompts.len() - 1 - i]] {
            assert!((alone.log_normaliser - other.log_normaliser).abs() < 1e-5);
            for (a, b) in alone.hypotheses.iter().zip(&other.hypotheses) {
                assert_eq!((said(a), &a.finish, a.sample), (said(b), &b.finish, b.sample), "prompt {i}");
                assert!((a.score - b.score).abs() < 1e-4 || a.score == b.score);
            }
        }
    }
}

/// To stop at a sequence is to end at it as at an end token; but that it counts as said.
#[test]
fn what_a_listener_ends_is_finished() {
    let (lm, prompts) = (table(7, 1), vec![vec![0, 3], vec![0, 2, 4]]);
    let settings = Smc::new(20, 2).unwrap();
    let controls = cornered();
    let run = |eos: &[i64], stop: i64| {
        let mut told = Told { stop: vec![stop], ..Told::new(2) };
        settings
            .particles(&Task { max_new_tokens: 8, eos, ..task(&lm, &prompts, &controls) }, &mut told)
            .unwrap()
    };
    let (ended, stopped) = (run(&[6, 1], -1), run(&[1], 6));
    let mut found = 0;
    for (ended, stopped) in ended.iter().zip(&stopped) {
        assert!((ended.log_normaliser - stopped.log_normaliser).abs() < 1e-9);
        for (ended, stopped) in ended.hypotheses.iter().zip(&stopped.hypotheses) {
            assert_eq!(said(ended), said(stopped));
            assert_eq!(ended.finish == Finish::Eos(6), stopped.finish == Finish::Stopped);
            found += usize::from(stopped.finish == Finish::Stopped);
        }
    }
    assert!(found > 0);
}

#[test]
fn what_there_is_when_cancelled_is_given() {
    let (lm, none, prompts) = (table(7, 1), TokenControls::new(), [vec![0, 3], vec![0]]);
    let mut told = Told { cancel_at: 3, ..Told::new(2) };
    let task = Task { max_new_tokens: 8, eos: &[], n: 3, ..task(&lm, &prompts, &none) };
    let found = Smc::new(5, 1).unwrap().run(&task, &mut told).unwrap();
    assert_eq!((told.steps, found.len()), (3, 6));
    assert!(found.iter().all(|h| h.ids.len() == 3 && h.finish == Finish::Cancelled));
}

#[test]
fn the_context_ends_particles() {
    let config = TableLmConfig { vocab: 6, context: 5, seed: 11, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    let prompts = [PROMPT.to_vec()];
    let long = Task { max_new_tokens: usize::MAX, ..task(&lm, &prompts, &controls) };
    let found = Smc::new(4, 0).unwrap().particles(&long, &mut ()).unwrap();
    assert!(found[0].hypotheses.iter().all(|h| h.ids.len() == 3 && h.finish == Finish::Context));
    let none = Smc::new(4, 0).unwrap().particles(&Task { max_new_tokens: 0, ..long }, &mut ()).unwrap();
    assert!(none[0].hypotheses.iter().all(|h| h.ids.is_empty() && h.finish == Finish::Length));
    assert!((none[0].log_normaliser).abs() < 1e-12);
}

#[test]
fn what_cannot_be_run_is_refused() {
    assert!(matches!(Smc::new(0, 1), Err(Error::Value { .. })));
    for bad in [f64::NAN, -0.1, 1.1] {
        assert!(matches!(Smc::new(2, 1).unwrap().ess_threshold(bad), Err(Error::Value { .. })));
    }
    let (lm, none, prompts) = (table(6, 1), TokenControls::new(), [vec![0], vec![0, 2]]);
    let run = |lm: &dyn LanguageModel, controls: &TokenControls, settings: Smc| {
        settings.run(&task(lm, &prompts, controls), &mut ()).unwrap_err()
    };
    let few = || Smc::new(3, 1).unwrap();
    let huge = run(&lm, &none, Smc::new(usize::MAX, 1).unwrap()).to_string();
    assert!(huge.contains("num_particles") && huge.contains("1048576"), "{huge}");
    let banned = TokenControls::new().with(Suppress::new(0..6).unwrap());
    let error = run(&lm, &banned, few());
    assert!(matches!(error, Error::NoParticles { prompt: 0, particles: 3, step: 0 }), "{error}");
    let nan = lm.map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    let error = run(&*nan, &none, few());
    assert!(error.to_string().contains("prompt 0, step 0"), "{error}");

    let constant = |value: f64| {
        Energy::from_fn(move |x: &Text| {
            let Text::Hard { ids, .. } = x else { panic!("token ids") };
            Ok(Tensor::full([ids.size()[0]], value, (Kind::Float, ids.device())))
        })
    };
    let error = run(&lm, &none, few().energy(constant(f64::INFINITY)));
    assert!(matches!(error, Error::NoParticles { prompt: 0, particles: 3, .. }), "{error}");
    for bad in [f64::NAN, f64::NEG_INFINITY] {
        let error = run(&lm, &none, few().energy(constant(bad)).on_prefixes());
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    }
    let scalar = Energy::from_fn(|_: &Text| Ok(Tensor::from(1.0)));
    assert!(matches!(run(&lm, &none, few().energy(scalar)), Error::Shape { .. }));
}
