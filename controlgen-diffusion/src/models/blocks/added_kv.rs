//! Attention over the image and a text at once, as keys and values side by side (Nichol et al. 2021, GLIDE;
//! Saharia et al. 2022, Imagen).

use controlgen_core::layers::{GroupNorm, LayerNorm, Linear};
use controlgen_core::{Attn, Dims, Pass, Result, SiteId, WeightMap};
use tch::Tensor;

use super::{Scope, Text, add, from_tokens, heads, to_tokens};

/// A norm of the text's states before their projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextNorm {
    /// None.
    None,
    /// Each state by itself.
    Layer,
    /// Groups of channels over all states, 32 groups.
    Group,
}

/// The dimensions of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AddedKvConfig {
    /// C
    pub channels: i64,
    /// How many heads: they divide the channels.
    pub heads: i64,
    /// Width of the text's states.
    pub text: i64,
    /// Groups of the norm before it.
    pub groups: i64,
    /// Whether the image's own keys and values are left out.
    pub only_cross_attention: bool,
    /// Before the text's projection.
    pub text_norm: TextNorm,
}

enum Norm {
    None,
    Layer(LayerNorm),
    Group(GroupNorm),
}

/// x + attention(norm(x)), whose keys and values are those of the text and those of the image.
pub struct AddedKvAttention {
    heads: i64,
    group_norm: GroupNorm,
    /// Queries, keys and values in one product; queries alone where the image does not see itself.
    qkv: Linear,
    own: bool,
    norm_cross: Norm,
    added: Linear,
    attention: SiteId,
    to_out: Linear,
    branch: SiteId,
}

impl AddedKvAttention {
    /// Loads what is below `scope`.
    ///
    /// # Errors
    /// Those of the checkpoint; [`Error::Value`](controlgen_core::Error::Value) where the groups do not divide the
    /// channels.
    pub fn load(mut scope: Scope<'_, '_>, c: AddedKvConfig) -> Result<Self> {
        let (width, h, own) = (c.channels, c.heads, !c.only_cross_attention);
        // diffusers' layer norm is as wide as the image's channels, so the text must be too.
        let norm_cross = match c.text_norm {
            TextNorm::None => Norm::None,
            TextNorm::Layer => Norm::Layer(scope.layer_norm("norm_cross", c.channels)?),
            TextNorm::Group => Norm::Group(scope.group_norm("norm_cross", (32, c.text), 1e-5)?),
        };
        let parts: &[&str] = if own { &["to_q", "to_k", "to_v"] } else { &["to_q"] };
        let dims = Dims::Attention { heads: h, kv_heads: h, head_dim: width.div_euclid(h), cross: !own };
        Ok(Self {
            heads: h,
            group_norm: scope.group_norm("group_norm", (c.groups, width), 1e-5)?,
            qkv: scope.fused(parts, (width, width), true)?,
            own,
            norm_cross,
            added: scope.fused(&["add_k_proj", "add_v_proj"], (c.text, width), true)?,
            attention: scope.site("", dims),
            to_out: scope.linear("to_out.0", (width, width), true)?,
            branch: scope.branch("", width),
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            group_norm: self.group_norm.handle(),
            qkv: self.qkv.handle(),
            norm_cross: match &self.norm_cross {
                Norm::None => Norm::None,
                Norm::Layer(norm) => Norm::Layer(norm.handle()),
                Norm::Group(norm) => Norm::Group(norm.handle()),
            },
            added: self.added.handle(),
            to_out: self.to_out.handle(),
            ..*self
        }
    }

    /// Keys and values of the text `[B, T, D]`.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn prepare(&self, text: &Tensor, pass: &Pass<'_>, into: &mut Vec<Tensor>) -> Result<()> {
        let text = match &self.norm_cross {
            Norm::None => text.shallow_clone(),
            Norm::Layer(norm) => norm.forward(text)?,
            Norm::Group(norm) => norm.forward(&text.f_transpose(1, 2)?)?.f_transpose(1, 2)?,
        };
        into.push(self.added.forward(&text.f_contiguous()?, pass)?); // (B, T, 2 C)
        Ok(())
    }

    /// `[B, C, H, W] → [B, C, H, W]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, text: &mut Text<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let (b, c, h, w) = x.size4()?;
        let qkv = self.qkv.forward(&to_tokens(&self.group_norm.forward(x)?)?, pass)?;
        let parts = if self.own { 3 } else { 1 };
        let part = |n| heads(&qkv, (n, parts), self.heads); // (B, heads, H W, hd)
        let added = text.next()?;
        let of_text = |n| heads(added, (n, 2), self.heads); // (B, heads, T, hd)
        let (k, v, places) = match self.own {
            true => {
                let both = |n| -> Result<Tensor> { Ok(Tensor::f_cat(&[of_text(n)?, part(n + 1)?], 2)?) };
                (both(0)?, both(1)?, h * w) // (B, heads, T + H W, hd)
            }
            false => (of_text(0)?, of_text(1)?, 0),
        };
        let attn = Attn { q: part(0)?, k, v, mask: text.mask(places)?, scale: None };
        let y = pass.attention(self.attention, attn)?;
        let y = y.f_transpose(1, 2)?.f_reshape([b, h * w, c])?;
        let y = from_tokens(&self.to_out.forward(&y, pass)?, (h, w))?;
        let y = pass.hidden(self.branch, y, x)?;
        add(y, x, pass)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            qkv: self.qkv.map_weights(f)?,
            added: self.added.map_weights(f)?,
            to_out: self.to_out.map_weights(f)?,
            ..self.handle()
        })
    }
}
