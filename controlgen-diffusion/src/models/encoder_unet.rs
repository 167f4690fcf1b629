//! EncoderUNetModel: half of a UNet, from a noised image to numbers: the classifiers of Dhariwal & Nichol, "Diffusion
//! Models Beat GANs on Image Synthesis" (2021), section 4, and towers of images that know of noise (Nichol et al. 2021,
//! GLIDE's noised CLIP).

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::energy::checks;
use controlgen_core::layers::{Activation, GroupNorm, Linear};
use controlgen_core::{Error, Pass, Placement, Result, SiteMap, WeightMap};
use serde_json::json;
use tch::{Kind, Tensor};

use super::blocks::{
    AttentionPool, Known, Scope, Sinusoid, Text, TimeEmbedding, TimestepEmbedding, UNetEncoder, one_of,
};
use super::class_labels::ClassLabels;
use super::sample::input;
use super::unet_2d::UNet2dConfig;

/// The value of `_class_name` that this file serves.
pub const CLASS_NAME: &str = "EncoderUNetModel";

/// How the smallest size becomes one vector: `pool`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// `adaptive`: the mean of all places.
    Mean,
    /// `attention`: what their mean sees in them.
    Attention {
        /// How many heads.
        heads: i64,
    },
}

/// The dimensions of an EncoderUNetModel. config.json has the fields of diffusers' UNet2DModel, but for those of the way
/// up; `out_channels` is how many numbers come out, `pool` is `adaptive` or `attention`, and `model_channels` the width of
/// the time's sinusoid, `block_out_channels[0]` if it is absent.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderUNetConfig {
    /// The way down and the middle.
    pub unet: UNet2dConfig,
    /// Width of the time's sinusoid.
    pub model_channels: i64,
    /// How the smallest size becomes one vector.
    pub pool: Pool,
}

impl EncoderUNetConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// As [`UNet2dConfig::from_config`].
    pub fn from_config(config: &Config) -> Result<Self> {
        if let Some(name) = config.str("_class_name")?.filter(|&name| name != CLASS_NAME) {
            return Err(Error::unsupported(format!("_class_name `{name}`"), CLASS_NAME));
        }
        let levels = config.strs_if("down_block_types")?.map_or(0, |names| names.len());
        let mut fields = config.fields().clone();
        // There is no way up: any that the levels allow will do.
        fields.insert("up_block_types".to_owned(), json!(vec!["UpBlock2D"; levels]));
        let unet = UNet2dConfig::from_config(&Config::from_fields(config.file(), fields))?;
        if unet.class_labels != ClassLabels::None {
            return Err(Error::unsupported("classes as a condition of a classifier", "no num_class_embeds"));
        }
        let last = unet.network.blocks.last().map_or(0, |block| block.channels);
        let pool = match one_of(config, "pool", "adaptive", &["adaptive", "attention"])? {
            "adaptive" => Pool::Mean,
            _ => {
                let width = config.int_if("attention_head_dim", 1, limits::WIDTH)?.unwrap_or(8);
                if last % width != 0 {
                    let expected = format!("a divisor of {last} channels");
                    return Err(config.error("attention_head_dim", expected, width));
                }
                Pool::Attention { heads: last.div_euclid(width) }
            }
        };
        let first = unet.network.blocks.first().map_or(0, |block| block.channels);
        let model_channels = config.int_if("model_channels", 2, limits::WIDTH)?.unwrap_or(first);
        Ok(Self { unet, model_channels, pool })
    }

    /// How many numbers come out.
    pub fn outputs(&self) -> i64 {
        self.unet.network.out_channels
    }
}

enum Head {
    Mean(Linear),
    Attention(AttentionPool),
}

/// An EncoderUNetModel: f(x_t, t), logits or features.
pub struct EncoderUNet {
    config: Arc<EncoderUNetConfig>,
    placement: Placement,
    sites: Arc<SiteMap>,
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    encoder: UNetEncoder,
    conv_norm_out: GroupNorm,
    head: Head,
}

