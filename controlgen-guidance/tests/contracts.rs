//! Every stage keeps the contract of guidance, every energy that of energies.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{data, level, x};
use controlgen_core::Guidance;
use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::{Branch, Step};
use controlgen_core::testing::contract::{self, GuidanceCase};
use controlgen_guidance::{
    ClassifierFreeGuidance, ClassifierGuidance, GuidanceInterval, PerturbedAttentionGuidance,
    UniversalGuidance,
};

fn steps() -> Vec<Step> {
    let step = |(index, t): (usize, f64)| Step {
        index,
        of: 3,
        timestep: t,
        level: level(t).unwrap(),
        next: level(t - 0.25).unwrap(),
    };
    [0.8, 0.55, 0.3].into_iter().enumerate().map(step).collect()
}

#[track_caller]
fn keeps(stage: &dyn Guidance, neutral: &dyn Guidance) {
    let (x, steps) = (x(3), steps());
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
    contract::energy(&data().noised_classifier(1).unwrap(), &Noised { x: x(3), level: level(0.4).unwrap() })
        .unwrap();
    contract::energy(&data().classifier(0).unwrap(), &Image(x(3))).unwrap();
    let both = 2.0 * data().classifier(0).unwrap() + data().classifier(1).unwrap();
    contract::energy(&both, &Image(x(3))).unwrap();
}
