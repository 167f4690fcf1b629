//! # controlgen-peft
//!
//! Adapters: small sets of parameters that change what a frozen model computes, without touching its weights.
//!
//! | adapter | acts at | its file |
//! |---|---|---|
//! | [`Lora`] (Hu et al. 2021) | linear sites, slices of fused ones | PEFT's `LORA` |
//! | [`Ia3`] (Liu et al. 2022) | outputs or inputs of linear sites | PEFT's `IA3` |
//! | [`Prefix`] (Li & Liang 2021) | attention sites | PEFT's `PREFIX_TUNING` |
//! | [`Bottleneck`] (Houlsby et al. 2019) | branches of the residual stream | a format of our own |
//!
//! Each is a [`Control`](controlgen_core::Control), so that several stack, and an
//! [`Adapter`](controlgen_core::Adapter), so that it is saved and loaded. [`open`] reads a directory of any kind.
//! [`ActiveAdapters`] says row by row which of a stack's adapters act; [`Merged`] is a model with adapters in its weights.

mod active;
mod bottleneck;
mod directory;
mod fields;
mod ia3;
mod initial;
mod lora;
mod lora_config;
mod merged;
mod prefix;
mod targets;

pub use active::ActiveAdapters;
pub use bottleneck::{Bottleneck, BottleneckConfig};
pub use directory::open;
pub use ia3::{Ia3, Ia3Config};
pub use lora::Lora;
pub use lora_config::LoraConfig;
pub use merged::Merged;
pub use prefix::{Prefix, PrefixConfig};
pub use targets::Targets;
