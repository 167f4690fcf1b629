//! The network of a UNet: half the size block by block, and back, with what was skipped put beside it (Ronneberger et
//! al. 2015; Ho et al. 2020).

use controlgen_core::layers::{Conv2d, GroupNorm};
use controlgen_core::{Pass, Result, WeightMap};
use tch::Tensor;

use super::{
    AddedKvAttention, AddedKvConfig, Attends, BlockConfig, Downsample2d, Resample, Resize, ResnetBlock2d,
    ResnetConfig, Scope, SelfAttention, SelfAttentionConfig, Text, TimeEmbedding, Transformer2d,
    Transformer2dConfig, UNetConfig, Upsample2d,
};

/// The attention after a residual block.
enum Attend {
    Nothing,
    Image(SelfAttention),
    Added(AddedKvAttention),
    Text(Transformer2d),
}

impl Attend {
    fn load(scope: Scope<'_, '_>, c: &UNetConfig, block: &BlockConfig, channels: i64) -> Result<Self> {
        let groups = c.groups;
        Ok(match block.attends {
            Attends::Nothing => Self::Nothing,
            Attends::Image { heads, groups } => Self::Image(SelfAttention::load(
                scope,
                SelfAttentionConfig { channels, heads, groups, eps: c.eps, scale: block.scale },
            )?),
            Attends::Added { heads, text, only_cross_attention, text_norm } => {
                Self::Added(AddedKvAttention::load(
                    scope,
                    AddedKvConfig { channels, heads, text, groups, only_cross_attention, text_norm },
                )?)
            }
            Attends::Text { heads, layers, text, linear_projection, only_cross_attention } => {
                Self::Text(Transformer2d::load(
                    scope,
                    Transformer2dConfig {
                        channels,
                        heads,
                        layers,
                        text,
                        groups,
                        linear_projection,
                        only_cross_attention,
                    },
                )?)
            }
        })
    }

    fn handle(&self) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Image(attention) => Self::Image(attention.handle()),
            Self::Added(attention) => Self::Added(attention.handle()),
            Self::Text(attention) => Self::Text(attention.handle()),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(match self {
            Self::Nothing => Self::Nothing,
            Self::Image(attention) => Self::Image(attention.map_weights(f)?),
            Self::Added(attention) => Self::Added(attention.map_weights(f)?),
            Self::Text(attention) => Self::Text(attention.map_weights(f)?),
        })
    }

    fn prepare(&self, text: &Tensor, pass: &Pass<'_>, into: &mut Vec<Tensor>) -> Result<()> {
        match self {
            Self::Nothing | Self::Image(_) => Ok(()),
            Self::Added(attention) => attention.prepare(text, pass, into),
            Self::Text(attention) => attention.prepare(text, pass, into),
        }
    }

    fn forward(&self, x: Tensor, text: &mut Text<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        match self {
            Self::Nothing => Ok(x),
            Self::Image(attention) => attention.forward(&x, pass),
            Self::Added(attention) => attention.forward(&x, text, pass),
            Self::Text(attention) => attention.forward(&x, text, pass),
        }
    }
}

/// What changes the size at the end of a block.
enum Resampler {
    Down(Downsample2d),
    Up(Upsample2d),
    Resnet(Box<ResnetBlock2d>),
}

impl Resampler {
    fn handle(&self) -> Self {
        match self {
            Self::Down(layer) => Self::Down(layer.handle()),
            Self::Up(layer) => Self::Up(layer.handle()),
            Self::Resnet(layer) => Self::Resnet(Box::new(layer.handle())),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(match self {
            Self::Down(layer) => Self::Down(layer.map_weights(f)?),
            Self::Up(layer) => Self::Up(layer.map_weights(f)?),
            Self::Resnet(layer) => Self::Resnet(Box::new(layer.map_weights(f)?)),
        })
    }

    /// To the size of what is put beside it next, where that is known: odd sizes are halved upwards.
    fn forward(
        &self,
        x: Tensor,
        size: Option<(i64, i64)>,
        time: &TimeEmbedding,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        match self {
            Self::Down(layer) => layer.forward(&x, pass),
            Self::Up(layer) => layer.forward(&x, size, pass),
            Self::Resnet(layer) => layer.forward(x, Some(time), pass),
        }
    }
}

/// Residual blocks, each with what attends after it, and a change of size.
struct Block {
    resnets: Vec<ResnetBlock2d>,
    attends: Vec<Attend>,
    resampler: Option<Resampler>,
}

impl Block {
    /// Channels into and out of each residual block; how many of them attend; how the block ends.
    fn load(
        mut scope: Scope<'_, '_>,
        c: &UNetConfig,
        block: &BlockConfig,
        (channels, attending): (&[(i64, i64)], usize),
        resize: Resize,
    ) -> Result<Self> {
        let resnet = |(inputs, outputs), resize| ResnetConfig {
            inputs,
            outputs,
            time: Some(c.time),
            time_norm: c.time_norm,
            skip_time_act: block.skip_time_act,
            groups: c.groups,
            eps: c.eps,
            act: c.act,
            scale: block.scale,
            resize,
        };
        let (mut resnets, mut attends) = (Vec::new(), Vec::new());
        for (i, &of) in channels.iter().enumerate() {
            let scoped = scope.below(format!("resnets.{i}"));
            resnets.push(ResnetBlock2d::load(scoped, resnet(of, Resize::Keep))?);
            if i < attending {
                attends.push(Attend::load(scope.below(format!("attentions.{i}")), c, block, of.1)?);
            }
        }
        let last = channels.last().map_or(0, |of| of.1);
        let name = if resize == Resize::Up { "upsamplers.0" } else { "downsamplers.0" };
        let resampler = match (block.resample, resize) {
            (Resample::None, _) | (_, Resize::Keep) => None,
            (Resample::Resnet, _) => {
                let block = ResnetBlock2d::load(scope.below(name), resnet((last, last), resize))?;
                Some(Resampler::Resnet(Box::new(block)))
            }
            (Resample::Conv, Resize::Down) => {
                Some(Resampler::Down(Downsample2d::load(scope.below(name), last, c.downsample_padding)?))
            }
            (Resample::Conv, Resize::Up) => Some(Resampler::Up(Upsample2d::load(scope.below(name), last)?)),
        };
        Ok(Self { resnets, attends, resampler })
    }

