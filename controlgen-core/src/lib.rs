//! # controlgen-core
//!
//! What the controlgen crates share: the traits of models and controls, the *sites* at which controls act,
//! layers that know their sites, checkpoints, devices and seeded noise.
//!
//! A frozen generative model is a distribution p(x). Control means sampling from p(x)·exp(−E(x)), and a control
//! acts in one of four places: the input, the weights and activations, the inside of a forward pass, or the output
//! step by step. `docs/architecture.md` in the repository draws the picture.

mod adapter;
mod attention;
mod autoencoder;
pub mod checkpoint;
mod classifier;
pub mod config;
mod control;
mod denoiser;
mod device;
mod edit_distance;
mod encoder;
pub mod energy;
mod error;
#[cfg(feature = "gguf")]
pub mod gguf;
mod grad;
pub mod guidance;
mod image_sampler;
mod lanes;
mod language_model;
pub mod layers;
mod masked_lm;
pub mod ndarray;
pub mod noise;
mod pass;
pub mod progress;
mod shared_tensor;
mod sites;
mod sys;
#[cfg(feature = "testing")]
pub mod testing;
mod token_control;
pub mod train;

pub use adapter::{Adapter, AdapterId, MergedWeights, copy_parameters};
pub use attention::{Attn, Mask};
pub use autoencoder::{Autoencoder, AutoencoderSpec, Latents};
pub use classifier::Classifier;
pub use config::Config;
pub use control::{At, Binding, Control, Controls, Next, Offset, Part, part_by_part};
pub use denoiser::{Condition, Denoiser, DenoiserSpec, NoiseLevel, Parameterisation, Prediction, Prepared};
pub use device::{Placement, device, kind};
pub use edit_distance::edit_distance;
pub use encoder::{Encoder, EncoderInput, EncoderSpec, Features, Reads};
pub use energy::{Energy, EnergyFn};
pub use error::{Error, RemoteError, Result};
pub use grad::{EnableGrad, is_recording};
pub use guidance::Guidance;
pub use image_sampler::{ImageRequest, ImageSampler};
pub use lanes::{BoxRows, Lane, Lanes, Rows};
pub use language_model::{
    LanguageModel, LmInput, LmOutput, LmSpec, Logits, Source, State, StateImpl, Tokens, WeightMap,
};
pub use masked_lm::MaskedLm;
pub use pass::{Pass, Taps};
pub use shared_tensor::SharedTensor;
pub use sites::{Dims, Site, SiteId, SiteKind, SiteMap, Slice};
pub use token_control::{Bans, PerRow, Role, RowControl, TokenControl, TokenControls, TokenControlsState};
