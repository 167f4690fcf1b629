//! Choosing tokens.

use controlgen_core::Error;
use controlgen_text::sample::{at_step, categorical, greedy, log_prob_of};
use proptest::prelude::*;
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};
use tch::{Kind, Tensor};

use super::{probs, rows, tensor};

/// The 0.999 quantile of the chi-square distribution, by Wilson and Hilferty (1931): 0.1 % off at 10 degrees.
fn chi_square_limit(degrees: usize) -> f64 {
    let k = degrees as f64;
    let a = 2.0 / (9.0 * k);
    k * (1.0 - a + 3.0902 * a.sqrt()).powi(3)
}

/// Pearson's statistic and its degrees of freedom; cells that expect fewer than 5 are joined.
fn chi_square(counts: &[u64], expected: &[f64]) -> (f64, usize) {
    let draws: u64 = counts.iter().sum();
    let (mut statistic, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        cells += 1;
    };
    for (&count, p) in counts.iter().zip(expected) {
        let mean = p * draws as f64;
        if mean < 5.0 {
            rest = (rest.0 + count as f64, rest.1 + mean);
        } else {
            add(count as f64, mean);
        }
    }
    if rest.1 >= 5.0 {
        add(rest.0, rest.1);
    }
    (statistic, cells - 1)
}

#[test]
fn draws_follow_the_softmax() {
    for vocab in [5, 40, 255, 256, 257, 1000] {
        let mut rng = ChaCha12Rng::seed_from_u64(vocab as u64);
        let mut row: Vec<f32> = (0..vocab).map(|_| rng.random_range(-3.0..3.0)).collect();
        row.iter_mut().step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
        let mut counts = vec![0; vocab];
        let batch = tensor(&vec![row.clone(); 100]);
        for _ in 0..1000 {
            let uniforms: Vec<f64> = (0..100).map(|_| rng.random()).collect();
            for token in categorical(&batch, &uniforms).unwrap() {
                counts[token as usize] += 1;
            }
        }
        assert!(counts.iter().step_by(7).all(|&count| count == 0), "a banned token was drawn");
        let (statistic, degrees) = chi_square(&counts, &probs(&row));
        let limit = chi_square_limit(degrees);
        assert!(statistic < limit, "V = {vocab}: {statistic} over {limit}, {degrees} degrees of freedom");
        // The test can fail: against another distribution it does.
        let other: Vec<f32> = row.iter().map(|x| x * 0.95).collect();
        let (statistic, _) = chi_square(&counts, &probs(&other));
        assert!(statistic > limit, "V = {vocab}: {statistic} under {limit}");
    }
}

proptest! {
    /// The token is where the cumulative probability, summed in f64, passes the number.
    #[test]
    fn a_number_finds_its_token(
        row in prop::collection::vec(prop_oneof![4 => -6f32..6.0, 1 => Just(f32::NEG_INFINITY)], 1..700),
        free in any::<prop::sample::Index>(),
        u in 0f64..1.0,
    ) {
        let mut row = row;
        let free = free.index(row.len());
        row[free] = 0.5;
        let token = categorical(&tensor(&[row.clone()]), &[u]).unwrap()[0] as usize;
        prop_assert!(row[token] > f32::NEG_INFINITY);
        let p = probs(&row);
        let before: f64 = p[..token].iter().sum();
        prop_assert!(before <= u + 1e-6 && u < before + p[token] + 1e-6, "{} .. {}", before, before + p[token]);
    }
}

#[test]
fn the_ends_of_the_unit_interval() {
    let ban = f32::NEG_INFINITY;
    for vocab in [4, 300, 1024] {
        let mut row = vec![ban; vocab];
        row[1] = 0.3;
        row[vocab - 2] = -1.0;
        let batch = tensor(&[row.clone(), row]);
        let last = 1.0f64.next_down();
        assert_eq!(categorical(&batch, &[0.0, last]).unwrap(), [1, vocab as i64 - 2]);
    }
    // One token left, whatever the number.
    let only = tensor(&[vec![ban, ban, -500.0]]);
    assert_eq!(categorical(&only, &[0.7]).unwrap(), [2]);
}