    fn handle(&self) -> Self {
        Self {
            resnets: self.resnets.iter().map(ResnetBlock2d::handle).collect(),
            attends: self.attends.iter().map(Attend::handle).collect(),
            resampler: self.resampler.as_ref().map(Resampler::handle),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            resnets: self.resnets.iter().map(|layer| layer.map_weights(f)).collect::<Result<_>>()?,
            attends: self.attends.iter().map(|layer| layer.map_weights(f)).collect::<Result<_>>()?,
            resampler: self.resampler.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
        })
    }

    fn prepare(&self, text: &Tensor, pass: &Pass<'_>, into: &mut Vec<Tensor>) -> Result<()> {
        self.attends.iter().try_for_each(|attend| attend.prepare(text, pass, into))
    }

    /// Residual blocks and what attends; each sees what `before` makes of x, and shows `after` what came of it.
    fn forward(&self, x: Tensor, known: &mut Known<'_, '_>, skips: &mut Skips) -> Result<Tensor> {
        let mut x = x;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(skips.before(x)?, Some(known.time), known.pass)?;
            if let Some(attend) = self.attends.get(i) {
                x = attend.forward(x, &mut known.text, known.pass)?;
            }
            skips.after(&x);
        }
        if let Some(resampler) = &self.resampler {
            x = resampler.forward(x, skips.size()?, known.time, known.pass)?;
            skips.after(&x);
        }
        Ok(x)
    }
}

/// What every block knows beside the image.
pub struct Known<'a, 'p> {
    /// The time.
    pub time: &'a TimeEmbedding,
    /// The text.
    pub text: Text<'a>,
    /// The pass.
    pub pass: &'a Pass<'p>,
}

/// What the way down leaves for the way up, the last first.
enum Skips {
    Down(Vec<Tensor>),
    Middle(Vec<Tensor>),
    Up(Vec<Tensor>),
}

impl Skips {
    fn before(&mut self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::Down(_) | Self::Middle(_) => Ok(x),
            Self::Up(left) => match left.pop() {
                Some(skip) => Ok(Tensor::f_cat(&[x, skip], 1)?),
                None => Ok(x),
            },
        }
    }

    /// Height and width of what is put beside x next.
    fn size(&self) -> Result<Option<(i64, i64)>> {
        let Self::Up(left) = self else { return Ok(None) };
        let size = left.last().map(Tensor::size4).transpose()?;
        Ok(size.map(|(_, _, h, w)| (h, w)))
    }

    fn after(&mut self, x: &Tensor) {
        if let Self::Down(left) = self {
            left.push(x.shallow_clone());
        }
    }

    /// The next part of the way.
    fn turn(self) -> Self {
        match self {
            Self::Down(left) => Self::Middle(left),
            Self::Middle(left) | Self::Up(left) => Self::Up(left),
        }
    }
}

/// The way down and the middle of a UNet.
pub struct UNetEncoder {
    conv_in: Conv2d,
    down: Vec<Block>,
    mid: Option<Block>,
}

