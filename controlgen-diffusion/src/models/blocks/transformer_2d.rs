//! Transformer blocks over the places of an image that also see a text (Rombach et al. 2022).

use controlgen_core::layers::{Activation, Conv2d, GroupNorm, LayerNorm, Linear};
use controlgen_core::{Attn, Dims, Mask, Pass, Result, SiteId, WeightMap};
use tch::Tensor;

use super::{Scope, Text, add, from_tokens, heads, in_place, to_tokens};

/// The dimensions of the blocks at one place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transformer2dConfig {
    /// C
    pub channels: i64,
    /// How many heads: they divide the channels.
    pub heads: i64,
    /// How many blocks.
    pub layers: i64,
    /// Width of the text's states.
    pub text: i64,
    /// Groups of the norm before all blocks.
    pub groups: i64,
    /// Whether the projections around the blocks are linear layers instead of 1 × 1 convolutions.
    pub linear_projection: bool,
    /// Whether the first attention of a block sees the text too, and not the image.
    pub only_cross_attention: bool,
}

/// An attention of the image over itself, or over the text.
struct Attention {
    heads: i64,
    seen: Seen,
    site: SiteId,
    to_out: Linear,
    branch: SiteId,
}

/// What an attention sees.
enum Seen {
    /// The image: queries, keys and values in one product.
    Image { qkv: Linear },
    /// The text: its keys and values are computed when it is prepared.
    Text { q: Linear, kv: Linear },
}

impl Attention {
    fn load(mut scope: Scope<'_, '_>, c: &Transformer2dConfig, cross: bool) -> Result<Self> {
        let (d, h) = (c.channels, c.heads);
        let seen = if cross {
            let q = scope.linear("to_q", (d, d), false)?;
            Seen::Text { q, kv: scope.fused(&["to_k", "to_v"], (c.text, d), false)? }
        } else {
            Seen::Image { qkv: scope.fused(&["to_q", "to_k", "to_v"], (d, d), false)? }
        };
        let dims = Dims::Attention { heads: h, kv_heads: h, head_dim: d.div_euclid(h), cross };
        let site = scope.site("", dims);
        let to_out = scope.linear("to_out.0", (d, d), true)?;
        Ok(Self { heads: h, seen, site, to_out, branch: scope.branch("", d) })
    }

    fn handle(&self) -> Self {
        let seen = match &self.seen {
            Seen::Image { qkv } => Seen::Image { qkv: qkv.handle() },
            Seen::Text { q, kv } => Seen::Text { q: q.handle(), kv: kv.handle() },
        };
        Self { seen, to_out: self.to_out.handle(), ..*self }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let seen = match &self.seen {
            Seen::Image { qkv } => Seen::Image { qkv: qkv.map_weights(f)? },
            Seen::Text { q, kv } => Seen::Text { q: q.map_weights(f)?, kv: kv.map_weights(f)? },
        };
        Ok(Self { seen, to_out: self.to_out.map_weights(f)?, ..*self })
    }

    fn prepare(&self, text: &Tensor, pass: &Pass<'_>, into: &mut Vec<Tensor>) -> Result<()> {
        if let Seen::Text { kv, .. } = &self.seen {
            into.push(kv.forward(text, pass)?); // (B, T, 2 C)
        }
        Ok(())
    }

    /// x + attention(y), y `[B, H W, C]` being x after the norm.
    fn forward(&self, x: &Tensor, y: &Tensor, text: &mut Text<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let attn = match &self.seen {
            Seen::Image { qkv } => {
                let qkv = qkv.forward(y, pass)?; // (B, H W, 3 C)
                let part = |n| heads(&qkv, (n, 3), self.heads); // (B, heads, H W, hd)
                Attn { q: part(0)?, k: part(1)?, v: part(2)?, mask: Mask::Full, scale: None }
            }
            Seen::Text { q, .. } => {
                let (q, kv) = (q.forward(y, pass)?, text.next()?);
                let q = heads(&q, (0, 1), self.heads)?; // (B, heads, H W, hd)
                let part = |n| heads(kv, (n, 2), self.heads); // (B, heads, T, hd)
                Attn { q, k: part(0)?, v: part(1)?, mask: text.mask(0)?, scale: None }
            }
        };
        let y = pass.attention(self.site, attn)?.f_transpose(1, 2)?.f_reshape(x.size())?;
        let y = pass.hidden(self.branch, self.to_out.forward(&y, pass)?, x)?;
        add(y, x, pass)
    }
}

/// Attention over the image, attention over the text, and a feed-forward part with GEGLU (Shazeer 2020).
struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    /// Values and gates in one product that is one site, `[8 C, C]`.
    proj: Linear,
    out: Linear,
    ff: SiteId,
}

impl BasicTransformerBlock {
    fn load(mut scope: Scope<'_, '_>, c: &Transformer2dConfig) -> Result<Self> {
        let d = c.channels;
        Ok(Self {
            norm1: scope.layer_norm("norm1", d)?,
            attn1: Attention::load(scope.below("attn1"), c, c.only_cross_attention)?,
            norm2: scope.layer_norm("norm2", d)?,
            attn2: Attention::load(scope.below("attn2"), c, true)?,
            norm3: scope.layer_norm("norm3", d)?,
            proj: scope.linear("ff.net.0.proj", (d, 8 * d), true)?,
            out: scope.linear("ff.net.2", (4 * d, d), true)?,
            ff: scope.branch("ff", d),
        })
    }

