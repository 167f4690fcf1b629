//! An image's places, pooled by attention (Radford et al. 2021, CLIP, section 2.4; Dhariwal & Nichol 2021).

use controlgen_core::layers::Linear;
use controlgen_core::{Attn, Dims, Error, Mask, Pass, Result, SiteId, WeightMap};
use tch::{Kind, Tensor};

use super::{Scope, heads, to_tokens};

/// W a + b, where a is what the mean of all places sees in itself and in them, each with a position.
pub struct AttentionPool {
    heads: i64,
    /// `[1 + H W, C]`
    positional_embedding: Tensor,
    qkv: Linear,
    attention: SiteId,
    c_proj: Linear,
}

impl AttentionPool {
    /// Loads it for images of `places`, from `channels` to `outputs`.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(
        mut scope: Scope<'_, '_>,
        places: i64,
        (channels, outputs): (i64, i64),
        heads: i64,
    ) -> Result<Self> {
        let head_dim = channels.div_euclid(heads);
        let dims = Dims::Attention { heads, kv_heads: heads, head_dim, cross: false };
        let positions = scope.weights().get("positional_embedding", &[channels, places + 1])?;
        Ok(Self {
            heads,
            positional_embedding: positions.f_transpose(0, 1)?.f_contiguous()?,
            qkv: scope.linear("qkv_proj", (channels, 3 * channels), true)?,
            attention: scope.site("", dims),
            c_proj: scope.linear("c_proj", (channels, outputs), true)?,
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            positional_embedding: self.positional_embedding.shallow_clone(),
            qkv: self.qkv.handle(),
            c_proj: self.c_proj.handle(),
            ..*self
        }
    }

    /// `[B, C, H, W] → [B, outputs]`
    ///
    /// # Errors
    /// [`Error::Shape`] for images of another size; the controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let tokens = to_tokens(x)?; // (B, H W, C)
        let (places, _) = self.positional_embedding.size2()?;
        if tokens.size()[1] + 1 != places {
            let expected = format!("[B, {}, C]", places - 1);
            return Err(Error::shape("places of an image to be pooled", expected, &tokens.size()));
        }
        let mean = tokens.f_mean_dim(&[1i64][..], true, None::<Kind>)?;
        let tokens = Tensor::f_cat(&[&mean, &tokens], 1)?.f_add(&self.positional_embedding)?;
        let qkv = self.qkv.forward(&tokens, pass)?; // (B, 1 + H W, 3 C)
        let part = |n| heads(&qkv, (n, 3), self.heads); // (B, heads, 1 + H W, hd)
        let q = part(0)?.f_narrow(2, 0, 1)?;
        let attn = Attn { q, k: part(1)?, v: part(2)?, mask: Mask::Full, scale: None };
        let pooled = pass.attention(self.attention, attn)?.f_flatten(1, -1)?; // (B, C)
        self.c_proj.forward(&pooled, pass)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { qkv: self.qkv.map_weights(f)?, c_proj: self.c_proj.map_weights(f)?, ..self.handle() })
    }
}