impl UNetEncoder {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of [`UNet::load`].
    pub fn load(scope: &mut Scope<'_, '_>, c: &UNetConfig) -> Result<Self> {
        let n = c.blocks.len();
        let first = c.blocks.first().map_or(0, |block| block.channels);
        let conv_in =
            scope.conv("conv_in", (c.in_channels, first), c.conv_in_kernel, same(c.conv_in_kernel))?;
        let mut down = Vec::new();
        let mut width = first;
        for (i, block) in c.blocks.iter().enumerate() {
            let of: Vec<_> = (0..block.down.layers)
                .map(|layer| (if layer == 0 { width } else { block.channels }, block.channels))
                .collect();
            let resize = if i + 1 == n { Resize::Keep } else { Resize::Down };
            let scope = scope.below(format!("down_blocks.{i}"));
            down.push(Block::load(scope, c, &block.down, (&of, of.len()), resize)?);
            width = block.channels;
        }
        let mid = match &c.mid {
            None => None,
            Some(block) => {
                let attending = usize::try_from(block.layers - 1).unwrap_or(0);
                let of = vec![(width, width); attending + 1];
                let scope = scope.below("mid_block");
                Some(Block::load(scope, c, block, (&of, attending), Resize::Keep)?)
            }
        };
        Ok(Self { conv_in, down, mid })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            conv_in: self.conv_in.handle(),
            down: self.down.iter().map(Block::handle).collect(),
            mid: self.mid.as_ref().map(Block::handle),
        }
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            conv_in: self.conv_in.map_weights(f)?,
            down: self.down.iter().map(|block| block.map_weights(f)).collect::<Result<_>>()?,
            mid: self.mid.as_ref().map(|block| block.map_weights(f)).transpose()?,
        })
    }

    fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.down.iter().chain(&self.mid)
    }

    /// `[B, C, H, W] → [B, C', H', W']`, at the smallest size.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, mut known: Known<'_, '_>) -> Result<Tensor> {
        Ok(self.encode(x, &mut known)?.0)
    }

    fn encode(&self, x: &Tensor, known: &mut Known<'_, '_>) -> Result<(Tensor, Skips)> {
        let mut x = self.conv_in.forward(x, known.pass)?;
        let mut skips = Skips::Down(vec![x.shallow_clone()]);
        for block in &self.down {
            x = block.forward(x, known, &mut skips)?;
        }
        skips = skips.turn();
        if let Some(mid) = &self.mid {
            x = mid.forward(x, known, &mut skips)?;
        }
        Ok((x, skips.turn()))
    }
}

/// Stride and padding that keep a size under a kernel.
fn same(kernel: i64) -> (i64, i64) {
    (1, (kernel - 1).div_euclid(2))
}

/// All blocks of a UNet.
pub struct UNet {
    encoder: UNetEncoder,
    up: Vec<Block>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    config: UNetConfig,
}

impl UNet {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of the checkpoint; [`Error::Value`](controlgen_core::Error::Value) where the groups do not divide the
    /// channels.
    pub fn load(mut scope: Scope<'_, '_>, c: UNetConfig) -> Result<Self> {
        let encoder = UNetEncoder::load(&mut scope, &c)?;
        let widths: Vec<i64> = c.blocks.iter().map(|block| block.channels).collect();
        let (n, first) = (widths.len(), widths.first().copied().unwrap_or(0));
        let mut up = Vec::new();
        let mut width = widths.last().copied().unwrap_or(0);
        for (i, block) in c.blocks.iter().rev().enumerate() {
            // What is skipped: this block's channels; at the end those of the block before it.
            let before = widths[n.saturating_sub(i + 2)];
            let of: Vec<_> = (0..block.up.layers)
                .map(|layer| {
                    let skipped = if layer + 1 == block.up.layers { before } else { block.channels };
                    (if layer == 0 { width } else { block.channels } + skipped, block.channels)
                })
                .collect();
            let resize = if i + 1 == n { Resize::Keep } else { Resize::Up };
            let scope = scope.below(format!("up_blocks.{i}"));
            up.push(Block::load(scope, &c, &block.up, (&of, of.len()), resize)?);
            width = block.channels;
        }
        let conv_norm_out = scope.group_norm("conv_norm_out", (c.groups, first), c.eps)?;
        let conv_out =
            scope.conv("conv_out", (first, c.out_channels), c.conv_out_kernel, same(c.conv_out_kernel))?;
        Ok(Self { encoder, up, conv_norm_out, conv_out, config: c })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            encoder: self.encoder.handle(),
            up: self.up.iter().map(Block::handle).collect(),
            conv_norm_out: self.conv_norm_out.handle(),
            conv_out: self.conv_out.handle(),
            config: self.config.clone(),
        }
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            encoder: self.encoder.map_weights(f)?,
            up: self.up.iter().map(|block| block.map_weights(f)).collect::<Result<_>>()?,
            conv_norm_out: self.conv_norm_out.handle(),
            conv_out: self.conv_out.map_weights(f)?,
            config: self.config.clone(),
        })
    }

    /// Keys and values of a text `[B, T, D]` for each attention that sees it, in the order of [`Self::forward`].
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn prepare(&self, text: &Tensor, pass: &Pass<'_>) -> Result<Vec<Tensor>> {
        let mut prepared = Vec::new();
        for block in self.encoder.blocks().chain(&self.up) {
            block.prepare(text, pass, &mut prepared)?;
        }
        Ok(prepared)
    }

    /// `[B, C, H, W] → [B, O, H, W]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, mut known: Known<'_, '_>) -> Result<Tensor> {
        let (mut x, mut skips) = self.encoder.encode(x, &mut known)?;
        for block in &self.up {
            x = block.forward(x, &mut known, &mut skips)?;
        }
        self.conv_out.forward(&self.conv_norm_out.activated(&x, self.config.out_act)?, known.pass)
    }
}
