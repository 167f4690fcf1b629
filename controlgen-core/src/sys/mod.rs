//! The only place where `unsafe` is written: memory maps, LibTorch tensors over borrowed bytes, libraries and functions
//! looked up at run time, LibTorch's gradient mode, kernels.
#![allow(unsafe_code)]

mod blob;
mod cuda;
mod few_rows;
mod grad;
mod heap;
mod low_rank;
mod mmap;
#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
mod team;
mod updates;

pub(crate) use blob::copy_from_bytes;
#[cfg(feature = "gguf")]
pub(crate) use blob::copy_from_floats;
pub(crate) use cuda::open_cuda;
pub(crate) use few_rows::few_rows;
pub(crate) use grad::is_recording;
pub(crate) use heap::give_back;
pub use low_rank::LowRank;
pub(crate) use low_rank::low_rank;
pub(crate) use mmap::Map;
pub(crate) use updates::{AdamWUpdate, SgdUpdate, adamw, sgd};
