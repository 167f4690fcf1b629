//! The dimensions of a UNet's network, and how diffusers' config.json says them.

use controlgen_core::config::{Config, limits};
use controlgen_core::layers::Activation;
use controlgen_core::{DenoiserSpec, Error, Placement, Result};

use super::{TextNorm, TimeNorm};
use crate::models::Predicts;

/// What attends after each residual block of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attends {
    /// Nothing.
    Nothing,
    /// The image to itself.
    Image {
        /// How many heads.
        heads: i64,
        /// Groups of the norm before it, if there is one.
        groups: Option<i64>,
    },
    /// The image to itself and to the text at once.
    Added {
        /// How many heads.
        heads: i64,
        /// Width of the text's states.
        text: i64,
        /// Whether to the text alone.
        only_cross_attention: bool,
        /// Before the text's projection.
        text_norm: TextNorm,
    },
    /// Transformer blocks.
    Text {
        /// How many heads.
        heads: i64,
        /// How many blocks.
        layers: i64,
        /// Width of the text's states.
        text: i64,
        /// Linear layers around the blocks instead of 1 × 1 convolutions.
        linear_projection: bool,
        /// Whether the first attention of a block sees the text too.
        only_cross_attention: bool,
    },
}

impl Attends {
    /// How many attentions see the text after one residual block.
    pub fn of_text(self) -> i64 {
        match self {
            Self::Nothing | Self::Image { .. } => 0,
            Self::Added { .. } => 1,
            Self::Text { layers, only_cross_attention, .. } => layers * (1 + i64::from(only_cross_attention)),
        }
    }
}

/// What changes the size at the end of a block; the last one of each way keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Nothing.
    None,
    /// A convolution.
    Conv,
    /// A residual block.
    Resnet,
}

/// A block of the way down, the middle or the way up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockConfig {
    /// How many residual blocks.
    pub layers: i64,
    /// What attends after each; in the middle after each but the last.
    pub attends: Attends,
    /// What changes the size at its end.
    pub resample: Resample,
    /// Whether the time's embedding goes without an activation before its projections.
    pub skip_time_act: bool,
    /// What sums with what is skipped are divided by.
    pub scale: f64,
}

/// What has one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelConfig {
    /// Channels.
    pub channels: i64,
    /// On the way down.
    pub down: BlockConfig,
    /// On the way up.
    pub up: BlockConfig,
}

/// The dimensions of a UNet's network.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// Channels in.
    pub in_channels: i64,
    /// Channels out.
    pub out_channels: i64,
    /// From the whole size to the smallest.
    pub blocks: Vec<LevelConfig>,
    /// At the smallest size.
    pub mid: Option<BlockConfig>,
    /// Width of the time's embedding.
    pub time: i64,
    /// How residual blocks are told the time.
    pub time_norm: TimeNorm,
    /// Groups of the norms.
    pub groups: i64,
    /// ε of the norms.
    pub eps: f64,
    /// After norms.
    pub act: Activation,
    /// After the last norm.
    pub out_act: Activation,
    /// What heights and widths are multiples of.
    pub multiple: i64,
    /// 1, or 0 for zeros below and right alone.
    pub downsample_padding: i64,
    /// Size of the kernel of `conv_in`.
    pub conv_in_kernel: i64,
    /// Size of the kernel of `conv_out`.
    pub conv_out_kernel: i64,
}

impl UNetConfig {
    /// What is known of a denoiser of such a network.
    ///
    /// # Errors
    /// [`Error::Config`] where `in_channels` and `out_channels` are not those of a sample.
    pub fn spec(
        &self,
        config: &Config,
        (class_name, predicts): (&str, Predicts),
        size: [i64; 2],
        placement: Placement,
    ) -> Result<DenoiserSpec> {
        let channels = predicts.channels(self.out_channels);
        if predicts.learned_variance && self.out_channels % 2 != 0 {
            let expected = "an even number, of a sample and of its variance";
            return Err(config.error("out_channels", expected, self.out_channels));
        }
        if self.in_channels < channels {
            let expected = format!("at least {channels}, those of a sample");
            return Err(config.error("in_channels", expected, self.in_channels));
        }
        Ok(DenoiserSpec {
            architecture: class_name.to_owned(),
            channels,
            size,
            multiple: self.multiple,
            parameterisation: predicts.parameterisation,
            learned_variance: predicts.learned_variance,
            placement,
        })
    }
}

/// What both classes of UNets say in the same words.
pub struct Fields<'c> {
    /// The file.
    pub config: &'c Config,
    /// `block_out_channels`
    pub channels: Vec<i64>,
    /// `down_block_types`
    pub down: Vec<&'c str>,
    /// `up_block_types`
    pub up: Vec<&'c str>,
    /// `norm_num_groups`
    pub groups: i64,
    /// `resnet_time_scale_shift`
    pub time_norm: TimeNorm,
}

