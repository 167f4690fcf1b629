//! The only place where `unsafe` is written: memory maps, LibTorch tensors over borrowed bytes, libraries and functions
//! looked up at run time, LibTorch's gradient mode.
#![allow(unsafe_code)]

mod blob;
mod cuda;
mod grad;
mod mmap;
mod packed;

pub(crate) use blob::copy_from_bytes;
#[cfg(feature = "gguf")]
pub(crate) use blob::copy_from_floats;
pub(crate) use cuda::open_cuda;
pub(crate) use grad::is_recording;
pub(crate) use mmap::Map;
pub(crate) use packed::{pack, packed_linear};
