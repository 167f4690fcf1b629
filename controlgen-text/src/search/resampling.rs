//! Drawing from weights that are given by their logarithms.

/// log Σ exp x; −∞ for none.
pub(super) fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln() }
}

/// (Σw)² / Σw².
pub(super) fn effective_sample_size(log_weights: &[f64]) -> f64 {
    let doubled: Vec<f64> = log_weights.iter().map(|w| 2.0 * w).collect();
    (2.0 * log_sum_exp(log_weights) - log_sum_exp(&doubled)).exp()
}

/// `count` indices, in order, each i either ⌊count · wᵢ⌋ or ⌈count · wᵢ⌉ times, and count · wᵢ times in the mean, w being
/// normalised: the weights laid end to end are cut at (k + `uniform`) / count for k = 0 .. count (Kitagawa 1996; Douc,
/// Cappé and Moulines 2005). Some weight must be above 0.
pub(super) fn systematic(log_weights: &[f64], uniform: f64, count: usize) -> Vec<usize> {
    let sum = log_sum_exp(log_weights);
    let weights: Vec<f64> = log_weights.iter().map(|w| (w - sum).exp()).collect();
    // Rounding may leave the last cut beyond the sum.
    let last = weights.iter().rposition(|&w| w > 0.0).unwrap_or(0);
    let (mut at, mut end) = (0, weights.first().copied().unwrap_or(0.0));
    let mut cut = |k: usize| {
        let goal = (k as f64 + uniform) / count as f64;
        while end <= goal && at < last {
            at += 1;
            end += weights[at];
        }
        at
    };
    (0..count).map(&mut cut).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn systematic_gives_each_its_share(
            weights in prop::collection::vec(prop_oneof![4 => 1e-3f64..1.0, 1 => Just(0.0)], 1..40),
            uniform in 0f64..1.0,
            count in 1usize..100,
        ) {
            prop_assume!(weights.iter().any(|&w| w > 0.0));
            let logs: Vec<f64> = weights.iter().map(|w| w.ln() + 900.0).collect();
            let drawn = systematic(&logs, uniform, count);
            prop_assert_eq!(drawn.len(), count);
            prop_assert!(drawn.is_sorted());
            let sum: f64 = weights.iter().sum();
            for (i, w) in weights.iter().enumerate() {
                let (times, share) = (drawn.iter().filter(|&&at| at == i).count() as f64, w / sum * count as f64);
                prop_assert!((times - share).abs() < 1.0 + 1e-9, "{i}: {times} of {share}");
                prop_assert!(*w > 0.0 || times == 0.0);
            }
        }
    }

    /// Over all uniform numbers an index comes as often as its weight says.
    #[test]
    fn systematic_has_no_bias() {
        let weights = [0.07, 0.0, 0.41, 0.02, 0.5];
        let logs: Vec<f64> = weights.iter().map(|w: &f64| w.ln()).collect();
        let (mut counts, grid) = ([0.0; 5], 10_000);
        for k in 0..grid {
            for at in systematic(&logs, (f64::from(k) + 0.5) / f64::from(grid), 3) {
                counts[at] += 1.0 / f64::from(grid) / 3.0;
            }
        }
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count - weight).abs() < 1e-4, "{counts:?}");
        }
    }

    #[test]
    fn effective_sample_sizes() {
        for (weights, expected) in [(vec![1.0; 7], 7.0), (vec![1.0, 0.0, 0.0], 1.0), (vec![3.0, 1.0], 1.6)] {
            let logs: Vec<f64> = weights.iter().map(|w: &f64| w.ln() - 800.0).collect();
            assert!((effective_sample_size(&logs) - expected).abs() < 1e-9);
        }
    }
}
