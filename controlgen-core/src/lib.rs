//! # controlgen-core
//!
//! What the controlgen crates share: the traits of models and controls, the *sites* at which controls act,
//! layers that know their sites, checkpoints, devices and seeded noise.
//!
//! A frozen generative model is a distribution p(x). Control means sampling from p(x)·exp(−E(x)), and a control
//! acts in one of four places: the input, the weights and activations, the inside of a forward pass, or the output
//! step by step. `docs/architecture.md` in the repository draws the picture.

mod attention;
pub mod checkpoint;
mod control;
mod device;
mod error;
#[cfg(feature = "gguf")]
pub mod gguf;
mod lanes;
mod language_model;
pub mod layers;
mod pass;
mod sites;
mod sys;
#[cfg(feature = "testing")]
pub mod testing;
mod token_control;

pub use attention::{Attn, Mask};
pub use control::{At, Binding, Control, Controls, Next};
pub use device::{Placement, device, kind};
pub use error::{Error, RemoteError, Result};
pub use lanes::{BoxRows, Lane, Lanes, Rows};
pub use language_model::{
    LanguageModel, LmInput, LmOutput, LmSpec, Logits, Source, State, StateImpl, Tokens, WeightMap,
};
pub use pass::{Pass, Taps};
pub use sites::{Dims, Site, SiteId, SiteKind, SiteMap, Slice};
pub use token_control::{PerRow, Role, RowControl, TokenControl, TokenControls, TokenControlsState};