/// A row's token depends on its scores and number alone, to the bit.
#[test]
fn the_batch_does_not_matter() {
    let mut rng = ChaCha12Rng::seed_from_u64(11);
    tch::manual_seed(3);
    for vocab in [97, 1000, 49_152] {
        let batch = Tensor::randn([8, vocab], (Kind::Float, tch::Device::Cpu)) * 3.0;
        for _ in 0..20 {
            let uniforms: Vec<f64> = (0..8).map(|_| rng.random()).collect();
            let together = categorical(&batch, &uniforms).unwrap();
            let reversed: Vec<f64> = uniforms.iter().rev().copied().collect();
            let mut backwards = categorical(&batch.flip([0]), &reversed).unwrap();
            backwards.reverse();
            assert_eq!(together, backwards);
            for (i, &u) in uniforms.iter().enumerate() {
                let alone = categorical(&batch.narrow(0, i as i64, 1), &[u]).unwrap();
                assert_eq!(alone[0], together[i]);
            }
        }
    }
}

#[test]
fn greedy_takes_the_first_best() {
    let batch = tensor(&[vec![0.0, 3.0, 3.0, 1.0], vec![-9.0, f32::NEG_INFINITY, -8.0, -8.0]]);
    assert_eq!(greedy(&batch).unwrap(), [1, 2]);
}

#[test]
fn log_probabilities() {
    tch::manual_seed(5);
    let batch = Tensor::randn([4, 1000], (Kind::Float, tch::Device::Cpu)) * 4.0 + 30.0;
    let tokens = [0, 999, 500, 7];
    let found = log_prob_of(&batch, &tokens).unwrap();
    let exact = batch.to_kind(Kind::Double).log_softmax(-1, Kind::Double);
    for (row, (&token, found)) in tokens.iter().zip(found).enumerate() {
        let exact = exact.double_value(&[row as i64, token]);
        assert!((found - exact).abs() < 1e-6, "{found} {exact}");
    }
    let banned = tensor(&[vec![0.0, f32::NEG_INFINITY]]);
    assert_eq!(log_prob_of(&banned, &[1]).unwrap(), [f64::NEG_INFINITY]);
    assert_eq!(log_prob_of(&banned, &[0]).unwrap(), [0.0]);
}

#[test]
fn rows_without_a_distribution() {
    let good = vec![0.0, 1.0, 2.0];
    let choose = |bad: [f32; 3]| {
        let batch = tensor(&[good.clone(), bad.to_vec()]);
        [greedy(&batch).unwrap_err(), categorical(&batch, &[0.5; 2]).unwrap_err(), {
            log_prob_of(&batch, &[0, 0]).unwrap_err()
        }]
    };
    for error in choose([0.0, f32::NAN, 1.0]) {
        assert!(
            matches!(&error, Error::NotFinite { at, found, .. } if at == "row 1" && found == "NaN"),
            "{error}"
        );
    }
    for error in choose([0.0, f32::INFINITY, 1.0]) {
        assert!(
            matches!(&error, Error::NotFinite { at, found, .. } if at == "row 1" && found == "infinity"),
            "{error}"
        );
    }
    for error in choose([f32::NEG_INFINITY; 3]) {
        assert!(matches!(error, Error::AllBanned { row: 1, step: 0 }), "{error}");
        assert!(matches!(at_step(error, 9), Error::AllBanned { row: 1, step: 9 }));
    }
}

#[test]
fn other_arguments() {
    let batch = tensor(&[vec![0.0, 1.0], vec![0.0, 1.0]]);
    for uniforms in [vec![0.5], vec![0.5; 3], vec![0.5, 1.0], vec![0.5, -0.1], vec![f64::NAN, 0.5]] {
        assert!(matches!(categorical(&batch, &uniforms), Err(Error::Value { .. })), "{uniforms:?}");
    }
    for tokens in [vec![0], vec![0, 2], vec![-1, 0]] {
        assert!(matches!(log_prob_of(&batch, &tokens), Err(Error::Value { .. })), "{tokens:?}");
    }
    assert!(matches!(greedy(&batch.get(0)), Err(Error::Shape { .. })));
    assert!(matches!(categorical(&batch.to_kind(Kind::Double), &[0.5; 2]), Err(Error::Kind { .. })));
    // Any strides will do here.
    let strided = tensor(&[vec![0.0, 5.0], vec![9.0, 1.0]]).transpose(0, 1);
    assert_eq!(greedy(&strided).unwrap(), [1, 0]);
    assert_eq!(categorical(&strided, &[0.5; 2]).unwrap(), [1, 0]);
    assert_eq!(rows(&strided.contiguous())[0], [0.0, 9.0]);
}
