//! Strategies for property tests (proptest): what the traits must cope with.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

/// A sequence of token ids below `vocab`, of a length within `len`.
pub fn tokens(vocab: i64, len: Range<usize>) -> impl Strategy<Value = Vec<i64>> {
    vec(0..vocab, len)
}

/// Prompts, `rows` of them, of lengths within `len`; of more than one, not all are of one length where `len` allows.
pub fn prompts(vocab: i64, rows: Range<usize>, len: Range<usize>) -> impl Strategy<Value = Vec<Vec<i64>>> {
    let varied = len.len() > 1;
    let prompts = vec(tokens(vocab, len.clone()), rows);
    prompts.prop_map(move |mut prompts| {
        if varied && prompts.len() > 1 && prompts.iter().all(|p| p.len() == prompts[0].len()) {
            if prompts[0].len() > len.start {
                prompts[0].pop();
            } else {
                prompts[0].push(0);
            }
        }
        prompts
    })
}

/// A row of next-token scores `[V]`, V within `vocab`: at least one is finite; there are ties, −∞ for what is
/// banned, and now and then very large or very small numbers.
pub fn logits(vocab: Range<usize>) -> impl Strategy<Value = Vec<f32>> {
    let one = prop_oneof![
        6 => -8.0f32..8.0,
        3 => (-3i8..=3).prop_map(f32::from),
        2 => Just(f32::NEG_INFINITY),
        1 => prop_oneof![Just(-1e30f32), Just(-1e4), Just(1e4), Just(0.0), Just(-0.0)],
    ];
    (vec(one, vocab), any::<proptest::sample::Index>(), -3i8..=3).prop_map(|(mut row, at, value)| {
        if row.iter().all(|z| !z.is_finite()) && !row.is_empty() {
            let at = at.index(row.len());
            row[at] = f32::from(value);
        }
        row
    })
}

/// Rows of next-token scores, all of one V: `[B][V]`.
pub fn logits_rows(rows: Range<usize>, vocab: Range<usize>) -> impl Strategy<Value = Vec<Vec<f32>>> {
    use proptest::strategy::Strategy as _;
    vocab.prop_flat_map(move |v| vec(logits(v..v + 1), rows.clone()))
}

/// The shape of a tensor: a number of dimensions within `dims`, each of a size within `size`.
pub fn shape(dims: Range<usize>, size: Range<i64>) -> impl Strategy<Value = Vec<i64>> {
    vec(size, dims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    fn sample<S: Strategy>(strategy: &S) -> Vec<S::Value> {
        let mut runner = TestRunner::deterministic();
        (0..500).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
    }

    #[test]
    fn logits_have_ties_and_bans_and_are_never_all_banned() {
        let rows = sample(&logits(2..12));
        assert!(rows.iter().all(|row| row.iter().any(|z| z.is_finite()) && row.iter().all(|z| !z.is_nan())));
        let tied = |row: &[f32]| row.iter().enumerate().any(|(i, a)| a.is_finite() && row[..i].contains(a));
        assert!(rows.iter().filter(|row| tied(row)).count() > 50);
        assert!(rows.iter().filter(|row| row.contains(&f32::NEG_INFINITY)).count() > 50);
        assert!(
            sample(&logits_rows(1..4, 2..6)).iter().all(|rows| rows.iter().all(|r| r.len() == rows[0].len()))
        );
    }

    #[test]
    fn prompts_are_unequal_and_within_bounds() {
        for prompts in sample(&prompts(5, 1..5, 1..3)) {
            assert!(prompts.iter().flatten().all(|token| (0..5).contains(token)));
            assert!(prompts.iter().all(|p| (1..3).contains(&p.len())));
            assert!(prompts.len() == 1 || prompts.iter().any(|p| p.len() != prompts[0].len()));
        }
        assert!(
            sample(&shape(0..4, 1..3)).iter().all(|s| s.len() < 4 && s.iter().all(|n| (1..3).contains(n)))
        );
    }
}
