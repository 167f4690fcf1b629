//! The variational autoencoder of latent diffusion (Rombach et al. 2022): AutoencoderKL of diffusers.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::energy::checks;
use controlgen_core::layers::{Activation, Conv2d, GroupNorm};
use controlgen_core::{
    Autoencoder, AutoencoderSpec, Error, Latents, Pass, Placement, Result, SiteMap, WeightMap,
};
use tch::{Kind, Tensor};

use super::blocks::{
    Downsample2d, Resize, ResnetBlock2d, ResnetConfig, Scope, SelfAttention, SelfAttentionConfig, TimeNorm,
    Upsample2d, channels_last,
};
use super::tiling::Tiling;

/// The value of `_class_name` that this file serves.
pub const CLASS_NAME: &str = "AutoencoderKL";

/// ε of all norms.
const EPS: f64 = 1e-6;

/// Blocks of the encoder and of the decoder: without and with attention.
const DOWN: [&str; 2] = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"];
const UP: [&str; 2] = ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"];

/// The dimensions of an AutoencoderKL.
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderKlConfig {
    /// Channels of an image that is encoded.
    pub in_channels: i64,
    /// Channels of an image that is decoded.
    pub out_channels: i64,
    /// L: channels of a latent.
    pub latent_channels: i64,
    /// Channels of each level, that of the images first; the size is halved between levels.
    pub block_out_channels: Vec<i64>,
    /// Whether each level of the encoder has attentions.
    pub down_attention: Vec<bool>,
    /// Whether each level of the decoder has attentions, that of the latents first.
    pub up_attention: Vec<bool>,
    /// Residual blocks of a level of the encoder; the decoder has one more.
    pub layers_per_block: i64,
    /// Of the residual blocks.
    pub act_fn: Activation,
    /// Groups of the norms.
    pub norm_num_groups: i64,
    /// Whether the middle has an attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1 × 1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether one precedes the decoder.
    pub use_post_quant_conv: bool,
    /// s in z = s (e − m).
    pub scaling_factor: f64,
    /// m in z = s (e − m).
    pub shift_factor: f64,
    /// Whether f16 overflows in it, so that it is to run in f32 instead.
    pub force_upcast: bool,
}

impl AutoencoderKlConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for another class, unknown
    /// blocks, and latents with a mean and a deviation for each channel.
    pub fn from_config(config: &Config) -> Result<Self> {
        if let Some(name) = config.str("_class_name")?.filter(|&name| name != CLASS_NAME) {
            return Err(Error::unsupported(format!("_class_name `{name}`"), CLASS_NAME));
        }
        for field in ["latents_mean", "latents_std"] {
            if config.get(field).is_some() {
                return Err(Error::unsupported(format!("{field} of an {CLASS_NAME}"), "scaling_factor"));
            }
        }
        let channels = config.ints_if("block_out_channels", 1, limits::WIDTH)?.unwrap_or_else(|| vec![64]);
        if channels.is_empty() || channels.len() > 16 {
            return Err(config.error("block_out_channels", "1 to 16 levels", channels.len()));
        }
        let levels = |field: &str, known: [&str; 2]| -> Result<Vec<bool>> {
            let names = config.strs_if(field)?.unwrap_or_else(|| vec![known[0]]);
            if names.len() != channels.len() {
                let expected = format!("{} blocks, as block_out_channels", channels.len());
                return Err(config.error(field, expected, names.len()));
            }
            let attends = |name: &str| match known.iter().position(|&known| known == name) {
                Some(index) => Ok(index == 1),
                None => Err(Error::unsupported(format!("the block type `{name}`"), known.join(", "))),
            };
            names.into_iter().map(attends).collect()
        };
        let groups = config.int_if("norm_num_groups", 1, limits::WIDTH)?.unwrap_or(32);
        if let Some(odd) = channels.iter().find(|&&n| n % groups != 0) {
            let expected = format!("multiples of norm_num_groups = {groups}");
            return Err(config.error("block_out_channels", expected, odd));
        }
        let act_fn = config.str("act_fn")?.unwrap_or("silu");
        Ok(Self {
            in_channels: config.int_if("in_channels", 1, limits::WIDTH)?.unwrap_or(3),
            out_channels: config.int_if("out_channels", 1, limits::WIDTH)?.unwrap_or(3),
            latent_channels: config.int_if("latent_channels", 1, limits::WIDTH)?.unwrap_or(4),
            down_attention: levels("down_block_types", DOWN)?,
            up_attention: levels("up_block_types", UP)?,
            layers_per_block: config.int_if("layers_per_block", 1, limits::LAYERS)?.unwrap_or(1),
            act_fn: Activation::from_name(act_fn)?,
            norm_num_groups: groups,
            mid_block_add_attention: config.bool("mid_block_add_attention", true)?,
            use_quant_conv: config.bool("use_quant_conv", true)?,
            use_post_quant_conv: config.bool("use_post_quant_conv", true)?,
            scaling_factor: config.positive("scaling_factor", Some(0.18215))?,
            shift_factor: config.number("shift_factor", 0.0)?,
            force_upcast: config.bool("force_upcast", true)?,
            block_out_channels: channels,
        })
    }

    /// How many pixels a latent stands for, along each side.
    pub fn downscale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    fn resnet(&self, inputs: i64, outputs: i64) -> ResnetConfig {
        ResnetConfig {
            inputs,
            outputs,
            time: None,
            time_norm: TimeNorm::Default,
            skip_time_act: false,
            groups: self.norm_num_groups,
            eps: EPS,
            act: self.act_fn,
            scale: 1.0,
            resize: Resize::Keep,
        }
    }

    fn attention(&self, channels: i64) -> SelfAttentionConfig {
        SelfAttentionConfig { channels, heads: 1, groups: Some(self.norm_num_groups), eps: EPS, scale: 1.0 }
    }
}

