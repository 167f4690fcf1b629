//! The proposals against their definitions, worked out in f64 token by token.

use controlgen_core::{Role, TokenControl, TokenControls};
use controlgen_text::controls::*;
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::{after, alone, left, probs, rows, tensor};

/// Scores with some tokens banned, never all, and with ties where they are rounded.
fn scores(vocab: usize) -> impl Strategy<Value = Vec<f32>> {
    let token = prop_oneof![6 => -8f32..8.0, 1 => Just(f32::NEG_INFINITY)];
    let row = (prop::collection::vec(token, vocab), 0..vocab, any::<bool>());
    row.prop_map(|(mut row, free, coarse)| {
        row[free] = 1.5;
        if coarse {
            row.iter_mut().for_each(|x| *x = x.round());
        }
        row
    })
}

/// Ids in order of falling probability, lower ids first.
fn order(p: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..p.len()).collect();
    ids.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    ids
}

/// What top-p keeps, from its definition; `None` where the mass comes too near to p to tell.
fn nucleus(row: &[f32], p: f64, keep: usize) -> Option<Vec<usize>> {
    let probs = probs(row);
    let mut mass = 0.0;
    let mut kept = Vec::new();
    for id in order(&probs) {
        if (mass - p).abs() < 2e-6 && !kept.is_empty() {
            return None;
        }
        if mass >= p && kept.len() >= keep {
            break;
        }
        mass += probs[id];
        kept.push(id);
    }
    kept.retain(|&id| row[id] > f32::NEG_INFINITY);
    kept.sort_unstable();
    Some(kept)
}

