//! The only place where `unsafe` is written: memory maps, and LibTorch tensors over borrowed bytes.
#![allow(unsafe_code)]

mod blob;
mod mmap;

pub(crate) use blob::copy_from_bytes;
#[cfg(feature = "gguf")]
pub(crate) use blob::copy_from_floats;
pub(crate) use mmap::Map;
