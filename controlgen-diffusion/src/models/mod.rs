//! Denoisers, autoencoders and encoders, each read from top to bottom in one file. `blocks` is what they share.

mod clip;
mod clip_text;
mod clip_vision;

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights};
use controlgen_core::{Config, Encoder, Error, Parameterisation, Placement, Result};

pub use clip::ClipBlocks;
pub use clip_text::{ClipLayer, ClipText, ClipTextConfig, ClipTextInput};
pub use clip_vision::{ClipVision, ClipVisionConfig};

/// What a denoiser's own config.json does not say: it stands in the scheduler's file, or is known of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicts {
    /// What it predicts: `prediction_type` of the scheduler.
    pub parameterisation: Parameterisation,
    /// Whether half of its output is the variance of a step: `variance_type` `learned` or `learned_range`. The channels
    /// of a sample are then half of `out_channels`. Channels in beyond those of a sample are a condition's: its feature
    /// `concat` `[C', H, W]`.
    pub learned_variance: bool,
}

impl Predicts {
    /// ε, and no variance.
    pub const EPSILON: Self = Self { parameterisation: Parameterisation::Epsilon, learned_variance: false };

    /// How many channels a sample has, of a model of so many channels out.
    pub fn channels(self, out_channels: i64) -> i64 {
        if self.learned_variance { out_channels.div_euclid(2) } else { out_channels }
    }
}

/// Opens the encoder of a Hugging Face directory: CLIP's of text or of images. T5's is in controlgen-text.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture that is not known, naming those that are; [`Error::Config`],
/// [`Error::Keys`], [`Error::Shape`], [`Error::Format`], [`Error::Io`] for what is wrong with the files.
pub fn open_encoder(directory: &Path, placement: Placement) -> Result<Box<dyn Encoder>> {
    let config = Config::open(&directory.join("config.json"))?;
    load_encoder(&config, &Safetensors::open(directory)?, placement)
}

/// Loads the encoder that `config` describes from `source`.
///
/// # Errors
/// As [`open_encoder`].
pub fn load_encoder(
    config: &Config,
    source: &dyn TensorSource,
    placement: Placement,
) -> Result<Box<dyn Encoder>> {
    let weights = Weights::new(source, placement.options());
    match config.str("model_type")? {
        Some("clip_text_model") => Ok(Box::new(ClipText::load(config, &weights, placement)?)),
        Some("clip_vision_model") => Ok(Box::new(ClipVision::load(config, &weights, placement)?)),
        found => {
            let what = format!("model_type `{}` as an encoder", found.unwrap_or("nothing"));
            Err(Error::unsupported(what, "clip_text_model, clip_vision_model"))
        }
    }
}
