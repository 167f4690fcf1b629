//! Self-attention over the places of an image (Ho et al. 2020).

use controlgen_core::layers::{GroupNorm, Linear};
use controlgen_core::{Attn, Dims, Mask, Pass, Result, SiteId, WeightMap};
use tch::Tensor;

use super::{Scope, add, divide};

/// `[B, C, H, W] → [B, H W, C]`: a view where the channels come last in memory.
///
/// # Errors
/// Those of LibTorch.
pub fn to_tokens(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.size4()?;
    Ok(x.f_permute([0, 2, 3, 1])?.f_reshape([b, h * w, c])?)
}

/// `[B, H W, C] → [B, C, H, W]`, channels last in memory.
///
/// # Errors
/// Those of LibTorch.
pub fn from_tokens(y: &Tensor, (h, w): (i64, i64)) -> Result<Tensor> {
    let (b, _, c) = y.size3()?;
    Ok(y.f_reshape([b, h, w, c])?.f_permute([0, 3, 1, 2])?)
}

/// Part `n` of `parts` projections side by side, `[B, T, parts · C] → [B, heads, T, C / heads]`.
///
/// # Errors
/// Those of LibTorch.
pub fn heads(y: &Tensor, (n, parts): (i64, i64), heads: i64) -> Result<Tensor> {
    let (b, t, width) = y.size3()?;
    let split = y.f_view([b, t, parts, heads, width.div_euclid(parts * heads)])?;
    Ok(split.f_select(2, n)?.f_transpose(1, 2)?)
}

/// The dimensions of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelfAttentionConfig {
    /// C
    pub channels: i64,
    /// How many heads: they divide the channels.
    pub heads: i64,
    /// Groups of the norm before it, if there is one.
    pub groups: Option<i64>,
    /// ε of the norm.
    pub eps: f64,
    /// What the sum is divided by.
    pub scale: f64,
}

/// x + attention(norm(x)), every place seeing all others. Old checkpoints call its projections `query`, `key`, `value`
/// and `proj_attn`.
pub struct SelfAttention {
    config: SelfAttentionConfig,
    group_norm: Option<GroupNorm>,
    /// Queries, keys and values in one product.
    qkv: Linear,
    attention: SiteId,
    to_out: Linear,
    branch: SiteId,
}

impl SelfAttention {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of the checkpoint; [`Error::Value`](controlgen_core::Error::Value) where the groups do not divide the
    /// channels.
    pub fn load(mut scope: Scope<'_, '_>, c: SelfAttentionConfig) -> Result<Self> {
        let (width, h) = (c.channels, c.heads);
        let group_norm = match c.groups {
            Some(groups) => Some(scope.group_norm("group_norm", (groups, width), c.eps)?),
            None => None,
        };
        let dims = Dims::Attention { heads: h, kv_heads: h, head_dim: width.div_euclid(h), cross: false };
        Ok(Self {
            config: c,
            group_norm,
            qkv: scope.fused(&["to_q", "to_k", "to_v"], (width, width), true)?,
            attention: scope.site("", dims),
            to_out: scope.linear("to_out.0", (width, width), true)?,
            branch: scope.branch("", width),
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            group_norm: self.group_norm.as_ref().map(GroupNorm::handle),
            qkv: self.qkv.handle(),
            to_out: self.to_out.handle(),
            ..*self
        }
    }

    /// `[B, C, H, W] → [B, C, H, W]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (b, c, h, w) = x.size4()?;
        let y = match &self.group_norm {
            Some(norm) => norm.forward(x)?,
            None => x.shallow_clone(),
        };
        let qkv = self.qkv.forward(&to_tokens(&y)?, pass)?; // (B, H W, 3 C)
        let part = |n| heads(&qkv, (n, 3), self.config.heads); // (B, heads, H W, hd)
        let attn = Attn { q: part(0)?, k: part(1)?, v: part(2)?, mask: Mask::Full, scale: None };
        let y = pass.attention(self.attention, attn)?;
        let y = y.f_transpose(1, 2)?.f_reshape([b, h * w, c])?;
        let y = from_tokens(&self.to_out.forward(&y, pass)?, (h, w))?;
        let y = pass.hidden(self.branch, y, x)?;
        divide(add(y, x, pass)?, self.config.scale, pass)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { qkv: self.qkv.map_weights(f)?, to_out: self.to_out.map_weights(f)?, ..self.handle() })
    }
}
