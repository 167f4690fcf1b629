//! Energies of texts: against enumeration, against definitions written out, and against scoring.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::folder;
use controlgen_core::energy::{Energy, EnergyFn, Objective, Text, gradient, langevin, rerank};
use controlgen_core::noise::Noise;
use controlgen_core::testing::{TableLm, TableLmConfig, contract, left_padded, right_padded};
use controlgen_core::{Error, LanguageModel, Pass, Placement};
use controlgen_text::energies::{Keyword, Nll, TokenLogits, over_logits};
use controlgen_text::{models, score_completions};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

#[track_caller]
fn close(found: &Tensor, expected: &[f64], tolerance: f64) {
    let found = numbers(found);
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!(a == b || (a - b).abs() <= tolerance, "{a} instead of {b}");
    }
}

fn table() -> TableLm {
    let placement = Placement::CPU.with_kind(Kind::Double);
    TableLm::new(&TableLmConfig { vocab: 4, scale: 1.5, seed: 9, placement, ..TableLmConfig::default() })
        .unwrap()
}

/// Distributions `[rows, len, vocab]`, all different.
fn soft(rows: i64, len: i64, vocab: i64) -> Tensor {
    ((Tensor::arange(rows * len * vocab, DOUBLE_CPU) * 1.7).sin() * 2.0)
        .view([rows, len, vocab])
        .softmax(-1, None)
}

#[test]
fn the_likelihoods_of_all_texts_sum_to_one() {
    let lm = table();
    let nll = Nll::new(&lm).unwrap();
    let (texts, truth): (Vec<Vec<i64>>, Vec<f64>) = lm.enumerate(4).unwrap().into_iter().unzip();
    let expected: Vec<f64> = truth.iter().map(|log_p| -log_p).collect();
    assert!(texts.iter().any(|text| text.len() < 4), "no text is padded");
    // Whatever fills the shorter ones, and on whichever side.
    for pad in [0, 3] {
        for (ids, keep) in [left_padded(&texts, pad).unwrap(), right_padded(&texts, pad).unwrap()] {
            let energy = nll.energy(&Text::hard(ids).keeping(keep)).unwrap();
            close(&energy, &expected, 1e-12);
            let total = (-energy).exp().sum(Kind::Double).double_value(&[]);
            assert!((total - 1.0).abs() < 1e-12, "{total}");
        }
    }
    // Padding in the middle.
    let ids = Tensor::from_slice2(&[[2i64, 0, 3, 0, 2]]);
    let keep = Tensor::from_slice(&[true, false, true, false, true]).unsqueeze(0);
    let energy = nll.energy(&Text::hard(ids).keeping(keep)).unwrap();
    close(&energy, &[-lm.log_prob(&[0], &[2, 3, 2]).unwrap()], 1e-12);
}

#[test]
fn continuations_are_scored_after_their_prompt() {
    let lm = table();
    let prompt = [0, 2, 3];
    let (texts, truth): (Vec<Vec<i64>>, Vec<f64>) =
        lm.enumerate_after(&prompt, 3).unwrap().into_iter().unzip();
    let (ids, keep) = right_padded(&texts, 1).unwrap();
    let energy = Nll::after(&lm, &prompt).unwrap().energy(&Text::hard(ids).keeping(keep)).unwrap();
    close(&energy, &truth.iter().map(|log_p| -log_p).collect::<Vec<_>>(), 1e-12);
    // One token, which needs no pass of its own.
    let one =
        Nll::after(&lm, &prompt).unwrap().energy(&Text::hard(Tensor::from_slice2(&[[1i64], [2]]))).unwrap();
    let expected = [1, 2].map(|token| -lm.log_prob(&prompt, &[token]).unwrap());
    close(&one, &expected, 1e-12);
}

#[test]
fn one_hot_soft_tokens_are_tokens() {
    let lm = table();
    let texts = [[2i64, 3, 1], [3, 3, 0], [0, 1, 2]];
    let one_hot = Tensor::from_slice2(&texts).one_hot(4).to_kind(Kind::Double);
    let keep = Tensor::from_slice2(&[[true, true, true], [false, true, true], [true, true, false]]);
    let word = Keyword::new([&[3][..], &[0, 1]]).unwrap();
    for energy in [Energy::new(Nll::new(&lm).unwrap()), Energy::new(word)] {
        for keep in [None, Some(&keep)] {
            let padded = |text: Text| match keep {
                Some(keep) => text.keeping(keep.shallow_clone()),
                None => text,
            };
            let hard = energy.energy(&padded(Text::hard(Tensor::from_slice2(&texts)))).unwrap();
            let soft = energy.energy(&padded(Text::soft(one_hot.shallow_clone()))).unwrap();
            close(&soft, &numbers(&hard), 1e-5);
        }
    }
}

