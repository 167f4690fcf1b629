//! Every stage keeps the contract of guidance, every energy that of energies.
#![allow(clippy::unwrap_used, clippy::panic)]

use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::{Branch, Step};
use controlgen_core::testing::contract::{self, GuidanceCase};
use controlgen_core::testing::{Component, Mixture};
use controlgen_core::{Guidance, NoiseLevel};
use controlgen_guidance::{
    ClassifierFreeGuidance, ClassifierGuidance, GuidanceInterval, PerturbedAttentionGuidance,
    UniversalGuidance,
};
use tch::{Tensor, kind::DOUBLE_CPU};

fn data() -> Mixture {
    let part = |mean: [f64; 2], weight, class| Component { mean: mean.into(), deviation: 0.6, weight, class };
    let parts = vec![part([2.0, -1.0], 1.0, 0), part([-1.0, 0.5], 2.0, 1), part([0.0, 3.0], 1.5, 2)];
    Mixture::new([2, 1, 1], parts).unwrap()
}

fn x() -> Tensor {
    (Tensor::arange(6, DOUBLE_CPU) * 1.3 + 0.2).sin().view([3, 2, 1, 1]) * 1.5
}

fn level(t: f64) -> NoiseLevel {
    NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2)).unwrap()
}

fn steps() -> Vec<Step> {
    let step =
        |(index, t): (usize, f64)| Step { index, of: 3, timestep: t, level: level(t), next: level(t - 0.25) };
    [0.8, 0.55, 0.3].into_iter().enumerate().map(step).collect()
}

#[track_caller]
fn keeps(stage: &dyn Guidance, neutral: &dyn Guidance) {
    let (x, steps) = (x(), steps());
    let case =
        GuidanceCase { x: &x, steps: &steps, base: Branch::of(1), neutral: Some(neutral), replaces_x: false };
    contract::guidance(stage, &case).unwrap();
}

#[test]
fn stages() {
    let free = |scale| ClassifierFreeGuidance::new(scale).unwrap();
    keeps(&free(7.5), &free(1.0));
    keeps(&free(3.0).and(2, 2.0).unwrap(), &free(1.0).and(2, 0.0).unwrap());
    let perturbed = |scale| PerturbedAttentionGuidance::new(scale).unwrap();
    keeps(&perturbed(3.0), &perturbed(0.0));
    let classifier = |s| ClassifierGuidance::new(data().noised_classifier(1).unwrap(), s).unwrap();
    keeps(&classifier(2.0), &classifier(0.0));
    let universal = |s| UniversalGuidance::new(data().classifier(2).unwrap(), s).unwrap();
    keeps(&universal(1.5), &universal(0.0));
    let within = |low, high| GuidanceInterval::new(free(7.5), low, high).unwrap();
    // Where it rests throughout it does nothing.
    keeps(&within(0.3, 1.5), &within(50.0, 60.0));
}

#[test]
fn energies() {
    contract::energy(&data().noised_classifier(1).unwrap(), &Noised { x: x(), level: level(0.4) }).unwrap();
    contract::energy(&data().classifier(0).unwrap(), &Image(x())).unwrap();
    let both = 2.0 * data().classifier(0).unwrap() + data().classifier(1).unwrap();
    contract::energy(&both, &Image(x())).unwrap();
}
