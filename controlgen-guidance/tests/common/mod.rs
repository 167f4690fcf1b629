//! What several tests of guidance stand on: a mixture of three Gaussians in the plane, and its noise levels.
#![allow(dead_code, clippy::unwrap_used)] // helpers of tests, of which each uses a part

use controlgen_core::testing::{Component, Mixture};
use controlgen_core::{NoiseLevel, Result};
use tch::{Tensor, kind::DOUBLE_CPU};

pub fn data() -> Mixture {
    let part = |mean: [f64; 2], weight, class| Component { mean: mean.into(), deviation: 0.6, weight, class };
    let parts = vec![part([2.0, -1.0], 1.0, 0), part([-1.0, 0.5], 2.0, 1), part([0.0, 3.0], 1.5, 2)];
    Mixture::new([2, 1, 1], parts).unwrap()
}

pub fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 2, DOUBLE_CPU) * 1.3 + 0.2).sin().view([rows, 2, 1, 1]) * 1.5
}

/// The level at time t in 0 ..= 1 of a cosine schedule.
pub fn level(t: f64) -> Result<NoiseLevel> {
    NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2))
}
