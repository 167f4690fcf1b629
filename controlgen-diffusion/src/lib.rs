//! # controlgen-diffusion
//!
//! Controllable generation of images: denoisers, noise schedules, samplers and pipelines.
//!
//! A sampler takes a function from (x, step) to a guided prediction, and knows nothing of guidance:
//!
//! ```
//! use controlgen_core::guidance::Guider;
//! use controlgen_core::noise::{Noise, NoiseSource};
//! use controlgen_core::testing::{Component, Mixture, MixtureDenoiser};
//! use controlgen_core::{Condition, Parameterisation, Result};
//! use controlgen_diffusion::{Ddim, DiffusionSchedule, Spacing, sample};
//! use tch::{Device, Kind};
//!
//! # fn main() -> Result<()> {
//! let schedule = DiffusionSchedule::scaled_linear(0.00085, 0.012, 1000)?; // of Stable Diffusion
//! let steps = schedule.steps(&schedule.timesteps(50, Spacing::Trailing)?)?;
//! let part = |x: f64, class| Component { mean: vec![x], deviation: 0.3, weight: 1.0, class };
//! let data = Mixture::new([1, 1, 1], vec![part(-2.0, 0), part(2.0, 1)])?;
//! let level = schedule.clone();
//! let model = MixtureDenoiser::new(data, Parameterisation::Epsilon, move |t| level.level(t))?;
//! let guider = Guider::new(Box::new(model), vec![vec![Condition::Class(1)]], None, 0)?;
//!
//! let mut noise = Noise::seeded(42).streams(4);
//! let x = noise.normal(&[4, 1, 1, 1], Kind::Float, Device::Cpu)?;
//! let images = sample(&Ddim::new(0.0)?, &guider, x, &steps, &mut noise)?;
//! assert!((images - 2.0).abs().max().double_value(&[]) < 1.5);
//! # Ok(())
//! # }
//! ```
//!
//! Any sampler runs on any steps, whatever the model predicts:
//!
//! | sampler | predictions in n steps | order | noise |
//! |---|---|---|---|
//! | [`Ddpm`] | n | | each step; variance small, large or learned |
//! | [`Ddim`] | n | 1 | with η above 0 |
//! | [`Euler`], [`FlowMatchEuler`] | n | 1 | none |
//! | [`EulerAncestral`] | n | | each step |
//! | [`Heun`] | 2 n − 1 | 2 | none |
//! | [`Pndm`] | n + 1 | 2 | none |
//! | [`DpmSolver`] | n | 1, 2 or between 2 and 3 | for the stochastic equation |
//! | [`UniPc`] | n | one above its own | none |
//! | [`Lcm`] | n, a few | | each step but the last |
//!
//! The order is that in the length of the steps, measured on a Gaussian. [`Thresholded`] keeps any sampler's x̂₀ in the
//! range of pixels. [`Scheduler`] reads diffusers' scheduler_config.json: steps and sampler as they are there.

pub mod image;
pub mod losses;
pub mod models;
pub mod pipelines;
pub mod prompt;
mod samplers;
mod schedule;
mod scheduler;

pub use models::Predicts;
pub use prompt::{EncodedPrompt, PromptEncoder};
pub use samplers::{
    Ddim, Ddpm, DpmSolver, DpmSolverType, Euler, EulerAncestral, FlowMatchEuler, Heun, Lcm, Pndm, Predict,
    Sampled, Sampler, Threshold, Thresholded, UniPc, UniPcType, Variance, sample, sample_watched,
};
pub use schedule::{DiffusionSchedule, SigmaSpacing, Spacing, flow_sigmas, from_strength, steps, steps_at};
pub use scheduler::Scheduler;
