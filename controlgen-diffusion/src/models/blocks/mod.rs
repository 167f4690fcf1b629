//! What the networks of images share, one block a file.
//!
//! Images are `[B, C, H, W]` and lie in memory channels last: LibTorch's convolutions are faster so on the CPU, and the
//! tokens `[B, H W, C]` of an image are a view of it. [`channels_last`] lays out what comes in; all that follows keeps it.

mod added_kv;
mod attention;
mod attention_pool;
mod embeddings;
mod resnet;
mod sampling;
mod scope;
mod text;
mod text_embedding;
mod transformer_2d;
mod unet;
mod unet_config;

pub use added_kv::{AddedKvAttention, AddedKvConfig, TextNorm};
pub use attention::{SelfAttention, SelfAttentionConfig, from_tokens, heads, to_tokens};
pub use attention_pool::AttentionPool;
pub use embeddings::{Sinusoid, TimestepEmbedding};
pub use resnet::{Resize, ResnetBlock2d, ResnetConfig, TimeEmbedding, TimeNorm};
pub use sampling::{Downsample2d, Upsample2d, average, nearest};
pub use scope::Scope;
pub use text::Text;
pub use text_embedding::TextTimeEmbedding;
pub use transformer_2d::{Transformer2d, Transformer2dConfig};
pub use unet::{Known, UNet, UNetEncoder};
pub use unet_config::{
    Attends, BlockConfig, Fields, LevelConfig, Resample, UNetConfig, one_of, unknown_block,
};

use controlgen_core::{Pass, Result, is_recording};
use tch::Tensor;

/// Whether what a layer has computed may be overwritten: no control can have kept it, and no graph is recorded.
pub fn in_place(pass: &Pass<'_>) -> bool {
    pass.controls.is_none() && !is_recording()
}

/// a + b, in the place of a layer's output `a` where that may be overwritten.
///
/// # Errors
/// Those of LibTorch.
pub fn add(mut a: Tensor, b: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
    Ok(if in_place(pass) { a.f_add_(b)? } else { a.f_add(b)? })
}

/// a / s, in the place of a layer's output `a` where that may be overwritten.
///
/// # Errors
/// Those of LibTorch.
pub fn divide(mut a: Tensor, s: f64, pass: &Pass<'_>) -> Result<Tensor> {
    Ok(match (s == 1.0, in_place(pass)) {
        (true, _) => a,
        (false, true) => a.f_div_scalar_(s)?,
        (false, false) => a.f_div_scalar(s)?,
    })
}

/// The same numbers `[B, C, H, W]`, channels last in memory.
///
/// # Errors
/// Those of LibTorch.
pub fn channels_last(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?)
}
