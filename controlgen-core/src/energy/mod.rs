//! Energies: what a good sample is, lower being better.
//!
//! An energy turns a model p(x) into p*(x) ∝ p(x)·exp(−E(x)). The same energy ranks finished samples
//! ([`rerank`]), and where it is differentiable its gradient steers a sampler ([`gradient`], [`langevin`]).

mod algebra;
pub mod checks;
mod gradient;
mod langevin;
mod objective;
mod point;
mod rerank;

pub use algebra::{Energy, EnergyFn};
pub(crate) use gradient::backward;
pub use gradient::{gradient, gradient_of};
pub use langevin::langevin;
pub use objective::{Bound, Objective, Value};
pub use point::{Image, Noised, Point, Text};
pub use rerank::rerank;
