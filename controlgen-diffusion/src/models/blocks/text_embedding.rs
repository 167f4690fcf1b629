//! One embedding of a text's states, beside the time's (Saharia et al. 2022, Imagen: attention pooling).

use controlgen_core::layers::{LayerNorm, Linear};
use controlgen_core::{Attn, Dims, Mask, Pass, Result, SiteId, WeightMap};
use tch::{Kind, Tensor};

use super::{Scope, heads};

/// norm₂(W pool(norm₁(h))): the pool is what the mean of the states, with a position of its own, sees in itself and the
/// states.
pub struct TextTimeEmbedding {
    heads: i64,
    norm1: LayerNorm,
    /// `[1, D]`
    positional_embedding: Tensor,
    q: Linear,
    kv: Linear,
    pool: SiteId,
    proj: Linear,
    norm2: LayerNorm,
}

impl TextTimeEmbedding {
    /// Loads it from states of width `inputs` to `width`.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(mut scope: Scope<'_, '_>, (inputs, width): (i64, i64), heads: i64) -> Result<Self> {
        let head_dim = inputs.div_euclid(heads);
        let dims = Dims::Attention { heads, kv_heads: heads, head_dim, cross: false };
        Ok(Self {
            heads,
            norm1: scope.layer_norm("norm1", inputs)?,
            positional_embedding: scope.weights().get("pool.positional_embedding", &[1, inputs])?,
            q: scope.linear("pool.q_proj", (inputs, inputs), true)?,
            kv: scope.fused(&["pool.k_proj", "pool.v_proj"], (inputs, inputs), true)?,
            pool: scope.site("pool", dims),
            proj: scope.linear("proj", (inputs, width), true)?,
            norm2: scope.layer_norm("norm2", width)?,
        })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            norm1: self.norm1.handle(),
            positional_embedding: self.positional_embedding.shallow_clone(),
            q: self.q.handle(),
            kv: self.kv.handle(),
            proj: self.proj.handle(),
            norm2: self.norm2.handle(),
            ..*self
        }
    }

    /// `[B, T, inputs] → [B, width]`
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, states: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let x = self.norm1.forward(states)?;
        let mean = x.f_mean_dim(&[1i64][..], true, None::<Kind>)?.f_add(&self.positional_embedding)?; // (B, 1, D)
        let (q, kv) =
            (self.q.forward(&mean, pass)?, self.kv.forward(&Tensor::f_cat(&[&mean, &x], 1)?, pass)?);
        let part = |n| heads(&kv, (n, 2), self.heads); // (B, heads, 1 + T, hd)
        let q = heads(&q, (0, 1), self.heads)?;
        let attn = Attn { q, k: part(0)?, v: part(1)?, mask: Mask::Full, scale: None };
        let pooled = pass.attention(self.pool, attn)?.f_flatten(1, -1)?; // (B, D)
        self.norm2.forward(&self.proj.forward(&pooled, pass)?)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            q: self.q.map_weights(f)?,
            kv: self.kv.map_weights(f)?,
            proj: self.proj.map_weights(f)?,
            ..self.handle()
        })
    }
}
