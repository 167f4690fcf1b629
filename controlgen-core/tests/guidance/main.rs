//! Guidance around a denoiser whose answers are known in closed form.
#![allow(clippy::unwrap_used)]

mod branches;
mod conditions;
mod contracts;
mod gaussian;
mod gradients;
mod sampling;
mod stages;

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::{Condition, Denoiser, NoiseLevel, Parameterisation, Result};
use gaussian::{Gaussian, diffusion};
use tch::{Tensor, kind::DOUBLE_CPU};

fn step(t: f64, schedule: fn(f64) -> NoiseLevel) -> Step {
    Step { index: 2, of: 10, timestep: t, level: schedule(t), next: schedule(t * 0.9) }
}

fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 2, DOUBLE_CPU) * 1.3 + 0.2).sin().view([rows, 2, 1, 1]) * 1.5
}

fn null_and(class: i64) -> Vec<Vec<Condition>> {
    vec![vec![Condition::Null], vec![Condition::Class(class)]]
}

fn plain(parameterisation: Parameterisation) -> (Gaussian, Guider) {
    let model = Gaussian::new(parameterisation, diffusion);
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
