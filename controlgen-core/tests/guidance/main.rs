//! Guidance around a denoiser whose answers are known in closed form.
#![allow(clippy::unwrap_used)]

mod branches;
mod conditions;
mod contracts;
mod gradients;
mod sampling;
mod stages;

use controlgen_core::energy::Noised;
use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::testing::{Component, Mixture, MixtureDenoiser};
use controlgen_core::{Condition, Denoiser, NoiseLevel, Parameterisation, Result};
use tch::{Tensor, kind::DOUBLE_CPU};

type Schedule = fn(f64) -> NoiseLevel;

fn diffusion(t: f64) -> NoiseLevel {
    NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2)).unwrap()
}

fn flow(t: f64) -> NoiseLevel {
    NoiseLevel::from_flow(t).unwrap()
}

/// The deviation of every component.
const S: f64 = 0.5;

/// The means, in two channels, and classes: class 3 alone has two components.
const COMPONENTS: [([f64; 2], i64); 5] =
    [([2.0, -1.0], 0), ([-1.0, 0.5], 1), ([0.0, 3.0], 2), ([1.0, 1.0], 3), ([-1.5, -0.5], 3)];

/// The data, the components' weights being multiplied by these factors.
fn weighted(factors: [f64; 5]) -> Mixture {
    let component = |((mean, class), weight): (([f64; 2], i64), f64)| Component {
        mean: mean.into(),
        deviation: S,
        weight,
        class,
    };
    Mixture::new([2, 1, 1], COMPONENTS.into_iter().zip(factors).map(component).collect()).unwrap()
}

/// All of the data, or a class.
fn data(class: Option<i64>) -> Mixture {
    let all = weighted([1.0; 5]);
    class.map_or(all.clone(), |class| all.of_class(class).unwrap())
}

fn epsilon(x: &Tensor, class: Option<i64>, level: NoiseLevel) -> Tensor {
    data(class).epsilon(&Noised { x: x.shallow_clone(), level }).unwrap()
}

fn clean(x: &Tensor, class: Option<i64>, level: NoiseLevel) -> Tensor {
    data(class).x0(&Noised { x: x.shallow_clone(), level }).unwrap()
}

fn scheduled(form: Parameterisation, schedule: Schedule) -> MixtureDenoiser {
    MixtureDenoiser::new(data(None), form, move |t| Ok(schedule(t))).unwrap()
}

fn model(form: Parameterisation) -> MixtureDenoiser {
    scheduled(form, diffusion)
}

fn step(t: f64, schedule: Schedule) -> Step {
    Step { index: 2, of: 10, timestep: t, level: schedule(t), next: schedule(t * 0.9) }
}

fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 2, DOUBLE_CPU) * 1.3 + 0.2).sin().view([rows, 2, 1, 1]) * 1.5
}

fn null_and(class: i64) -> Vec<Vec<Condition>> {
    vec![vec![Condition::Null], vec![Condition::Class(class)]]
}

fn plain(parameterisation: Parameterisation) -> (MixtureDenoiser, Guider) {
    let model = model(parameterisation);
    let guider = Guider::new(model.handle(), null_and(0), None, 1).unwrap();
    (model, guider)
}

fn predict(guider: &Guider, x: &Tensor, step: &Step) -> Result<Guided> {
    guider.predict(x, step, &mut guider.start(&[*step])?)
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size());
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{difference}");
}

const FORMS: [Parameterisation; 4] =
    [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V, Parameterisation::Velocity];
