//! Guided sampling draws the distributions that it claims: of a mixture of Gaussians, for which they are known.
//!
//! Every p-value is compared with α = 0.001, with fixed seeds; and each test shows a setting that it refuses.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::level;
use controlgen_core::energy::Image;
use controlgen_core::guidance::Guider;
use controlgen_core::noise::{Noise, NoiseSource};
use controlgen_core::testing::{Component, Mixture, MixtureDenoiser, chi_square, ks_test};
use controlgen_core::{Condition, Energy, NoiseLevel, Parameterisation};
use controlgen_diffusion::{Ddim, sample, steps};
use controlgen_guidance::{ClassifierFreeGuidance, ClassifierGuidance, UniversalGuidance};
use tch::{Device, Kind, Tensor};

const ALPHA: f64 = 0.001;
const SAMPLES: usize = 2000;
const STEPS: usize = 160;

/// A grid: three columns, the outer two of class 0, and two rows, which are the other attribute. Column and row are
/// independent, so that the noised classifiers of both have the noised posterior as their product. Neighbours overlap.
fn grid() -> (Mixture, Mixture) {
    let columns = [(-3.0, 0.35, 0), (-1.0, 0.4, 1), (5.0, 0.25, 0)];
    let rows = [(-1.0, 0.4, 0), (1.0, 0.6, 1)];
    let (mut components, mut other) = (Vec::new(), Vec::new());
    for (x, of_column, class) in columns {
        for (y, of_row, attribute) in rows {
            let weight = of_column * of_row;
            components.push(Component { mean: vec![x, y], deviation: 0.8, weight, class });
            other.push(attribute);
        }
    }
    let by_column = Mixture::new([2, 1, 1], components).unwrap();
    let by_row = by_column.with_classes(&other).unwrap();
    (by_column, by_row)
}

/// The components of class 0 that are of attribute 1.
fn corner() -> Mixture {
    let (by_column, by_row) = grid();
    let both = by_column.components().iter().zip(by_row.components());
    let corner = both.filter(|(a, b)| a.class == 0 && b.class == 1).map(|(a, _)| a.clone());
    Mixture::new([2, 1, 1], corner.collect()).unwrap()
}

fn guider(data: Mixture, form: Parameterisation, conditions: Vec<Condition>) -> Guider {
    let base = conditions.len() as u32 - 1;
    let model = MixtureDenoiser::new(data, form, level).unwrap();
    let conditions = conditions.into_iter().map(|condition| vec![condition]).collect();
    Guider::new(Box::new(model), conditions, None, base).unwrap()
}

fn draw(guider: &Guider, eta: f64) -> Tensor {
    tch::set_num_threads(1); // the tensors are small, and the tests run side by side
    let times: Vec<f64> = (0..STEPS).map(|i| 0.999 * (1.0 - i as f64 / STEPS as f64)).collect();
    let steps = steps(&times, level, NoiseLevel::CLEAN).unwrap();
    let mut noise = Noise::seeded(17).streams(SAMPLES);
    let x = noise.normal(&[SAMPLES as i64, 2, 1, 1], Kind::Double, Device::Cpu).unwrap();
    sample(&Ddim::new(eta).unwrap(), guider, x, &steps, &mut noise).unwrap()
}

/// The least p-value of projections in five directions, and of the counts of components that lie apart.
fn least_p(samples: &Tensor, of: &Mixture) -> f64 {
    let mut least = 1.0f64;
    for direction in [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.3, -1.0]] {
        let projected = of.project(&direction, samples).unwrap();
        let p = ks_test(&projected, of.cdf(&direction, NoiseLevel::CLEAN).unwrap()).unwrap();
        least = least.min(p);
    }
    // Columns apart by ten deviations: the counts of their rows together.
    let by_column = |counts: &[f64]| -> Vec<f64> {
        let mut sums = [0.0; 2];
        for (count, component) in counts.iter().zip(of.components()) {
            sums[usize::from(component.mean[0] > 1.0)] += count;
        }
        sums.into()
    };
    if of.components().iter().all(|c| c.mean[0] < -2.0 || c.mean[0] > 4.0) {
        let counts: Vec<f64> = of.counts(samples).unwrap().into_iter().map(|n| n as f64).collect();
        let counts: Vec<u64> = by_column(&counts).into_iter().map(|n| n as u64).collect();
        let p = chi_square(&counts, &by_column(&of.weights())).unwrap();
        least = least.min(p);
    }
    least
}

#[test]
fn unguided_it_samples_the_data() {
    let (data, _) = grid();
    for (form, eta) in [(Parameterisation::Epsilon, 0.0), (Parameterisation::V, 1.0)] {
        let samples = draw(&guider(data.clone(), form, vec![Condition::Null]), eta);
        assert!(least_p(&samples, &data) > ALPHA);
        assert!(least_p(&samples, &data.of_class(0).unwrap()) < ALPHA);
    }
}