/// Σₜ Σᵥ −πₜ(v) log p(v | e(πₜ₋₁)) for a model of one token back, in plain numbers.
#[test]
fn soft_tokens_cost_their_expected_cross_entropy() {
    let (v, len) = (3usize, 4usize);
    let placement = Placement::CPU.with_kind(Kind::Double);
    let w: Vec<f64> = (0..v * v).map(|i| (i as f64 * 2.3).cos()).collect();
    let config = TableLmConfig { vocab: 3, order: 1, bos: Some(0), placement, ..TableLmConfig::default() };
    let lm = TableLm::from_logits(&config, &w).unwrap();
    let probs = soft(2, len as i64, v as i64);
    let pi = numbers(&probs);
    let expected: Vec<f64> = (0..2)
        .map(|row| {
            let at = |t: usize| &pi[(row * len + t) * v..][..v];
            let bos = [1.0, 0.0, 0.0];
            (0..len)
                .map(|t| {
                    let before = if t == 0 { &bos[..] } else { at(t - 1) };
                    let logits: Vec<f64> =
                        (0..v).map(|out| (0..v).map(|x| w[out * v + x] * before[x]).sum()).collect();
                    let log_z = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
                    at(t).iter().zip(&logits).map(|(p, z)| p * (log_z - z)).sum::<f64>()
                })
                .sum()
        })
        .collect();
    close(&Nll::new(&lm).unwrap().energy(&Text::soft(probs)).unwrap(), &expected, 1e-12);
}

#[test]
fn a_real_architecture_is_scored_as_by_scoring() {
    tch::set_num_threads(1);
    for name in ["llama_gqa_tied", "gpt2_gelu_new"] {
        let lm = models::open(&folder(name), Placement::CPU).unwrap();
        let (prompt, texts) = ([5, 9, 2], vec![vec![3, 8, 1, 7], vec![6], vec![2, 2]]);
        let scored = score_completions(&*lm, &prompt, &texts, &Pass::default()).unwrap();
        let expected: Vec<f64> = scored.iter().map(|scored| -scored.total()).collect();
        let nll = Nll::after(&*lm, &prompt).unwrap();
        for (ids, keep) in [left_padded(&texts, 4).unwrap(), right_padded(&texts, 4).unwrap()] {
            close(&nll.energy(&Text::hard(ids).keeping(keep)).unwrap(), &expected, 1e-4);
        }
    }
}

#[test]
fn a_keyword_of_one_token_is_as_present_as_enumeration_says() {
    let (len, v) = (3usize, 4usize);
    let probs = soft(2, len as i64, v as i64);
    let pi = numbers(&probs);
    let expected: Vec<f64> = (0..2)
        .map(|row| {
            let p = |text: &[usize]| -> f64 {
                text.iter().enumerate().map(|(t, &token)| pi[(row * len + t) * v + token]).product()
            };
            let texts = (0..v * v * v).map(|i| [i.div_euclid(v * v), i.div_euclid(v) % v, i % v]);
            -texts.filter(|text| text.contains(&2)).map(|text| p(&text)).sum::<f64>().ln()
        })
        .collect();
    close(&Keyword::new([[2]]).unwrap().energy(&Text::soft(probs)).unwrap(), &expected, 1e-9);
}

#[test]
fn a_keyword_of_several_tokens_is_its_formula() {
    let probs = soft(1, 4, 5);
    let pi = |t: i64, token: i64| probs.double_value(&[0, t, token]);
    let windows = (0..3).map(|t| pi(t, 1) * pi(t + 1, 3)).chain((0..4).map(|t| pi(t, 4)));
    let expected = -(1.0 - windows.map(|p| 1.0 - p).product::<f64>()).ln();
    let word = Keyword::new([&[1, 3][..], &[4]]).unwrap();
    close(&word.energy(&Text::soft(probs.shallow_clone())).unwrap(), &[expected], 1e-12);
    // A window with padding in it does not count.
    let keep = Tensor::from_slice(&[true, true, false, true]).unsqueeze(0);
    let windows = [pi(0, 1) * pi(1, 3), pi(0, 4), pi(1, 4), pi(3, 4)];
    let expected = -(1.0 - windows.iter().map(|p| 1.0 - p).product::<f64>()).ln();
    close(&word.energy(&Text::soft(probs.shallow_clone()).keeping(keep)).unwrap(), &[expected], 1e-12);
    let none = Tensor::from_slice(&[false; 4]).unsqueeze(0);
    close(&word.energy(&Text::soft(probs).keeping(none)).unwrap(), &[f64::INFINITY], 0.0);
}

