//! Layers that know their sites: what models are built of.

mod activation;
mod conv;
mod embedding;
mod linear;
mod norm;
mod product;
mod rotary;

pub use activation::Activation;
pub use conv::Conv2d;
pub use embedding::Embedding;
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm, RmsNorm};
pub use product::{LowRank, add_low_rank};
pub use rotary::{Rotary, RotaryScaling, Rotations};