/// An AutoencoderKL. A whole image is encoded or decoded at once, unless it is told to go row by row
/// ([`with_slicing`](Self::with_slicing)) or tile by tile ([`with_tiling`](Self::with_tiling)).
///
/// It runs in f32 where f16 is asked for and its configuration says that f16 overflows. What comes out has the element
/// type of what goes in.
pub struct AutoencoderKl {
    config: Arc<AutoencoderKlConfig>,
    spec: AutoencoderSpec,
    sites: Arc<SiteMap>,
    encoder: Half,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Half,
    tiling: Option<Tiling>,
    slicing: bool,
}

/// The encoder or the decoder.
struct Half {
    conv_in: Conv2d,
    /// Of the encoder: before the middle.
    down: Vec<Level<Downsample2d>>,
    mid_in: ResnetBlock2d,
    mid_attention: Option<SelfAttention>,
    mid_out: ResnetBlock2d,
    /// Of the decoder: after it.
    up: Vec<Level<Upsample2d>>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// Residual blocks, each perhaps with an attention after it, and what changes the size.
struct Level<R> {
    blocks: Vec<(ResnetBlock2d, Option<SelfAttention>)>,
    resize: Option<R>,
}

impl<R> Level<R> {
    fn load(
        scope: &mut Scope<'_, '_>,
        c: &AutoencoderKlConfig,
        (inputs, outputs): (i64, i64),
        (layers, attends): (i64, bool),
        resize: Option<R>,
    ) -> Result<Self> {
        let mut blocks = Vec::new();
        for i in 0..layers {
            let inputs = if i == 0 { inputs } else { outputs };
            let resnet = ResnetBlock2d::load(scope.below(format!("resnets.{i}")), c.resnet(inputs, outputs))?;
            let below = scope.below(format!("attentions.{i}"));
            let attention = match attends {
                true => Some(SelfAttention::load(below, c.attention(outputs))?),
                false => None,
            };
            blocks.push((resnet, attention));
        }
        Ok(Self { blocks, resize })
    }

    fn forward(&self, mut x: Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        for (resnet, attention) in &self.blocks {
            x = resnet.forward(x, None, pass)?;
            if let Some(attention) = attention {
                x = attention.forward(&x, pass)?;
            }
        }
        Ok(x)
    }

    fn handle(&self, resize: fn(&R) -> R) -> Self {
        let blocks = self.blocks.iter().map(|(r, a)| (r.handle(), a.as_ref().map(SelfAttention::handle)));
        Self { blocks: blocks.collect(), resize: self.resize.as_ref().map(resize) }
    }