    fn handle(&self) -> Self {
        Self {
            norm1: self.norm1.handle(),
            attn1: self.attn1.handle(),
            norm2: self.norm2.handle(),
            attn2: self.attn2.handle(),
            norm3: self.norm3.handle(),
            proj: self.proj.handle(),
            out: self.out.handle(),
            ff: self.ff,
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            attn1: self.attn1.map_weights(f)?,
            attn2: self.attn2.map_weights(f)?,
            proj: self.proj.map_weights(f)?,
            out: self.out.map_weights(f)?,
            ..self.handle()
        })
    }

    fn forward(&self, x: &Tensor, text: &mut Text<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let x = self.attn1.forward(x, &self.norm1.forward(x)?, text, pass)?;
        let x = self.attn2.forward(&x, &self.norm2.forward(&x)?, text, pass)?; // (B, H W, C)
        let y = self.proj.forward(&self.norm3.forward(&x)?, pass)?; // (B, H W, 8 C)
        let half = 4 * x.size3()?.2;
        let (mut y, mut gate) = (y.f_narrow(-1, 0, half)?, y.f_narrow(-1, half, half)?);
        let y = match in_place(pass) {
            true => y.f_mul_(&gate.f_gelu_("none")?)?,
            false => y.f_mul(&Activation::Gelu.forward(&gate)?)?,
        };
        let y = pass.hidden(self.ff, self.out.forward(&y, pass)?, &x)?;
        add(y, &x, pass)
    }
}

/// Norm, projection, blocks, projection, added to what came in.
pub struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<BasicTransformerBlock>,
    proj_out: Projection,
    branch: SiteId,
}

/// 1 × 1, over the image or over its tokens.
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn load(scope: &mut Scope<'_, '_>, name: &str, c: &Transformer2dConfig) -> Result<Self> {
        let d = (c.channels, c.channels);
        Ok(match c.linear_projection {
            true => Self::Linear(scope.linear(name, d, true)?),
            false => Self::Conv(scope.conv(name, d, 1, (1, 0))?),
        })
    }

    fn handle(&self) -> Self {
        match self {
            Self::Conv(layer) => Self::Conv(layer.handle()),
            Self::Linear(layer) => Self::Linear(layer.handle()),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(match self {
            Self::Conv(layer) => Self::Conv(layer.map_weights(f)?),
            Self::Linear(layer) => Self::Linear(layer.map_weights(f)?),
        })
    }

    /// `[B, C, H, W] → [B, C, H, W]`
    fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match self {
            Self::Conv(layer) => layer.forward(x, pass),
            Self::Linear(layer) => {
                let (_, _, h, w) = x.size4()?;
                from_tokens(&layer.forward(&to_tokens(x)?, pass)?, (h, w))
            }
        }
    }
}

impl Transformer2d {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of the checkpoint; [`Error::Value`](controlgen_core::Error::Value) where the groups do not divide the
    /// channels.
    pub fn load(mut scope: Scope<'_, '_>, c: Transformer2dConfig) -> Result<Self> {
        let norm = scope.group_norm("norm", (c.groups, c.channels), 1e-6)?;
        let proj_in = Projection::load(&mut scope, "proj_in", &c)?;
        let block = |i| BasicTransformerBlock::load(scope.below(format!("transformer_blocks.{i}")), &c);
        let blocks = (0..c.layers).map(block).collect::<Result<_>>()?;
        let proj_out = Projection::load(&mut scope, "proj_out", &c)?;
        Ok(Self { norm, proj_in, blocks, proj_out, branch: scope.branch("", c.channels) })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            norm: self.norm.handle(),
            proj_in: self.proj_in.handle(),
            blocks: self.blocks.iter().map(BasicTransformerBlock::handle).collect(),
            proj_out: self.proj_out.handle(),
            branch: self.branch,
        }
    }

    /// Keys and values of the text `[B, T, D]`, for each attention that sees it.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn prepare(&self, text: &Tensor, pass: &Pass<'_>, into: &mut Vec<Tensor>) -> Result<()> {
        for block in &self.blocks {
            block.attn1.prepare(text, pass, into)?;
            block.attn2.prepare(text, pass, into)?;
        }
        Ok(())
    }

    /// `[B, C, H, W] → [B, C, H, W]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, text: &mut Text<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        let mut y = to_tokens(&self.proj_in.forward(&self.norm.forward(x)?, pass)?)?; // (B, H W, C)
        for block in &self.blocks {
            y = block.forward(&y, text, pass)?;
        }
        let y = self.proj_out.forward(&from_tokens(&y, (h, w))?, pass)?;
        let y = pass.hidden(self.branch, y, x)?;
        add(y, x, pass)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            proj_in: self.proj_in.map_weights(f)?,
            blocks: self.blocks.iter().map(|block| block.map_weights(f)).collect::<Result<_>>()?,
            proj_out: self.proj_out.map_weights(f)?,
            ..self.handle()
        })
    }
}
