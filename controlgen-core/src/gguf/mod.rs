//! GGUF files, the format of llama.cpp: metadata and tensors in one file, often quantised.
//!
//! Versions 2 and 3, little-endian. The format is described in ggml's `docs/gguf.md`.
//!
//! The header is read in place: what is kept of it is one offset for each key and each tensor, so that no
//! length in a damaged file can make the reader allocate.

mod cursor;
mod dequantise;
mod encoding;
mod header;
mod metadata;
mod value;

use std::path::Path;

use tch::Tensor;

pub use metadata::{FromValue, Metadata};
pub use value::{Array, Value, ValueKind};

use crate::checkpoint::{TensorInfo, TensorSource, fill};
use crate::sys::Map;
use crate::{Error, Result};
use encoding::Encoding;
use header::{Header, TensorEntry};

/// An open GGUF file.
///
/// Its tensors are read as a [`TensorSource`]: quantised ones are de-quantised to f32 and then converted to
/// the element type of the tensor they are read into. Shapes are LibTorch's, slowest dimension first (the
/// file has them the other way round): a linear layer's weight is `[out, in]`.
pub struct Gguf {
    map: Map,
    header: Header,
}

impl Gguf {
    /// Opens a file and checks its header: every key, value, name, shape and offset.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Format`] if it is damaged or no GGUF file;
    /// [`Error::Unsupported`] for version 1, big-endian files, one of several parts of a model, and encodings
    /// that are not among F32, F16, BF16, F64, I8 to I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q8_K.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let map = Map::open(path.as_ref())?;
        let header = header::read(&map)?;
        Ok(Self { map, header })
    }

    /// The metadata.
    pub fn metadata(&self) -> Metadata<'_> {
        Metadata { path: self.map.path(), bytes: self.map.bytes(), keys: &self.header.keys }
    }

    /// The file's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// The entry of a tensor, if the file has it.
    fn entry(&self, name: &str) -> Option<TensorEntry<'_>> {
        let bytes = self.map.bytes();
        let compare =
            |&at: &usize| header::tensor_at(bytes, at).map_or("", |(entry, _)| entry.name).cmp(name);
        let found = self.header.tensors.binary_search_by(compare).ok()?;
        header::tensor_at(bytes, *self.header.tensors.get(found)?).ok().map(|(entry, _)| entry)
    }
}

impl TensorSource for Gguf {
    fn what(&self) -> String {
        self.map.path().display().to_string()
    }

    fn finished(&self) {
        crate::sys::give_back();
    }

    fn names(&self) -> Vec<String> {
        let bytes = self.map.bytes();
        self.header
            .tensors
            .iter()
            .filter_map(|&at| header::tensor_at(bytes, at).ok().map(|(entry, _)| entry.name.to_owned()))
            .collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let entry = self.entry(name)?;
        Some(TensorInfo { shape: entry.shape(), kind: entry.encoding.kind() })
    }

    fn read(&self, name: &str, into: &mut Tensor) -> Result<()> {
        let absent = || Error::format(self.map.path(), format!("no tensor `{name}`"));
        let entry = self.entry(name).ok_or_else(absent)?;
        let shape = entry.shape();
        let info = TensorInfo { shape, kind: entry.encoding.kind() };
        fill::check_target(&self.what(), name, &info, into)?;
        // Checked when the file was opened; checked again in case it has changed since.
        let range = entry
            .range(self.header.data_at, self.map.bytes().len())
            .map_err(|fault| header::damaged(&self.map, &fault))?;
        match entry.encoding {
            Encoding::Plain(kind) => fill::plain(&self.map, range, kind, into),
            Encoding::Quantised(kind) => dequantise::read(&self.map, range, kind, into),
        }
    }
}