#[test]
fn a_text_says_a_keyword_or_pays_for_what_is_missing() {
    let word = Keyword::new([[1, 2, 3]]).unwrap();
    let texts = Tensor::from_slice2(&[[0i64, 1, 2, 3], [1, 2, 0, 3], [0, 1, 2, 2], [3, 0, 0, 1]]);
    let said = numbers(&word.energy(&Text::hard(texts)).unwrap());
    // Windows: (1,2,0) lacks one token, (2,0,3) two; (0,1,2) three, (1,2,2) one; (3,0,0) and (0,0,1) three each.
    let missing = |windows: &[f64]| -windows.iter().map(|n| (-20.0 * n).exp()).sum::<f64>().ln();
    let expected = [0.0, missing(&[1.0, 2.0]), missing(&[3.0, 1.0]), missing(&[3.0, 3.0])];
    for (found, expected) in said.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
    }
}

#[test]
fn they_keep_the_contract() {
    let lm = table();
    let nll = Nll::after(&lm, &[0, 3]).unwrap();
    let word = Keyword::new([&[3][..], &[1, 2]]).unwrap();
    let text = || Text::soft(soft(3, 4, 4));
    let keep = Tensor::from_slice2(&[
        [true, true, true, true],
        [false, false, true, true],
        [true, true, true, false],
    ]);
    let hard = Text::hard(Tensor::from_slice2(&[[2i64, 3, 1], [3, 3, 0], [0, 1, 2]]));
    contract::energy(&nll, &text()).unwrap();
    contract::energy(&nll, &text().keeping(keep.shallow_clone())).unwrap();
    contract::energy(&nll, &hard).unwrap();
    contract::energy(&word, &text()).unwrap();
    contract::energy(&word, &text().keeping(keep.shallow_clone())).unwrap();
    contract::energy(&word, &hard).unwrap();
    let both = 2.0 * Energy::new(word) + Energy::new(nll);
    contract::energy(&both, &text().keeping(keep.shallow_clone())).unwrap();
    let logits = TokenLogits { logits: soft(3, 4, 4) * 5.0, keep: Some(keep) };
    contract::energy(&over_logits(both, 0.7), &logits).unwrap();
    tch::set_num_threads(1);
    let lm = models::open(&folder("qwen3"), Placement::CPU).unwrap();
    let vocab = lm.spec().vocab;
    let text = Text::soft(soft(2, 4, vocab).to_kind(Kind::Float));
    contract::energy(&Nll::after(&*lm, &[1, 2]).unwrap(), &text).unwrap();
}