    fn map(&self, f: WeightMap<'_>, resize: fn(&R, WeightMap<'_>) -> Result<R>) -> Result<Self> {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (resnet, attention) in &self.blocks {
            let attention = attention.as_ref().map(|layer| layer.map_weights(f)).transpose()?;
            blocks.push((resnet.map_weights(f)?, attention));
        }
        Ok(Self { blocks, resize: self.resize.as_ref().map(|layer| resize(layer, f)).transpose()? })
    }
}

impl Half {
    fn encoder(mut scope: Scope<'_, '_>, c: &AutoencoderKlConfig) -> Result<Self> {
        let (widths, last) = (&c.block_out_channels, c.block_out_channels.len() - 1);
        let conv_in = scope.conv("conv_in", (c.in_channels, widths[0]), 3, (1, 1))?;
        let mut down = Vec::new();
        for (i, &outputs) in widths.iter().enumerate() {
            let mut scope = scope.below(format!("down_blocks.{i}"));
            let layers = (c.layers_per_block, c.down_attention[i]);
            let inputs = widths[i.saturating_sub(1)];
            let mut level = Level::load(&mut scope, c, (inputs, outputs), layers, None)?;
            if i < last {
                level.resize = Some(Downsample2d::load(scope.below("downsamplers.0"), outputs, 0)?);
            }
            down.push(level);
        }
        Self::load(scope, c, conv_in, (down, Vec::new()), (widths[last], 2 * c.latent_channels))
    }

    fn decoder(mut scope: Scope<'_, '_>, c: &AutoencoderKlConfig) -> Result<Self> {
        let widths: Vec<i64> = c.block_out_channels.iter().rev().copied().collect();
        let conv_in = scope.conv("conv_in", (c.latent_channels, widths[0]), 3, (1, 1))?;
        let mut up = Vec::new();
        for (i, &outputs) in widths.iter().enumerate() {
            let mut scope = scope.below(format!("up_blocks.{i}"));
            let layers = (c.layers_per_block + 1, c.up_attention[i]);
            let inputs = widths[i.saturating_sub(1)];
            let mut level = Level::load(&mut scope, c, (inputs, outputs), layers, None)?;
            if i + 1 < widths.len() {
                level.resize = Some(Upsample2d::load(scope.below("upsamplers.0"), outputs)?);
            }
            up.push(level);
        }
        Self::load(scope, c, conv_in, (Vec::new(), up), (c.block_out_channels[0], c.out_channels))
    }

    /// The middle, and the end of so many channels in and out.
    fn load(
        mut scope: Scope<'_, '_>,
        c: &AutoencoderKlConfig,
        conv_in: Conv2d,
        (down, up): (Vec<Level<Downsample2d>>, Vec<Level<Upsample2d>>),
        (inputs, outputs): (i64, i64),
    ) -> Result<Self> {
        let width = c.block_out_channels.last().copied().unwrap_or(inputs);
        let mut mid = scope.below("mid_block");
        let mid_in = ResnetBlock2d::load(mid.below("resnets.0"), c.resnet(width, width))?;
        let below = mid.below("attentions.0");
        let mid_attention = match c.mid_block_add_attention {
            true => Some(SelfAttention::load(below, c.attention(width))?),
            false => None,
        };
        let mid_out = ResnetBlock2d::load(mid.below("resnets.1"), c.resnet(width, width))?;
        let conv_norm_out = scope.group_norm("conv_norm_out", (c.norm_num_groups, inputs), EPS)?;
        let conv_out = scope.conv("conv_out", (inputs, outputs), 3, (1, 1))?;
        Ok(Self { conv_in, down, mid_in, mid_attention, mid_out, up, conv_norm_out, conv_out })
    }

