use super::*;
use crate::energy::gradient;
use crate::noise::{Noise, Stream};
use crate::testing::{chi_square, ks_test};
use tch::kind::DOUBLE_CPU;

fn component(mean: &[f64], deviation: f64, weight: f64, class: i64) -> Component {
    Component { mean: mean.to_vec(), deviation, weight, class }
}

/// Four components of unequal widths and weights in two classes, in one dimension.
fn line() -> Mixture {
    let parts = [(-2.0, 0.4, 1.0, 0), (-0.5, 0.2, 2.0, 1), (0.7, 0.7, 3.0, 0), (3.0, 0.3, 0.5, 1)];
    Mixture::new([1, 1, 1], parts.map(|(mu, s, w, y)| component(&[mu], s, w, y)).into()).unwrap()
}

fn plane() -> Mixture {
    let parts = vec![
        component(&[1.0, -1.0, 0.5, 0.0], 0.5, 0.7, 0),
        component(&[-1.0, 2.0, 0.0, 0.3], 0.3, 0.2, 2),
        component(&[0.4, 0.4, -2.0, 1.0], 0.8, 0.6, 0),
    ];
    Mixture::new([2, 1, 2], parts).unwrap()
}

fn levels() -> [NoiseLevel; 5] {
    [
        NoiseLevel::CLEAN,
        NoiseLevel::from_alpha_bar(0.7).unwrap(),
        NoiseLevel::from_alpha_bar(0.05).unwrap(),
        NoiseLevel::from_flow(0.4).unwrap(),
        NoiseLevel::from_sigma(3.0).unwrap(),
    ]
}

fn x(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).view([-1, 1, 1, 1])
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.contiguous().view(-1)).unwrap()
}

fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{a} instead of {b}");
}

fn normal(x: f64, mean: f64, deviation: f64) -> f64 {
    let z = (x - mean) / deviation;
    (-0.5 * z * z).exp() / (deviation * (2.0 * std::f64::consts::PI).sqrt())
}

#[test]
fn the_posterior_is_bayes_by_quadrature() {
    // p(x_t) = ∫ p(x₀) N(x_t; α x₀, σ²) dx₀ and its moments, by the trapezoidal rule on a fine grid.
    let mixture = line();
    let weights = mixture.weights();
    for level in &levels()[1..] {
        for at in [-3.0, -0.9, 0.1, 1.7, 4.2] {
            let noised = Noised { x: x(&[at]), level: *level };
            let (mut of, mut mean) = (vec![0.0; 4], 0.0);
            for i in 0..40_000 {
                let x0 = -10.0 + 20.0 * f64::from(i) / 40_000.0;
                let likelihood = normal(at, level.alpha() * x0, level.sigma()) * 20.0 / 40_000.0;
                for (k, c) in mixture.components().iter().enumerate() {
                    let joint = weights[k] * normal(x0, c.mean[0], c.deviation) * likelihood;
                    of[k] += joint;
                    mean += joint * x0;
                }
            }
            let density: f64 = of.iter().sum();
            close(numbers(&mixture.log_density(&noised).unwrap())[0], density.ln(), 1e-9);
            let r = numbers(&mixture.responsibilities(&noised).unwrap());
            r.iter().zip(&of).for_each(|(r, of)| close(*r, of / density, 1e-9));
            close(numbers(&mixture.x0(&noised).unwrap())[0], mean / density, 1e-9);
            let epsilon = (at - level.alpha() * mean / density) / level.sigma();
            close(numbers(&mixture.epsilon(&noised).unwrap())[0], epsilon, 1e-8);
            let class = ((of[1] + of[3]) / density).ln();
            close(numbers(&mixture.log_class(&noised, 1).unwrap())[0], class, 1e-8);
            let conditional = mixture.of_class(1).unwrap().log_density(&noised).unwrap();
            close(numbers(&conditional)[0], ((of[1] + of[3]) / (weights[1] + weights[3])).ln(), 1e-8);
        }
    }
}

#[test]
fn the_score_is_the_gradient_of_the_log_density() {
    let mixture = plane();
    let at = (Tensor::arange(12, DOUBLE_CPU) * 1.7 + 0.1).sin().view([3, 2, 1, 2]) * 2.0;
    for level in levels() {
        let noised = Noised { x: at.shallow_clone(), level };
        let of = mixture.clone();
        let density = Energy::from_fn(move |n: &Noised| of.log_density(n));
        let (_, expected) = gradient(&density, &noised).unwrap();
        let score = mixture.score(&noised).unwrap();
        assert_eq!(score.size(), [3, 2, 1, 2]);
        close((&score - &expected).abs().max().double_value(&[]), 0.0, 1e-10);
        // x = α x̂₀ + σ ε̂ is an identity of the two.
        let back =
            mixture.x0(&noised).unwrap() * level.alpha() + mixture.epsilon(&noised).unwrap() * level.sigma();
        close((back - &at).abs().max().double_value(&[]), 0.0, 1e-10);
    }
}