impl<'c> Fields<'c> {
    /// Reads them.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`].
    pub fn read(config: &'c Config) -> Result<Self> {
        let absent = |field: &str| config.error(field, "a list", "nothing");
        let channels = config
            .ints_if("block_out_channels", 1, limits::WIDTH)?
            .ok_or_else(|| absent("block_out_channels"))?;
        let n = channels.len();
        if n == 0 || n > 16 {
            return Err(config.error("block_out_channels", "1 to 16 of them", n));
        }
        let types = |field: &str| -> Result<Vec<&'c str>> {
            let found = config.strs_if(field)?.ok_or_else(|| absent(field))?;
            if found.len() != n {
                let expected = format!("as many as block_out_channels, {n}");
                return Err(config.error(field, expected, found.len()));
            }
            // An older name of the same blocks.
            Ok(found.into_iter().map(|name| name.strip_prefix("UNetRes").unwrap_or(name)).collect())
        };
        let groups = config.int_if("norm_num_groups", 1, limits::WIDTH)?.unwrap_or(32);
        if let Some(odd) = channels.iter().find(|&channels| channels % groups != 0) {
            let expected = format!("multiples of norm_num_groups = {groups}");
            return Err(config.error("block_out_channels", expected, odd));
        }
        let time_norm = one_of(config, "resnet_time_scale_shift", "default", &["default", "scale_shift"])?;
        let positional = config.str("time_embedding_type")?.unwrap_or("positional");
        if positional != "positional" {
            return Err(Error::unsupported(format!("time_embedding_type `{positional}`"), "positional"));
        }
        Ok(Self {
            config,
            down: types("down_block_types")?,
            up: types("up_block_types")?,
            channels,
            groups,
            time_norm: if time_norm == "default" { TimeNorm::Default } else { TimeNorm::ScaleShift },
        })
    }

    /// Heads of `channels` that are `width` channels wide.
    ///
    /// # Errors
    /// [`Error::Config`] where they do not divide.
    pub fn heads_of(&self, channels: i64, width: i64) -> Result<i64> {
        if channels % width != 0 {
            let expected = format!("a divisor of {channels} channels");
            return Err(self.config.error("attention_head_dim", expected, width));
        }
        Ok(channels.div_euclid(width))
    }

    /// The network, of blocks in the order of `block_out_channels`.
    ///
    /// # Errors
    /// [`Error::Config`] for what makes no sense.
    pub fn network(&self, blocks: Vec<LevelConfig>, mid: Option<BlockConfig>) -> Result<UNetConfig> {
        let c = self.config;
        let first = self.channels.first().copied().unwrap_or(0);
        let kernel = |field: &str| -> Result<i64> {
            let size = c.int_if(field, 1, 31)?.unwrap_or(3);
            if size % 2 == 1 { Ok(size) } else { Err(c.error(field, "an odd number", size)) }
        };
        let act = Activation::from_name(c.str("act_fn")?.unwrap_or("silu"))?;
        Ok(UNetConfig {
            in_channels: c.int("in_channels", 1, limits::WIDTH)?,
            out_channels: c.int("out_channels", 1, limits::WIDTH)?,
            blocks,
            mid,
            time: c.int_if("time_embedding_dim", 1, limits::WIDTH)?.unwrap_or(4 * first),
            time_norm: self.time_norm,
            groups: self.groups,
            eps: c.positive("norm_eps", Some(1e-5))?,
            act,
            out_act: act,
            multiple: self.multiple(),
            downsample_padding: c.int_if("downsample_padding", 0, 1)?.unwrap_or(1),
            conv_in_kernel: kernel("conv_in_kernel")?,
            conv_out_kernel: kernel("conv_out_kernel")?,
        })
    }

    /// `sample_size`, one number or height and width; or eight times the least size.
    ///
    /// # Errors
    /// [`Error::Config`] for what is neither, or not in multiples of `multiple`.
    pub fn sample_size(&self, multiple: i64) -> Result<[i64; 2]> {
        let found = self.config.ints_each("sample_size", 2, 1, limits::WIDTH)?;
        let size = found.map_or([8 * self.multiple(); 2], |sizes| [sizes[0], sizes[1]]);
        if size.iter().any(|n| n % multiple != 0) {
            let expected = format!("a multiple of {multiple}");
            return Err(self.config.error("sample_size", expected, format!("{size:?}")));
        }
        Ok(size)
    }

    /// What heights and widths are multiples of: they are halved between blocks.
    pub fn multiple(&self) -> i64 {
        1 << (self.channels.len() - 1)
    }
}

/// The value of a field that is one of a few, or `default`.
///
/// # Errors
/// [`Error::Unsupported`] for another, naming the known.
pub fn one_of<'c>(config: &'c Config, field: &str, default: &'c str, known: &[&str]) -> Result<&'c str> {
    let found = config.str(field)?.unwrap_or(default);
    if known.contains(&found) {
        return Ok(found);
    }
    Err(Error::unsupported(format!("{field} `{found}`"), known.join(", ")))
}

/// An error for a block's type that is none of the known.
pub fn unknown_block(field: &str, found: &str, known: &[&str]) -> Error {
    Error::unsupported(format!("`{found}` in {field}"), known.join(", "))
}