    fn share(&self) -> Self {
        Self {
            conv_in: self.conv_in.handle(),
            down: self.down.iter().map(|level| level.handle(Downsample2d::handle)).collect(),
            mid_in: self.mid_in.handle(),
            mid_attention: self.mid_attention.as_ref().map(SelfAttention::handle),
            mid_out: self.mid_out.handle(),
            up: self.up.iter().map(|level| level.handle(Upsample2d::handle)).collect(),
            conv_norm_out: self.conv_norm_out.handle(),
            conv_out: self.conv_out.handle(),
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let down = self.down.iter().map(|level| level.map(f, Downsample2d::map_weights));
        let down = down.collect::<Result<_>>()?;
        let up = self.up.iter().map(|level| level.map(f, Upsample2d::map_weights));
        Ok(Self {
            up: up.collect::<Result<_>>()?,
            down,
            conv_in: self.conv_in.map_weights(f)?,
            mid_in: self.mid_in.map_weights(f)?,
            mid_attention: self.mid_attention.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            mid_out: self.mid_out.map_weights(f)?,
            conv_norm_out: self.conv_norm_out.handle(),
            conv_out: self.conv_out.map_weights(f)?,
        })
    }

    /// `[B, I, H, W] → [B, O, H', W']`
    fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&channels_last(x)?, pass)?;
        for level in &self.down {
            x = level.forward(x, pass)?;
            if let Some(resize) = &level.resize {
                x = resize.forward(&x, pass)?; // (.., H / 2, W / 2)
            }
        }
        x = self.mid_in.forward(x, None, pass)?;
        if let Some(attention) = &self.mid_attention {
            x = attention.forward(&x, pass)?;
        }
        x = self.mid_out.forward(x, None, pass)?;
        for level in &self.up {
            x = level.forward(x, pass)?;
            if let Some(resize) = &level.resize {
                x = resize.forward(&x, None, pass)?; // (.., 2 H, 2 W)
            }
        }
        x = self.conv_norm_out.activated(&x, Activation::Silu)?;
        self.conv_out.forward(&x, pass)
    }
}

