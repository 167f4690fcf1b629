//! Denoisers, autoencoders and encoders, each read from top to bottom in one file. `blocks` is what they share.

mod autoencoder_kl;
mod blocks;
mod class_labels;
mod clip;
mod clip_text;
mod clip_vision;
mod conditions;
mod dit;
mod encoder_unet;
mod prior_transformer;
mod sample;
mod tiling;
mod unclip_text_proj;
mod unet_2d;
mod unet_2d_condition;

pub use autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
pub use blocks::{Attends, BlockConfig, LevelConfig, Resample, TextNorm, TimeNorm, UNetConfig};
pub use class_labels::ClassLabels;
pub use clip::ClipBlocks;
pub use clip_text::{ClipLayer, ClipText, ClipTextConfig, ClipTextInput};
pub use clip_vision::{ClipVision, ClipVisionConfig};
pub use dit::{Dit, DitConfig};
pub use encoder_unet::{EncoderUNet, EncoderUNetConfig, Pool};
pub use prior_transformer::{PriorTransformer, PriorTransformerConfig};
pub use tiling::Tiling;
pub use unclip_text_proj::{UnClipConditions, UnClipTextProj, UnClipTextProjConfig};
pub use unet_2d::{UNet2d, UNet2dConfig};
pub use unet_2d_condition::{AddedEmbedding, UNet2dCondition, UNet2dConditionConfig};

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::config::Config;
use controlgen_core::{Autoencoder, Denoiser, Encoder, Error, Parameterisation, Placement, Result};

/// Opens the denoiser of a diffusers directory: config.json, and diffusion_pytorch_model.safetensors or its shards.
///
/// # Errors
/// [`Error::Unsupported`] for a class that is not known, naming those that are; [`Error::Config`], [`Error::Keys`],
/// [`Error::Shape`], [`Error::Format`], [`Error::Io`] for what is wrong with the files.
pub fn open_denoiser(
    directory: &Path,
    predicts: Predicts,
    placement: Placement,
) -> Result<Box<dyn Denoiser>> {
    let config = Config::open(&directory.join("config.json"))?;
    let source = Safetensors::open(directory)?;
    load_denoiser(&config, &Weights::new(&source, placement.options()), predicts, placement)
}

/// Loads the denoiser that `config` describes from `weights`, placed alike.
///
/// # Errors
/// As [`open_denoiser`].
pub fn load_denoiser(
    config: &Config,
    weights: &Weights<'_>,
    predicts: Predicts,
    placement: Placement,
) -> Result<Box<dyn Denoiser>> {
    let [dit, old_dit] = dit::CLASS_NAMES;
    let (unets, prior) =
        ([unet_2d::CLASS_NAME, unet_2d_condition::CLASS_NAME], prior_transformer::CLASS_NAME);
    let known = [dit, old_dit, unets[0], unets[1], prior];
    let class = config
        .str("_class_name")?
        .ok_or_else(|| config.error("_class_name", format!("one of {}", known.join(", ")), "nothing"))?;
    Ok(match class {
        _ if dit::CLASS_NAMES.contains(&class) => Box::new(Dit::load(config, weights, predicts, placement)?),
        unet_2d::CLASS_NAME => Box::new(UNet2d::load(config, weights, predicts, placement)?),
        unet_2d_condition::CLASS_NAME => {
            Box::new(UNet2dCondition::load(config, weights, predicts, placement)?)
        }
        prior_transformer::CLASS_NAME => {
            Box::new(PriorTransformer::load(config, weights, predicts, placement)?)
        }
        other => return Err(Error::unsupported(format!("the denoiser class `{other}`"), known.join(", "))),
    })
}

/// Opens the autoencoder of a diffusers directory: config.json, and diffusion_pytorch_model.safetensors or its shards.
///
/// # Errors
/// [`Error::Unsupported`] for a class that is not known, naming those that are; [`Error::Config`], [`Error::Keys`],
/// [`Error::Shape`], [`Error::Format`], [`Error::Io`] for what is wrong with the files.
pub fn open_autoencoder(directory: &Path, placement: Placement) -> Result<Box<dyn Autoencoder>> {
    let (config, known) = (Config::open(&directory.join("config.json"))?, autoencoder_kl::CLASS_NAME);
    match config.str("_class_name")? {
        Some(class) if class == known => {}
        Some(other) => return Err(Error::unsupported(format!("the autoencoder class `{other}`"), known)),
        None => return Err(config.error("_class_name", known, "nothing")),
    }
    let source = Safetensors::open(directory)?;
    Ok(Box::new(AutoencoderKl::load(&config, &Weights::new(&source, placement.options()), placement)?))
}

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
    let source = Safetensors::open(directory)?;
    load_encoder(&config, &Weights::new(&source, placement.options()), placement)
}

/// Loads the encoder that `config` describes from `weights`, placed alike.
///
/// # Errors
/// As [`open_encoder`].
pub fn load_encoder(
    config: &Config,
    weights: &Weights<'_>,
    placement: Placement,
) -> Result<Box<dyn Encoder>> {
    match config.str("model_type")? {
        Some("clip_text_model") => Ok(Box::new(ClipText::load(config, weights, placement)?)),
        Some("clip_vision_model") => Ok(Box::new(ClipVision::load(config, weights, placement)?)),
        found => {
            let what = format!("model_type `{}` as an encoder", found.unwrap_or("nothing"));
            Err(Error::unsupported(what, "clip_text_model, clip_vision_model"))
        }
    }
}
