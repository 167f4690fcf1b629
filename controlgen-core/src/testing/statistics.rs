//! Goodness of fit: does a sample come from the distribution it claims?

use crate::{Error, Result};

/// Pearson's chi-square test: the probability, if the sample does come from `expected`, of a statistic
/// Σ (oᵢ − n pᵢ)² / (n pᵢ) at least as large. Compare it with a stated α.
///
/// Bins with less than 5 expected counts are pooled, smallest first (Cochran 1954). A count where the probability is
/// 0 gives 0. With one bin left there is nothing to test: 1.
///
/// # Errors
/// [`Error::Value`] for no bins or counts, different numbers of bins, or probabilities that are negative, no
/// numbers, or do not sum to 1 within 1e-6.
pub fn chi_square(observed: &[u64], expected: &[f64]) -> Result<f64> {
    if observed.len() != expected.len() || observed.is_empty() {
        let found = format!("{} and {}", observed.len(), expected.len());
        return Err(Error::value("bins of counts and of probabilities", "as many, and at least one", found));
    }
    if let Some(p) = expected.iter().find(|p| !(0.0..=1.0 + 1e-6).contains(*p)) {
        return Err(Error::value("expected probability", "0 ..= 1", p));
    }
    let sum: f64 = expected.iter().sum();
    if (sum - 1.0).abs() > 1e-6 {
        return Err(Error::value("sum of the expected probabilities", "1", sum));
    }
    let n = observed.iter().sum::<u64>() as f64;
    if n == 0.0 {
        return Err(Error::value("counts", "at least one", 0));
    }
    if observed.iter().zip(expected).any(|(&o, &p)| p == 0.0 && o > 0) {
        return Ok(0.0);
    }
    let mut bins: Vec<(f64, f64)> = observed.iter().zip(expected).map(|(&o, &p)| (p * n, o as f64)).collect();
    bins.retain(|bin| bin.0 > 0.0);
    bins.sort_by(|a, b| b.0.total_cmp(&a.0));
    // The smallest are last: they go into one until all that is left is large enough.
    while let [.., next, last] = bins.as_mut_slice() {
        if last.0 >= 5.0 {
            break;
        }
        (next.0, next.1) = (next.0 + last.0, next.1 + last.1);
        bins.pop();
        // The sum may have overtaken its neighbours, but never falls below what it was made of: order it again.
        bins.sort_by(|a, b| b.0.total_cmp(&a.0));
    }
    let statistic: f64 = bins.iter().map(|(e, o)| (o - e) * (o - e) / e).sum();
    let freedom = (bins.len() - 1) as f64;
    Ok(if freedom == 0.0 { 1.0 } else { gamma_upper(freedom / 2.0, statistic / 2.0) })
}