#[test]
fn an_exact_classifier_at_scale_1_samples_the_posterior() {
    let (data, _) = grid();
    let posterior = data.of_class(0).unwrap();
    let with = |scale: f64, eta: f64| {
        let classifier = data.noised_classifier(0).unwrap();
        let guider = guider(data.clone(), Parameterisation::Epsilon, vec![Condition::Null]);
        draw(&guider.with(ClassifierGuidance::new(classifier, scale).unwrap()), eta)
    };
    assert!(least_p(&with(1.0, 0.0), &posterior) > ALPHA);
    assert!(least_p(&with(1.0, 1.0), &posterior) > ALPHA);
    for scale in [0.7, 2.0] {
        assert!(least_p(&with(scale, 0.0), &posterior) < ALPHA, "{scale}");
    }
}

#[test]
fn classifier_free_guidance_at_scale_1_samples_the_conditional() {
    let (data, _) = grid();
    let conditional = data.of_class(0).unwrap();
    let with = |scale: f64, form, eta: f64| {
        let conditions = vec![Condition::Null, Condition::Class(0)];
        draw(&guider(data.clone(), form, conditions).with(ClassifierFreeGuidance::new(scale).unwrap()), eta)
    };
    assert!(least_p(&with(1.0, Parameterisation::Epsilon, 0.0), &conditional) > ALPHA);
    assert!(least_p(&with(1.0, Parameterisation::Sample, 1.0), &conditional) > ALPHA);
    assert!(least_p(&with(0.0, Parameterisation::V, 0.0), &data) > ALPHA);
    for scale in [0.7, 2.0] {
        assert!(least_p(&with(scale, Parameterisation::Epsilon, 0.0), &conditional) < ALPHA, "{scale}");
    }
}

#[test]
fn stages_compose_to_the_product_of_their_posteriors() {
    let (by_column, by_row) = grid();
    let product = corner();
    let by = |data: &Mixture, class, scale| {
        ClassifierGuidance::new(data.noised_classifier(class).unwrap(), scale).unwrap()
    };
    // Two classifiers around the unconditional model.
    let form = Parameterisation::Epsilon;
    let two = |scale: f64| {
        let guider = guider(by_column.clone(), form, vec![Condition::Null]);
        draw(&guider.with(by(&by_column, 0, 1.0)).with(by(&by_row, 1, scale)), 0.0)
    };
    assert!(least_p(&two(1.0), &product) > ALPHA);
    assert!(least_p(&two(2.0), &product) < ALPHA);
    // A classifier on top of classifier-free guidance, in either order.
    let conditions = || vec![Condition::Null, Condition::Class(0)];
    let free = |scale: f64| ClassifierFreeGuidance::new(scale).unwrap();
    let on_top = guider(by_column.clone(), form, conditions()).with(free(1.0)).with(by(&by_row, 1, 1.0));
    let below = guider(by_column.clone(), form, conditions()).with(by(&by_row, 1, 1.0)).with(free(1.0));
    let samples = draw(&on_top, 0.0);
    assert!(least_p(&samples, &product) > ALPHA);
    assert!(samples.equal(&draw(&below, 0.0)));
    let off = guider(by_column, form, conditions()).with(free(1.0)).with(by(&by_row, 1, 2.0));
    assert!(least_p(&draw(&off, 0.0), &product) < ALPHA);
}

#[test]
fn a_linear_energy_of_the_clean_sample_tilts_a_gaussian() {
    // p(x₀) exp(a · x₀) of N(μ, s²) is N(μ + s² a, s²); ln E[exp(a · x₀) | x_t] = a · x̂₀ + a constant, so that the
    // gradient through the denoiser is exact at every level.
    let gaussian = |mean: [f64; 2]| {
        let only = Component { mean: mean.into(), deviation: 0.8, weight: 1.0, class: 0 };
        Mixture::new([2, 1, 1], vec![only]).unwrap()
    };
    let tilt = [1.5, -2.0];
    let energy = Energy::from_fn(move |image: &Image| {
        let a = Tensor::f_from_slice(&tilt)?.f_view([2, 1, 1])?;
        Ok(image.0.f_mul(&a)?.f_sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double)?.f_neg()?)
    });
    let tilted = gaussian([1.0 + 0.64 * tilt[0], 0.5 + 0.64 * tilt[1]]);
    let with = |scale: f64, form, eta: f64| {
        let guider = guider(gaussian([1.0, 0.5]), form, vec![Condition::Null]);
        draw(&guider.with(UniversalGuidance::new(energy.clone(), scale).unwrap()), eta)
    };
    assert!(least_p(&with(1.0, Parameterisation::Epsilon, 0.0), &tilted) > ALPHA);
    assert!(least_p(&with(1.0, Parameterisation::V, 1.0), &tilted) > ALPHA);
    for scale in [0.9, 2.0] {
        assert!(least_p(&with(scale, Parameterisation::Epsilon, 0.0), &tilted) < ALPHA, "{scale}");
    }
}
