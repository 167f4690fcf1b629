//! Residual blocks of convolutions, told the time (Ho et al. 2020; Dhariwal & Nichol 2021).

use controlgen_core::layers::{Activation, Conv2d, GroupNorm, Linear};
use controlgen_core::{Error, Pass, Result, SiteId, WeightMap};
use tch::Tensor;

use super::{Scope, add, average, divide, in_place, nearest};

/// How a block is told the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeNorm {
    /// Its projection is added before the second norm.
    Default,
    /// Scale and shift after the second norm: y (1 + s) + b (Dhariwal & Nichol 2021, AdaGN).
    ScaleShift,
}

/// Whether a block changes the size, before its first convolution and of what it skips alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// It does not.
    Keep,
    /// Means over 2 × 2 places.
    Down,
    /// Every place 2 × 2 times.
    Up,
}

/// The dimensions of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ResnetConfig {
    /// Channels in.
    pub inputs: i64,
    /// Channels out.
    pub outputs: i64,
    /// Width of the time's embedding; none for a block that knows no time.
    pub time: Option<i64>,
    /// How it is told the time.
    pub time_norm: TimeNorm,
    /// Whether the embedding goes without an activation before its projection.
    pub skip_time_act: bool,
    /// Groups of the norms.
    pub groups: i64,
    /// ε of the norms.
    pub eps: f64,
    /// After each norm, and on the time's embedding.
    pub act: Activation,
    /// What the sum is divided by.
    pub scale: f64,
    /// Whether it changes the size.
    pub resize: Resize,
}

/// The time's embedding as blocks take it.
pub struct TimeEmbedding {
    /// `[B, D]`
    plain: Tensor,
    /// a(e), `[B, D]`: computed once for all blocks.
    activated: Tensor,
}

impl TimeEmbedding {
    /// Of an embedding `[B, D]`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn new(plain: Tensor, act: Activation) -> Result<Self> {
        Ok(Self { activated: act.forward(&plain)?, plain })
    }
}

/// x + conv₂(a(norm₂(conv₁(a(norm₁(x))), time))), where x goes through a 1 × 1 convolution if the channels differ.
pub struct ResnetBlock2d {
    config: ResnetConfig,
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    branch: SiteId,
}

impl ResnetBlock2d {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of the checkpoint; [`Error::Value`] where the groups do not divide the channels.
    pub fn load(mut scope: Scope<'_, '_>, c: ResnetConfig) -> Result<Self> {
        let (inputs, outputs) = (c.inputs, c.outputs);
        let told = if c.time_norm == TimeNorm::ScaleShift { 2 * outputs } else { outputs };
        Ok(Self {
            norm1: scope.group_norm("norm1", (c.groups, inputs), c.eps)?,
            conv1: scope.conv("conv1", (inputs, outputs), 3, (1, 1))?,
            time_emb_proj: match c.time {
                Some(width) => Some(scope.linear("time_emb_proj", (width, told), true)?),
                None => None,
            },
            norm2: scope.group_norm("norm2", (c.groups, outputs), c.eps)?,
            conv2: scope.conv("conv2", (outputs, outputs), 3, (1, 1))?,
            conv_shortcut: match inputs == outputs {
                true => None,
                false => Some(scope.conv("conv_shortcut", (inputs, outputs), 1, (1, 0))?),
            },
            branch: scope.branch("", outputs),
            config: c,
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            norm1: self.norm1.handle(),
            conv1: self.conv1.handle(),
            time_emb_proj: self.time_emb_proj.as_ref().map(Linear::handle),
            norm2: self.norm2.handle(),
            conv2: self.conv2.handle(),
            conv_shortcut: self.conv_shortcut.as_ref().map(Conv2d::handle),
            ..*self
        }
    }

    /// `[B, I, H, W] → [B, O, H', W']`
    ///
    /// # Errors
    /// [`Error::Value`] where it is to be told the time, and is not; the controls' and LibTorch's.
    pub fn forward(&self, x: Tensor, time: Option<&TimeEmbedding>, pass: &Pass<'_>) -> Result<Tensor> {
        let c = &self.config;
        let mut h = self.norm1.activated(&x, c.act)?;
        let mut x = x;
        let resize = match c.resize {
            Resize::Keep => None,
            Resize::Down => Some(average as fn(&Tensor) -> Result<Tensor>),
            Resize::Up => Some(nearest as fn(&Tensor) -> Result<Tensor>),
        };
        if let Some(resize) = resize {
            (h, x) = (resize(&h)?, resize(&x)?);
        }
        h = self.conv1.forward(&h, pass)?; // (B, O, H', W')
        h = match &self.time_emb_proj {
            None => self.norm2.activated(&h, c.act)?,
            Some(proj) => {
                let time = time.ok_or_else(|| Error::value("time of a residual block", "given", "none"))?;
                let time = if c.skip_time_act { &time.plain } else { &time.activated };
                let told = proj.forward(time, pass)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?; // (B, O or 2 O, 1, 1)
                self.tell(h, &told, pass)?
            }
        };
        h = self.conv2.forward(&h, pass)?;
        if let Some(shortcut) = &self.conv_shortcut {
            x = shortcut.forward(&x, pass)?;
        }
        let h = pass.hidden(self.branch, h, &x)?;
        divide(add(h, &x, pass)?, c.scale, pass)
    }

    /// The second norm and activation, told the time.
    fn tell(&self, h: Tensor, told: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (act, outputs) = (self.config.act, self.config.outputs);
        match self.config.time_norm {
            TimeNorm::Default => self.norm2.activated(&add(h, told, pass)?, act),
            TimeNorm::ScaleShift => {
                let mut h = self.norm2.forward(&h)?;
                let (scale, shift) =
                    (told.f_narrow(1, 0, outputs)?.f_add_scalar(1.0)?, told.f_narrow(1, outputs, outputs)?);
                // The norm's output is nobody else's, whatever the controls.
                act.consume(match in_place(&Pass::default()) {
                    true => h.f_mul_(&scale)?.f_add_(&shift)?,
                    false => h.f_mul(&scale)?.f_add(&shift)?,
                })
            }
        }
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            conv1: self.conv1.map_weights(f)?,
            time_emb_proj: self.time_emb_proj.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            conv2: self.conv2.map_weights(f)?,
            conv_shortcut: self.conv_shortcut.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            ..self.handle()
        })
    }
}