/// The one-sample Kolmogorov–Smirnov test: the probability, if the sample does come from the continuous distribution
/// of this `cdf`, of a largest distance between the two cumulative distributions at least as large.
///
/// From Kolmogorov's limit with Stephens' correction √n + 0.12 + 0.11/√n (Stephens 1970), good to a few per cent of
/// the p-value from n = 8 on.
///
/// # Errors
/// [`Error::Value`] for an empty sample, a sample or a `cdf` that is no number, or a `cdf` outside 0 ..= 1.
pub fn ks_test(samples: &[f64], cdf: impl Fn(f64) -> f64) -> Result<f64> {
    if samples.is_empty() {
        return Err(Error::value("samples", "at least one", 0));
    }
    if let Some(x) = samples.iter().find(|x| x.is_nan()) {
        return Err(Error::value("sample", "a number", x));
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len() as f64;
    let mut distance = 0.0f64;
    for (i, &x) in sorted.iter().enumerate() {
        let f = cdf(x);
        if !(0.0..=1.0).contains(&f) {
            return Err(Error::value(format!("cdf({x})"), "0 ..= 1", f));
        }
        distance = distance.max(f - i as f64 / n).max((i + 1) as f64 / n - f);
    }
    Ok(kolmogorov((n.sqrt() + 0.12 + 0.11 / n.sqrt()) * distance))
}

/// Φ(z), the cumulative distribution of the standard normal, by Φ(−z) = Q(½, z²/2) / 2 for z ≥ 0 (Abramowitz & Stegun
/// 7.1.2, 6.5.17); good to 1e-13 of itself down to the smallest numbers.
pub fn normal_cdf(z: f64) -> f64 {
    let tail = 0.5 * gamma_upper(0.5, 0.5 * z * z);
    if z < 0.0 { tail } else { 1.0 - tail }
}

/// The tail of Kolmogorov's distribution, P(K > x) = 2 Σ (−1)^(k−1) exp(−2 k² x²); near 0 by its theta-function
/// form 1 − √(2π)/x Σ exp(−(2k − 1)² π² / (8 x²)), which converges there (Kolmogorov 1933).
fn kolmogorov(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let tail = if x < 1.0 {
        let a = std::f64::consts::PI.powi(2) / (8.0 * x * x);
        let sum: f64 = (1..=20).map(|k| (-f64::from(2 * k - 1).powi(2) * a).exp()).sum();
        1.0 - (2.0 * std::f64::consts::PI).sqrt() / x * sum
    } else {
        let term = |k: i32| (-2.0 * f64::from(k * k) * x * x).exp() * if k % 2 == 1 { 2.0 } else { -2.0 };
        (1..=20).map(term).sum()
    };
    tail.clamp(0.0, 1.0)
}

/// Q(a, x) = Γ(a, x) / Γ(a) for a > 0, x ≥ 0: below a + 1 by the series of its complement, above by the continued
/// fraction (Abramowitz & Stegun 6.5.29, 6.5.31), evaluated after Lentz.
fn gamma_upper(a: f64, x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    let q = if x < a + 1.0 {
        let (mut term, mut sum, mut k) = (1.0 / a, 1.0 / a, a);
        while term > sum * 1e-16 {
            k += 1.0;
            term *= x / k;
            sum += term;
        }
        1.0 - front * sum
    } else {
        let mut b = x + 1.0 - a;
        let (mut c, mut d) = (f64::INFINITY, 1.0 / b);
        let mut fraction = d;
        for i in 1..10_000 {
            let i = f64::from(i);
            let numerator = -i * (i - a);
            b += 2.0;
            d = 1.0 / (numerator * d + b);
            c = b + numerator / c;
            fraction *= c * d;
            if (c * d - 1.0).abs() < 1e-15 {
                break;
            }
        }
        front * fraction
    };
    q.clamp(0.0, 1.0)
}

/// ln Γ(x) for x > 0: Stirling's series at x + n ≥ 12, brought back by Γ(x + 1) = x Γ(x).
fn ln_gamma(mut x: f64) -> f64 {
    let mut shift = 0.0;
    while x < 12.0 {
        shift += x.ln();
        x += 1.0;
    }
    let r = 1.0 / (x * x);
    // B₂ₖ / (2k (2k − 1)) for k = 1 .. 6
    let series = [1.0 / 12.0, -1.0 / 360.0, 1.0 / 1260.0, -1.0 / 1680.0, 1.0 / 1188.0, -691.0 / 360_360.0];
    let tail = series.iter().rev().fold(0.0, |sum, b| sum * r + b) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + tail - shift
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance * b.abs().max(1e-300), "{a} instead of {b}");
    }

    #[test]
    fn gamma_functions_are_torchs() {
        for a in [0.5, 1.0, 1.5, 2.0, 5.0, 12.0, 49.5, 300.0] {
            let torch = |t: Tensor| t.double_value(&[]);
            close(ln_gamma(a) + 1.0, torch(Tensor::from(a).lgamma()) + 1.0, 1e-13);
            for ratio in [0.01, 0.3, 0.9, 1.0, 1.1, 1.5, 2.0, 4.0] {
                let x = a * ratio;
                close(gamma_upper(a, x), torch(Tensor::from(a).igammac(&Tensor::from(x))), 1e-8);
            }
        }
    }

    #[test]
    fn the_normal_distribution_is_torchs() {
        for z in [-30.0, -8.0, -3.0, -1.5, -0.4, -1e-3, 0.0, 1e-9, 0.7, 1.959_963_984_540_054, 5.0] {
            // Φ(z) = erfc(−z / √2) / 2
            let torch = Tensor::from(-z / 2f64.sqrt()).special_erfc().double_value(&[]) / 2.0;
            close(normal_cdf(z), torch, 1e-12);
        }
        close(normal_cdf(1.959_963_984_540_054), 0.975, 1e-14);
    }

    #[test]
    fn chi_square_of_the_tables() {
        // The critical values of the usual tables: (degrees of freedom, statistic, p).
        for (freedom, statistic, p) in
            [(1.0, 3.841459, 0.05), (2.0, 9.210340, 0.01), (5.0, 11.070498, 0.05), (10.0, 29.588298, 0.001)]
        {
            close(gamma_upper(freedom / 2.0, statistic / 2.0), p, 1e-6);
        }
        // Mendel's peas: 315, 108, 101, 32 of 9 : 3 : 3 : 1; the statistic is 0.470, p = 0.9254 with 3 degrees.
        let p = chi_square(&[315, 108, 101, 32], &[9.0 / 16.0, 3.0 / 16.0, 3.0 / 16.0, 1.0 / 16.0]).unwrap();
        close(p, 0.925_425_9, 1e-6);
    }

    #[test]
    fn chi_square_pools_small_bins() {
        // The last three expect 4, 3 and 3 of 100: one bin of 10 is left of them.
        let pooled = chi_square(&[55, 31, 8, 2, 4], &[0.6, 0.3, 0.04, 0.03, 0.03]).unwrap();
        close(pooled, chi_square(&[55, 31, 14], &[0.6, 0.3, 0.1]).unwrap(), 1e-12);
    }

    #[test]
    fn chi_square_at_its_edges() {
        assert_eq!(chi_square(&[5, 1], &[1.0, 0.0]).unwrap(), 0.0, "impossible events happened");
        assert_eq!(chi_square(&[5, 0], &[1.0, 0.0]).unwrap(), 1.0);
        assert!(chi_square(&[400, 600], &[0.5, 0.5]).unwrap() < 1e-9);
        for (o, e) in [(vec![], vec![]), (vec![1], vec![0.5, 0.5]), (vec![1, 1], vec![0.5, 0.6])] {
            assert!(matches!(chi_square(&o, &e), Err(Error::Value { .. })), "{o:?} {e:?}");
        }
        assert!(chi_square(&[1, 1], &[f64::NAN, 1.0]).is_err());
        assert!(chi_square(&[0, 0], &[0.5, 0.5]).is_err());
    }

    #[test]
    fn kolmogorov_of_the_tables() {
        for (x, p) in [(1.223848, 0.10), (1.358099, 0.05), (1.627624, 0.01), (1.949475, 0.001)] {
            close(kolmogorov(x), p, 1e-4);
        }
        // The two series are one function.
        close(kolmogorov(1.0 - 1e-12), kolmogorov(1.0), 1e-9);
        // The median of Kolmogorov's distribution.
        close(kolmogorov(0.827_573_56), 0.5, 1e-6);
    }

    #[test]
    fn ks_sees_a_shift() {
        let n = 2000;
        let uniform: Vec<f64> = (0..n).map(|i| (f64::from(i) * 0.618_033_988_749_895).fract()).collect();
        assert!(ks_test(&uniform, |x| x.clamp(0.0, 1.0)).unwrap() > 0.99);
        let shifted: Vec<f64> = uniform.iter().map(|x| x * 0.9).collect();
        assert!(ks_test(&shifted, |x| x.clamp(0.0, 1.0)).unwrap() < 1e-6);
        // n = 10, D = 0.40925 is the 5 % point of the exact distribution (Massey 1951).
        let at = |d: f64| kolmogorov((10f64.sqrt() + 0.12 + 0.11 / 10f64.sqrt()) * d);
        close(at(0.40925), 0.05, 0.05);
    }

    #[test]
    fn ks_refuses_what_is_no_distribution() {
        assert!(ks_test(&[], |x| x).is_err());
        assert!(ks_test(&[f64::NAN], |x| x).is_err());
        assert!(matches!(ks_test(&[2.0], |x| x), Err(Error::Value { .. })));
    }
}