impl EncoderUNet {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = EncoderUNetConfig::from_config(config)?;
        let network = &c.unet.network;
        let mut sites = SiteMap::new();
        let mut scope = Scope::new(weights, &mut sites, None);
        let time_proj =
            Sinusoid::new(c.model_channels, c.unet.flip_sin_to_cos, c.unet.freq_shift, placement.device)?;
        let time_embedding = TimestepEmbedding::load(
            scope.below("time_embedding"),
            (c.model_channels, network.time),
            Activation::Silu,
            None,
        )?;
        let encoder = UNetEncoder::load(&mut scope, network)?;
        let last = network.blocks.last().map_or(0, |block| block.channels);
        let conv_norm_out = scope.group_norm("conv_norm_out", (network.groups, last), network.eps)?;
        let size = |n: usize| c.unet.sample_size[n].div_euclid(network.multiple);
        let head = match c.pool {
            Pool::Mean => Head::Mean(scope.linear("out_proj", (last, c.outputs()), true)?),
            Pool::Attention { heads } => {
                let places = size(0) * size(1);
                Head::Attention(AttentionPool::load(scope.below("pool"), places, (last, c.outputs()), heads)?)
            }
        };
        weights.finish(&[])?;
        Ok(Self {
            config: Arc::new(c),
            placement,
            sites: Arc::new(sites),
            time_proj,
            time_embedding,
            encoder,
            conv_norm_out,
            head,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &EncoderUNetConfig {
        &self.config
    }

    /// Where it runs.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Where controls may act.
    pub fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            placement: self.placement,
            sites: Arc::clone(&self.sites),
            time_proj: self.time_proj.handle(),
            time_embedding: self.time_embedding.handle(),
            encoder: self.encoder.handle(),
            conv_norm_out: self.conv_norm_out.handle(),
            head: match &self.head {
                Head::Mean(layer) => Head::Mean(layer.handle()),
                Head::Attention(pool) => Head::Attention(pool.handle()),
            },
        }
    }

    /// Images `[B, C, H, W]` as noised at timesteps t `[B]`, to f32 `[B, outputs]`. Differentiable in x.
    ///
    /// # Errors
    /// [`Error::Shape`] for images of another size or other channels, and timesteps that are not as many;
    /// [`Error::Kind`]; the controls'.
    pub fn forward(&self, x: &Tensor, t: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let c = &self.config.unet;
        let [height, width] = c.sample_size;
        let (size, channels) = (x.size(), c.network.in_channels);
        // The mean takes any size that halves.
        let other = match (self.config.pool, &size[..]) {
            (Pool::Mean, &[_, found, h, w]) => {
                found != channels || h % c.network.multiple != 0 || w % c.network.multiple != 0
            }
            (Pool::Attention { .. }, &[_, found, h, w]) => [found, h, w] != [channels, height, width],
            _ => true,
        };
        if other || size[0] < 1 {
            return Err(Error::shape("images", format!("[B, {channels}, {height}, {width}]"), &size));
        }
        checks::floating("images", x)?;
        if t.size() != [size[0]] {
            return Err(Error::shape("timesteps", format!("[{}]", size[0]), &t.size()));
        }
        pass.check(&self.sites, size[0])?;
        let input = input(x, None, c.center_input_sample, self.placement)?;
        let time = self.time_embedding.forward(&self.time_proj.forward(t)?, pass)?; // (B, D)
        let time = TimeEmbedding::new(time, c.network.act)?;
        let known = Known { time: &time, text: Text::new(&[], None), pass };
        let y = self.encoder.forward(&input, known)?;
        let y = self.conv_norm_out.activated(&y, Activation::Silu)?;
        let found = match &self.head {
            Head::Mean(layer) => layer.forward(&y.f_mean_dim(&[2i64, 3][..], false, None::<Kind>)?, pass)?,
            Head::Attention(pool) => pool.forward(&y, pass)?,
        };
        Ok(found.f_to_kind(Kind::Float)?)
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            time_embedding: self.time_embedding.map_weights(f)?,
            encoder: self.encoder.map_weights(f)?,
            head: match &self.head {
                Head::Mean(layer) => Head::Mean(layer.map_weights(f)?),
                Head::Attention(pool) => Head::Attention(pool.map_weights(f)?),
            },
            ..self.share()
        })
    }
}