#[test]
fn one_energy_ranks_bounds_and_steers() {
    let lm = table();
    let nll = Energy::new(Nll::new(&lm).unwrap());
    let says = Energy::new(Keyword::new([[3, 2]]).unwrap());
    // Ranking: the likeliest text first, and among those that say it.
    let (texts, truth): (Vec<Vec<i64>>, Vec<f64>) =
        lm.enumerate(4).unwrap().into_iter().filter(|(text, _)| text.len() == 4).unzip();
    let ids = Tensor::from_slice(&texts.concat()).view([-1, 4]);
    let order = rerank(&nll, &Text::hard(ids.shallow_clone())).unwrap();
    assert!(order.windows(2).all(|pair| truth[pair[0]] >= truth[pair[1]] - 1e-12));
    let objective: Objective<Text> = nll.clone() + says.clone().at_most(0.1);
    let best = &texts[rerank(&objective, &Text::hard(ids)).unwrap()[0]];
    let saying = |text: &[i64]| text.windows(2).any(|pair| pair == [3, 2]);
    let expected = order.iter().map(|&i| &texts[i]).find(|text| saying(text)).unwrap();
    assert_eq!(best, expected);
    // Steering: one step is its formula, and a chain of them says the word.
    let energy = over_logits(nll + 4.0 * says, 1.0);
    let mut x = TokenLogits::new(soft(3, 4, 4));
    let mut noise = Noise::seeded(1).streams(3);
    let z = Tensor::stack(
        &noise
            .clone()
            .iter_mut()
            .map(|s| s.normal(&[4, 4], Kind::Double, tch::Device::Cpu).unwrap())
            .collect::<Vec<_>>(),
        0,
    );
    let (_, slope) = gradient(&energy, &x).unwrap();
    let expected = &x.logits - slope * 0.02 + z * 0.2;
    let (before, next) = langevin(&energy, &x, 0.02, &mut noise).unwrap();
    assert!((&next.logits - expected).abs().max().double_value(&[]) < 1e-12);
    x = next;
    for _ in 0..600 {
        x = langevin(&energy, &x, 0.02, &mut noise).unwrap().1;
    }
    let after = energy.energy(&x).unwrap();
    assert!(after.mean(Kind::Double).double_value(&[]) < before.mean(Kind::Double).double_value(&[]) - 1.0);
    let Text::Hard { ids, .. } = x.hard().unwrap() else { panic!("no ids") };
    let said: Vec<Vec<i64>> = Vec::try_from(ids).unwrap();
    assert!(said.iter().all(|text| saying(text)), "{said:?}");
}

#[test]
fn bad_input_is_refused_by_type() {
    let lm = table();
    let nll = Nll::new(&lm).unwrap();
    let hard = |rows: &[[i64; 2]]| Text::hard(Tensor::from_slice2(rows));
    assert!(
        matches!(nll.energy(&hard(&[[1, 4]])), Err(Error::Value { .. })),
        "the last token is checked too"
    );
    assert!(matches!(nll.energy(&hard(&[[-1, 0]])), Err(Error::Value { .. })));
    assert!(matches!(nll.energy(&Text::hard(Tensor::from_slice(&[1i64]))), Err(Error::Shape { .. })));
    assert!(matches!(nll.energy(&Text::soft(soft(1, 2, 5))), Err(Error::Shape { .. })));
    assert!(matches!(nll.energy(&Text::soft(soft(1, 2, 4).get(0))), Err(Error::Shape { .. })));
    assert!(matches!(nll.energy(&Text::soft(soft(1, 2, 4).to_kind(Kind::Int64))), Err(Error::Kind { .. })));
    let keep = Tensor::from_slice2(&[[true, true, true]]);
    assert!(matches!(nll.energy(&hard(&[[1, 2]]).keeping(keep.shallow_clone())), Err(Error::Shape { .. })));
    let long = Text::hard(Tensor::zeros([1, 65], (Kind::Int64, tch::Device::Cpu)));
    assert!(matches!(nll.energy(&long), Err(Error::Context { .. })));
    assert!(matches!(Nll::after(&lm, &[]), Err(Error::Value { .. })));
    assert!(matches!(Nll::after(&lm, &[4]), Err(Error::Value { .. })));
    assert!(matches!(Nll::after(&lm, &[0; 65]), Err(Error::Context { .. })));
    let dumb = TableLm::new(&TableLmConfig { bos: None, ..TableLmConfig::default() }).unwrap();
    assert!(matches!(Nll::new(&dumb), Err(Error::Value { .. })));
    let none: [[i64; 1]; 0] = [];
    assert!(matches!(Keyword::new(none), Err(Error::Value { .. })));
    assert!(matches!(Keyword::new([&[][..]]), Err(Error::Value { .. })));
    assert!(matches!(Keyword::new([[0; 31]]), Err(Error::Value { .. })));
    assert!(matches!(Keyword::new([[-1]]), Err(Error::Value { .. })));
    let word = Keyword::new([[4]]).unwrap();
    assert!(matches!(word.energy(&Text::soft(soft(1, 2, 4))), Err(Error::Value { .. })));
    assert!(matches!(word.energy(&hard(&[[1, 2]]).keeping(keep)), Err(Error::Shape { .. })));
    let x = TokenLogits::new(soft(1, 2, 4));
    assert!(matches!(x.soft(0.0), Err(Error::Value { .. })));
    assert!(matches!(TokenLogits::new(soft(1, 2, 4).get(0)).hard(), Err(Error::Shape { .. })));
}