/// The tokens left have kept their scores.
fn assert_only_bans(before: &[f32], now: &[f32]) {
    for id in left(now) {
        assert_eq!(now[id], before[id]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn top_k_keeps_what_is_not_below_the_kth(row in scores(40), k in 1usize..50) {
        let now = alone(&TopK::new(k).unwrap(), &row);
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let kth = sorted[k.min(40) - 1];
        let expected: Vec<usize> = left(&row).into_iter().filter(|&id| row[id] >= kth).collect();
        prop_assert_eq!(left(&now), expected);
        assert_only_bans(&row, &now);
        let wider = TopK::new(1).unwrap().min_tokens_to_keep(k).unwrap();
        prop_assert_eq!(alone(&wider, &row), now);
    }

    #[test]
    fn top_p_keeps_the_nucleus(row in scores(40), p in 0f64..1.0, keep in 1usize..6) {
        let Some(expected) = nucleus(&row, p, keep) else { return Ok(()) };
        let control = TopP::new(p).unwrap().min_tokens_to_keep(keep).unwrap();
        let now = alone(&control, &row);
        prop_assert_eq!(left(&now), expected);
        assert_only_bans(&row, &now);
    }

    /// The two things that define the nucleus, apart from how it is found.
    #[test]
    fn the_nucleus_has_the_mass_and_no_less_would_do(row in scores(60), p in 0.01f64..0.99) {
        let probs = probs(&row);
        let kept = left(&alone(&TopP::new(p).unwrap(), &row));
        let mass: f64 = kept.iter().map(|&id| probs[id]).sum();
        let least = kept.iter().map(|&id| probs[id]).fold(1.0, f64::min);
        prop_assert!(mass >= p - 1e-6, "{} < {}", mass, p);
        prop_assert!(mass - least < p + 1e-6, "{} without its least token", mass - least);
        let gone = (0..60).filter(|id| !kept.contains(id)).map(|id| probs[id]).fold(0.0, f64::max);
        prop_assert!(gone <= least);
    }

    #[test]
    fn min_p_keeps_what_is_near_the_best(row in scores(40), p in 0f64..=1.0, keep in 1usize..6) {
        let probs = probs(&row);
        let best = probs.iter().copied().fold(0.0, f64::max);
        prop_assume!(probs.iter().all(|&x| (x - p * best).abs() > 1e-6 * p * best || x == best));
        let kept = left(&alone(&MinP::new(p).unwrap().min_tokens_to_keep(keep).unwrap(), &row));
        let kth = probs[order(&probs)[keep - 1]];
        let stays = |id: &usize| probs[*id] >= p * best || probs[*id] >= kth;
        let expected: Vec<usize> = left(&row).into_iter().filter(stays).collect();
        prop_assert_eq!(kept, expected);
    }

    #[test]
    fn typical_keeps_what_is_nearest_to_the_entropy(row in scores(40), mass in 0.02f64..0.98) {
        let probs = probs(&row);
        let information = |id: usize| -probs[id].ln();
        let entropy: f64 = left(&row).into_iter().map(|id| probs[id] * information(id)).sum();
        let far = |id: usize| (information(id) - entropy).abs();
        let mut ids = left(&row);
        ids.sort_by(|&a, &b| far(a).total_cmp(&far(b)));
        // Equal but for rounding, or the mass too near to tell.
        let mut sum = 0.0;
        let mut last = ids[0];
        for &id in &ids {
            prop_assume!((sum - mass).abs() > 2e-6);
            if sum < mass {
                last = id;
            }
            sum += probs[id];
        }
        prop_assume!(ids.iter().all(|&id| row[id] == row[last] || (far(id) - far(last)).abs() > 1e-5));
        let expected: Vec<usize> =
            left(&row).into_iter().filter(|&id| row[id] == row[last] || far(id) <= far(last)).collect();
        prop_assert_eq!(left(&alone(&Typical::new(mass).unwrap(), &row)), expected);
    }

    #[test]
    fn cutoffs_keep_what_is_probable(row in scores(40), epsilon in 1e-4f64..0.5, keep in 1usize..6) {
        let probs = probs(&row);
        let entropy: f64 = left(&row).into_iter().map(|id| -probs[id] * probs[id].ln()).sum();
        let eta = epsilon.min(epsilon.sqrt() * (-entropy).exp());
        let kth = probs[order(&probs)[keep - 1]];
        let expected = |least: f64| -> Vec<usize> {
            left(&row).into_iter().filter(|&id| probs[id] >= least || probs[id] >= kth).collect()
        };
        prop_assume!(probs.iter().all(|&p| (p / epsilon - 1.0).abs() > 1e-5 && (p / eta - 1.0).abs() > 1e-5));
        let epsilon_cutoff = EpsilonCutoff::new(epsilon).unwrap().min_tokens_to_keep(keep).unwrap();
        prop_assert_eq!(left(&alone(&epsilon_cutoff, &row)), expected(epsilon));
        let eta_cutoff = EtaCutoff::new(epsilon).unwrap().min_tokens_to_keep(keep).unwrap();
        prop_assert_eq!(left(&alone(&eta_cutoff, &row)), expected(eta));
    }

    /// Cutting again changes nothing where the cut does not depend on the mass that is left.
    #[test]
    fn top_k_and_min_p_are_idempotent(row in scores(40), k in 1usize..50, p in 0f64..=1.0) {
        let once = alone(&TopK::new(k).unwrap(), &row);
        prop_assert_eq!(&alone(&TopK::new(k).unwrap(), &once), &once);
        let once = alone(&MinP::new(p).unwrap(), &row);
        prop_assert_eq!(&alone(&MinP::new(p).unwrap(), &once), &once);
    }

    #[test]
    fn towards_zero_temperature_is_greedy(row in scores(40)) {
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let count = row.iter().filter(|&&x| x == best).count();
        for temperature in [1e-6, 1e-30] {
            let p = probs(&alone(&Temperature::new(temperature).unwrap(), &row));
            for (id, &p) in p.iter().enumerate() {
                let expected = if row[id] == best { 1.0 / count as f64 } else { 0.0 };
                prop_assert!((p - expected).abs() < 1e-9, "token {}: {}", id, p);
            }
        }
    }

    /// What a row gets does not depend on the others.
    #[test]
    fn permuted_rows_give_permuted_results(
        batch in prop::collection::vec(scores(30), 5),
        p in 0.05f64..0.95,
        order in Just([0usize, 1, 2, 3, 4]).prop_shuffle(),
    ) {
        let stack = |p: f64| TokenControls::new()
            .with(Temperature::new(1.0 + p).unwrap())
            .with(TopK::new(20).unwrap())
            .with(TopP::new(p).unwrap())
            .with(MinP::new(0.01).unwrap())
            .with(Typical::new(p).unwrap())
            .with(EtaCutoff::new(1e-3).unwrap());
        let prompts = vec![vec![0]; 5];
        let none = vec![vec![]; 5];
        let now = rows(&after(&stack(p), &prompts, &none, &tensor(&batch)).unwrap());
        let mixed: Vec<Vec<f32>> = order.iter().map(|&i| batch[i].clone()).collect();
        let mixed = rows(&after(&stack(p), &prompts, &none, &tensor(&mixed)).unwrap());
        for (i, row) in order.into_iter().zip(mixed) {
            prop_assert_eq!(&row, &now[i]);
        }
    }
}

/// Rows of a real vocabulary's size: nuclei within the head that is put in order first, beyond it, ties across its
/// edge, and rows that are mostly banned.
#[test]
fn large_rows_equal_the_full_sort() {
    tch::manual_seed(1);
    let vocab = 49_152;
    let sharp = Tensor::randn([2, vocab], (Kind::Float, tch::Device::Cpu)) * 4.0;
    let flat = Tensor::randn([2, vocab], (Kind::Float, tch::Device::Cpu)) * 0.5;
    // As a model in bf16 gives them: many tokens tied.
    let coarse = (Tensor::randn([2, vocab], (Kind::Float, tch::Device::Cpu)) * 3.0).to_kind(Kind::BFloat16);
    let constant = Tensor::zeros([1, vocab], (Kind::Float, tch::Device::Cpu));
    let few = Tensor::full([1, vocab], f64::NEG_INFINITY, (Kind::Float, tch::Device::Cpu));
    few.narrow(1, 700, 40).copy_(&sharp.narrow(0, 0, 1).narrow(1, 0, 40));
    let _ = few.get(0).get(5).fill_(-200.0);
    let logits = Tensor::cat(&[sharp, flat, coarse.to_kind(Kind::Float), constant, few], 0);
    let batch = rows(&logits);
    let (prompts, none) = (vec![vec![0]; batch.len()], vec![vec![]; batch.len()]);
    let mut compared = 0;
    for p in [0.0, 0.3, 0.9, 0.99, 0.9999] {
        for keep in [1, 600] {
            let control = TopP::new(p).unwrap().min_tokens_to_keep(keep).unwrap();
            let now = rows(&after(&control, &prompts, &none, &logits).unwrap());
            for (i, (now, row)) in now.iter().zip(&batch).enumerate() {
                let Some(expected) = nucleus(row, p, keep) else { continue };
                assert_eq!(left(now), expected, "p {p}, keep {keep}, row {i}");
                assert_only_bans(row, now);
                compared += 1;
            }
        }
    }
    assert!(compared >= 50, "{compared}");
}

#[test]
fn top_p_one_and_zero() {
    let row = [0.5, -80.0, 2.0, 2.0, f32::NEG_INFINITY, -300.0];
    assert_eq!(alone(&TopP::new(1.0).unwrap(), &row), row);
    assert_eq!(left(&alone(&TopP::new(0.0).unwrap(), &row)), [2]);
    assert_eq!(left(&alone(&TopP::new(0.0).unwrap().min_tokens_to_keep(3).unwrap(), &row)), [0, 2, 3]);
    // Zeros of both signs are ties.
    assert_eq!(left(&alone(&TopP::new(0.5).unwrap(), &[0.0, -0.0, 0.0, -0.0])), [0, 1]);
}

#[test]
fn rows_without_a_distribution_stay_as_they_are() {
    let batch = tensor(&[vec![f32::NEG_INFINITY; 6], vec![1.0, f32::NAN, 0.0, 3.0, 2.0, 1.0], vec![1.0; 6]]);
    let stack = TokenControls::new()
        .with(RepetitionPenalty::new(1.2).unwrap().normalised())
        .with(Temperature::new(0.5).unwrap())
        .with(TopK::new(3).unwrap())
        .with(TopP::new(0.4).unwrap())
        .with(MinP::new(0.1).unwrap())
        .with(Typical::new(0.4).unwrap())
        .with(EpsilonCutoff::new(0.1).unwrap())
        .with(EtaCutoff::new(0.1).unwrap());
    let now = rows(&after(&stack, &vec![vec![1]; 3], &vec![vec![]; 3], &batch).unwrap());
    assert!(left(&now[0]).is_empty() && now[0].iter().all(|x| !x.is_nan()), "{:?}", now[0]);
    assert!(now[1].iter().any(|x| x.is_nan()), "{:?}", now[1]);
    assert!(!left(&now[2]).is_empty() && now[2].iter().all(|x| !x.is_nan()), "{:?}", now[2]);
}

#[test]
fn roles() {
    fn proposal(control: &impl TokenControl) -> bool {
        control.role() == Role::Proposal
    }
    assert!(proposal(&Temperature::new(1.0).unwrap()) && proposal(&TopK::new(1).unwrap()));
    assert!(proposal(&TopP::new(0.5).unwrap()) && proposal(&MinP::new(0.5).unwrap()));
    assert!(proposal(&Typical::new(0.5).unwrap()) && proposal(&EpsilonCutoff::new(0.5).unwrap()));
    assert!(proposal(&EtaCutoff::new(0.5).unwrap()));
    assert!(!proposal(&RepetitionPenalty::new(1.5).unwrap()) && !proposal(&Suppress::new([1]).unwrap()));
    assert!(!proposal(&BannedWords::new([[1]]).unwrap()) && !proposal(&ForcedPrefix::new([1]).unwrap()));
}