impl AutoencoderKl {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = AutoencoderKlConfig::from_config(config)?;
        let upcast = c.force_upcast && placement.kind == Kind::Half;
        let placement = if upcast { placement.with_kind(Kind::Float) } else { placement };
        let weights = weights.placed(placement.options());
        let mut sites = SiteMap::new();
        let mut root = Scope::new(&weights, &mut sites, None);
        let encoder = Half::encoder(root.below("encoder"), &c)?;
        let l = c.latent_channels;
        let mut quant = |name: &str, there: bool, n: i64| -> Result<Option<Conv2d>> {
            there.then(|| root.conv(name, (n, n), 1, (1, 0))).transpose()
        };
        let quant_conv = quant("quant_conv", c.use_quant_conv, 2 * l)?;
        let post_quant_conv = quant("post_quant_conv", c.use_post_quant_conv, l)?;
        let decoder = Half::decoder(root.below("decoder"), &c)?;
        weights.finish(&[])?;
        if c.in_channels != c.out_channels {
            return Err(config.error(
                "out_channels",
                format!("in_channels = {}", c.in_channels),
                c.out_channels,
            ));
        }
        let spec = AutoencoderSpec {
            architecture: CLASS_NAME.to_owned(),
            channels: c.in_channels,
            latent_channels: l,
            downscale: c.downscale(),
            scaling_factor: c.scaling_factor,
            shift_factor: c.shift_factor,
            placement,
        };
        let (config, sites) = (Arc::new(c), Arc::new(sites));
        let (tiling, slicing) = (None, false);
        Ok(Self { config, spec, sites, encoder, quant_conv, post_quant_conv, decoder, tiling, slicing })
    }

    /// Its dimensions.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// Where controls may act, under the names of diffusers.
    pub fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            encoder: self.encoder.share(),
            quant_conv: self.quant_conv.as_ref().map(Conv2d::handle),
            post_quant_conv: self.post_quant_conv.as_ref().map(Conv2d::handle),
            decoder: self.decoder.share(),
            ..*self
        }
    }

    /// A handle that goes tile by tile where an image is larger than a tile, so that memory does not grow with the
    /// image. Each tile is normalised by itself, so the image is not quite that of the whole.
    #[must_use]
    pub fn with_tiling(&self, tiling: Option<Tiling>) -> Self {
        Self { tiling, ..self.share() }
    }

    /// A handle that goes image by image, so that memory does not grow with the batch, unless controls are at work,
    /// which may compare rows.
    #[must_use]
    pub fn with_slicing(&self, slicing: bool) -> Self {
        Self { slicing, ..self.share() }
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            encoder: self.encoder.map(f)?,
            quant_conv: self.quant_conv.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            post_quant_conv: self.post_quant_conv.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            decoder: self.decoder.map(f)?,
            ..self.share()
        })
    }

    /// [`Autoencoder::encode`] with controls at its sites.
    ///
    /// # Errors
    /// Also those of [`Pass::check`] and the controls'.
    pub fn encode_under(&self, images: &Tensor, pass: &Pass<'_>) -> Result<Latents> {
        let (s, f) = (&self.spec, self.spec.downscale);
        let expected = || format!("[B, {}, H, W], H and W multiples of {f}", s.channels);
        self.check("images", images, (s.channels, f), &expected, pass)?;
        let moments = self.sliced(images, pass, &|x| {
            let encode = |x: &Tensor| {
                let h = self.encoder.forward(x, pass)?;
                self.quant_conv.as_ref().map_or(Ok(h.shallow_clone()), |conv| conv.forward(&h, pass))
            };
            match self.tiling {
                Some(tiling) => tiling.encode(x, f, &encode),
                None => encode(x),
            }
        })?; // (B, 2 L, H / f, W / f)
        let l = s.latent_channels;
        let mean = moments.f_narrow(1, 0, l)?.f_sub_scalar(s.shift_factor)?.f_mul_scalar(s.scaling_factor)?;
        // As PyTorch's diagonal Gaussian of diffusers: no deviation below e^−15 or above e^10.
        let log_variance = moments.f_narrow(1, l, l)?.f_clamp(-30.0, 20.0)?;
        let log_variance = log_variance.f_add_scalar(2.0 * s.scaling_factor.ln())?;
        let back = |t: Tensor| -> Result<Tensor> {
            Ok(t.f_to_device(images.device())?.f_to_kind(images.f_kind()?)?)
        };
        Ok(Latents { mean: back(mean)?, log_variance: Some(back(log_variance)?) })
    }

    /// [`Autoencoder::decode`] with controls at its sites.
    ///
    /// # Errors
    /// Also those of [`Pass::check`] and the controls'.
    pub fn decode_under(&self, latents: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (s, f) = (&self.spec, self.spec.downscale);
        let expected = || format!("[B, {}, H, W]", s.latent_channels);
        self.check("latents", latents, (s.latent_channels, 1), &expected, pass)?;
        let images = self.sliced(latents, pass, &|z| {
            let e = z.f_div_scalar(s.scaling_factor)?.f_add_scalar(s.shift_factor)?;
            let decode = |e: &Tensor| match &self.post_quant_conv {
                Some(conv) => self.decoder.forward(&conv.forward(e, pass)?, pass),
                None => self.decoder.forward(e, pass),
            };
            match self.tiling {
                Some(tiling) => tiling.decode(&e, f, &decode),
                None => decode(&e),
            }
        })?;
        Ok(images.f_to_device(latents.device())?.f_to_kind(latents.f_kind()?)?.f_contiguous()?)
    }

    /// Refuses anything but numbers `[B, channels, H, W]` with sides that are multiples.
    fn check(
        &self,
        what: &str,
        x: &Tensor,
        (channels, multiple): (i64, i64),
        expected: &dyn Fn() -> String,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let fits = |n: i64| n > 0 && n % multiple == 0;
        match x.size()[..] {
            [b, c, h, w] if b > 0 && c == channels && fits(h) && fits(w) => pass.check(&self.sites, b)?,
            _ => return Err(Error::shape(what, expected(), &x.size())),
        }
        checks::floating(what, x)?;
        checks::finite(what, &x.f_detach()?)
    }

    /// What `run` makes of all rows, or of one after the other.
    fn sliced(&self, x: &Tensor, pass: &Pass<'_>, run: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Placement { device, kind } = self.spec.placement;
        let x = x.f_to_device(device)?.f_to_kind(kind)?;
        let batch = x.size()[0];
        if !self.slicing || batch == 1 || pass.controls.is_some() {
            return run(&x);
        }
        let rows = (0..batch).map(|row| run(&x.f_narrow(0, row, 1)?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&rows, 0)?)
    }
}

impl Autoencoder for AutoencoderKl {
    fn handle(&self) -> Box<dyn Autoencoder> {
        Box::new(self.share())
    }

    fn spec(&self) -> &AutoencoderSpec {
        &self.spec
    }

    fn encode(&self, images: &Tensor) -> Result<Latents> {
        self.encode_under(images, &Pass::default())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_under(latents, &Pass::default())
    }
}