#[test]
fn classifiers_are_the_classes_posteriors() {
    let mixture = plane();
    let at = (Tensor::arange(12, DOUBLE_CPU) * 0.7).cos().view([3, 2, 1, 2]) * 1.5;
    for level in levels() {
        let noised = Noised { x: at.shallow_clone(), level };
        let p = |class| mixture.noised_classifier(class).unwrap().energy(&noised).unwrap().neg().exp();
        close((p(0) + p(2) - 1.0).abs().max().double_value(&[]), 0.0, 1e-12);
        // ∇ ln p(x | y) = ∇ ln p(x) + ∇ ln p(y | x).
        let (_, uphill) = gradient(&mixture.noised_classifier(2).unwrap(), &noised).unwrap();
        let conditional = mixture.score(&noised).unwrap() - uphill;
        let expected = mixture.of_class(2).unwrap().score(&noised).unwrap();
        close((conditional - expected).abs().max().double_value(&[]), 0.0, 1e-9);
    }
    let clean = mixture.classifier(2).unwrap().energy(&Image(at.shallow_clone())).unwrap();
    let level = NoiseLevel::CLEAN;
    let noised = mixture.noised_classifier(2).unwrap().energy(&Noised { x: at, level }).unwrap();
    assert_eq!(clean, noised);
    // Another attribute of the same data.
    let other = mixture.with_classes(&[1, 0, 0]).unwrap();
    assert_eq!((other.classes(), other.weights()), (2, mixture.weights()));
    assert_eq!(other.of_class(1).unwrap().components()[0].mean, mixture.components()[0].mean);
}

#[test]
fn the_distribution_of_projections_is_the_integral_of_the_density() {
    let mixture = line();
    for level in levels() {
        let cdf = mixture.cdf(&[-2.0], level).unwrap();
        for value in [-7.0, -1.0, 0.3, 4.0] {
            // P(−2 x ≤ value) = P(x ≥ −value / 2)
            let (low, n) = (-value / 2.0, 20_000);
            let grid: Vec<f64> = (0..n).map(|i| low + 30.0 * (f64::from(i) + 0.5) / f64::from(n)).collect();
            let density = mixture.log_density(&Noised { x: x(&grid), level }).unwrap().exp();
            close(cdf(value), density.sum(Kind::Double).double_value(&[]) * 30.0 / f64::from(n), 1e-6);
        }
    }
    let projected =
        plane().project(&[1.0, 0.0, -1.0, 0.5], &Tensor::arange(4, DOUBLE_CPU).view([1, 2, 1, 2]));
    assert_eq!(projected.unwrap(), [-0.5]);
}

#[test]
fn samples_are_of_the_mixture() {
    let parts = [(-6.0, 0.0, 1.0), (0.0, 5.0, 2.0), (6.0, 0.0, 5.0)];
    let parts = parts.map(|(a, b, w)| component(&[a, b], 0.5, w, 0)).into();
    let mixture = Mixture::new([2, 1, 1], parts).unwrap();
    let samples = mixture.sample(&mut Noise::seeded(3).streams(4000)).unwrap();
    assert_eq!(samples.size(), [4000, 2, 1, 1]);
    let p = chi_square(&mixture.counts(&samples).unwrap(), &mixture.weights()).unwrap();
    assert!(p > 0.001, "{p}");
    for direction in [[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]] {
        let projected = mixture.project(&direction, &samples).unwrap();
        let p = ks_test(&projected, mixture.cdf(&direction, NoiseLevel::CLEAN).unwrap()).unwrap();
        assert!(p > 0.001, "{p}");
        // Noise of a hundredth would be seen.
        let level = NoiseLevel::from_alpha_bar(0.9).unwrap();
        assert!(ks_test(&projected, mixture.cdf(&direction, level).unwrap()).unwrap() < 0.001);
    }
    let alone = mixture.sample(&mut [Stream::new(3, 7)]).unwrap();
    assert_eq!(alone.get(0), samples.get(7), "a sample does not depend on its batch");
}

#[test]
fn what_is_no_mixture_is_refused() {
    let one = |change: &dyn Fn(&mut Component)| {
        let mut c = component(&[0.0], 1.0, 1.0, 0);
        change(&mut c);
        Mixture::new([1, 1, 1], vec![c]).map(drop)
    };
    assert!(one(&|_| ()).is_ok());
    assert!(matches!(one(&|c| c.deviation = 0.0), Err(Error::Value { .. })));
    assert!(matches!(one(&|c| c.weight = f64::NAN), Err(Error::Value { .. })));
    assert!(matches!(one(&|c| c.class = -1), Err(Error::Value { .. })));
    assert!(matches!(one(&|c| c.class = i64::MAX), Err(Error::Value { .. })));
    assert!(matches!(one(&|c| c.mean.push(0.0)), Err(Error::Shape { .. })));
    assert!(matches!(one(&|c| c.mean[0] = f64::INFINITY), Err(Error::NotFinite { .. })));
    assert!(matches!(Mixture::new([1, 1, 1], vec![]), Err(Error::Value { .. })));
    assert!(matches!(Mixture::new([1, 0, 1], vec![]), Err(Error::Value { .. })));
    assert!(matches!(Mixture::new([1 << 62, 4, 1], vec![]), Err(Error::Value { .. })));
    let mixture = plane();
    assert!(matches!(mixture.of_class(1), Err(Error::Value { .. })), "a class without components");
    assert!(mixture.noised_classifier(3).is_err() && mixture.classifier(-1).is_err());
    assert!(matches!(mixture.with_classes(&[0]), Err(Error::Value { .. })));
    let level = NoiseLevel::CLEAN;
    for bad in [x(&[1.0, 2.0]), Tensor::zeros([4], DOUBLE_CPU)] {
        assert!(matches!(mixture.score(&Noised { x: bad, level }), Err(Error::Shape { .. })));
    }
    assert!(matches!(mixture.cdf(&[1.0], level).map(drop), Err(Error::Shape { .. })));
    assert!(matches!(mixture.cdf(&[0.0; 4], level).map(drop), Err(Error::Value { .. })));
}
