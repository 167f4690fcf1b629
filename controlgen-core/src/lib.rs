//! # controlgen-core
//!
//! What the controlgen crates share: the traits of models and controls, the *sites* at which controls act,
//! layers that know their sites, checkpoints, devices and seeded noise.
//!
//! A frozen generative model is a distribution p(x). Control means sampling from p(x)·exp(−E(x)), and a control
//! acts in one of four places: the input, the weights and activations, the inside of a forward pass, or the output
//! step by step. `docs/architecture.md` in the repository draws the picture.

pub mod checkpoint;
mod error;
#[cfg(feature = "gguf")]
pub mod gguf;
mod sys;

pub use error::{Error, RemoteError, Result};
