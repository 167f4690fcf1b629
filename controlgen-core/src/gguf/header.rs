//! The header: where each key and each tensor is described, and that all of it is sound.

use std::ops::Range;

use super::cursor::{Cursor, Fault};
use super::encoding::{self, Encoding};
use super::metadata::{Metadata, key_at};
use super::value::{Value, ValueKind};
use crate::sys::Map;
use crate::{Error, Result};

const ALIGNMENT_KEY: &str = "general.alignment";
/// How many files a model was split into.
const PARTS_KEY: &str = "split.count";
const DEFAULT_ALIGNMENT: usize = 32;
/// ggml has tensors of up to four dimensions; a few more do no harm.
const MAX_RANK: u32 = 8;
/// The least bytes that a key with its value takes: the length of the key, the type, a value.
const MIN_KEY: usize = 8 + 4 + 1;
/// The least bytes that a tensor's description takes: the length of its name, rank, encoding, offset.
const MIN_TENSOR: usize = 8 + 4 + 4 + 8;

/// What is kept of a header.
pub(super) struct Header {
    pub(super) version: u32,
    /// Where each key begins, sorted by key.
    pub(super) keys: Vec<usize>,
    /// Where each tensor's description begins, sorted by name.
    pub(super) tensors: Vec<usize>,
    /// Where the data begin.
    pub(super) data_at: usize,
}

/// The description of a tensor.
#[derive(Clone, Copy)]
pub(super) struct TensorEntry<'a> {
    pub(super) name: &'a str,
    pub(super) encoding: Encoding,
    /// Little-endian u64 each, fastest dimension first.
    dims: &'a [u8],
    /// From the beginning of the data.
    offset: u64,
    at: usize,
}

/// The error of a damaged file.
pub(super) fn damaged(map: &Map, fault: &Fault) -> Error {
    Error::format(map.path(), format!("at byte {}: {}", fault.at, fault.problem))
}

/// Reads and checks the header.
pub(super) fn read(map: &Map) -> Result<Header> {
    let bytes = map.bytes();
    let damaged = |fault: Fault| damaged(map, &fault);
    let mut cursor = Cursor::new(bytes, 0);
    let magic: [u8; 4] = cursor.array("magic number").map_err(damaged)?;
    if &magic != b"GGUF" {
        return Err(damaged(Fault::new(0, format!("expected `GGUF`, found `{}`", magic.escape_ascii()))));
    }
    let version = cursor.u32("version").map_err(damaged)?;
    match version {
        2 | 3 => {}
        1 => return Err(Error::unsupported(format!("{}: GGUF version 1", map.path().display()), "2, 3")),
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(Error::unsupported(
                format!("{}: big-endian GGUF", map.path().display()),
                "little-endian",
            ));
        }
        _ => return Err(damaged(Fault::new(4, format!("version: expected 2 or 3, found {version}")))),
    }
    let tensor_count = cursor.count(MIN_TENSOR, "number of tensors").map_err(damaged)?;
    let key_count = cursor.count(MIN_KEY, "number of metadata values").map_err(damaged)?;

    let keys = read_keys(&mut cursor, bytes, key_count).map_err(damaged)?;
    let metadata = Metadata { path: map.path(), bytes, keys: &keys };
    let alignment = alignment(metadata)?;
    let parts = metadata.optional::<u64>(PARTS_KEY)?.unwrap_or(1);
    if parts > 1 {
        let what = format!("{}: one of {parts} parts of a model", map.path().display());
        return Err(Error::unsupported(what, "a model in one file"));
    }
    let tensors = read_tensors(&mut cursor, map, tensor_count)?;
    let data_at = cursor
        .at()
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| damaged(Fault::new(cursor.at(), format!("alignment {alignment} overflows"))))?;
    check_data(bytes, &tensors, data_at, alignment).map_err(damaged)?;
    Ok(Header { version, keys, tensors, data_at })
}

fn read_keys(cursor: &mut Cursor<'_>, bytes: &[u8], count: usize) -> Result<Vec<usize>, Fault> {
    let mut keys = Vec::with_capacity(count);
    for _ in 0..count {
        keys.push(cursor.at());
        cursor.text("key of a metadata value")?;
        let kind = ValueKind::read(cursor)?;
        Value::read(cursor, kind, 0)?;
    }
    let key = |&at: &usize| key_at(bytes, at).map_or("", |(key, _)| key);
    keys.sort_unstable_by(|a, b| key(a).cmp(key(b)));
    match keys.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])) {
        Some(pair) => {
            Err(Fault::new(pair[0].max(pair[1]), format!("the key `{}` is there twice", cut(key(&pair[0])))))
        }
        None => Ok(keys),
    }
}

fn read_tensors<'a>(cursor: &mut Cursor<'a>, map: &'a Map, count: usize) -> Result<Vec<usize>> {
    let bytes = map.bytes();
    let fail = |fault: Fault| damaged(map, &fault);
    let mut tensors = Vec::with_capacity(count);
    for _ in 0..count {
        let at = cursor.at();
        tensors.push(at);
        let (_, after) = tensor_at(bytes, at).map_err(|error| match error {
            Unread::Damaged(fault) => damaged(map, &fault),
            Unread::Unsupported { name, encoding } => Error::unsupported(
                format!("{}: tensor `{}` in {encoding}", map.path().display(), cut(name)),
                encoding::SUPPORTED,
            ),
        })?;
        *cursor = after;
    }
    let name = |&at: &usize| tensor_at(bytes, at).map_or("", |(entry, _)| entry.name);
    tensors.sort_unstable_by(|a, b| name(a).cmp(name(b)));
    match tensors.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
        Some(pair) => Err(fail(Fault::new(
            pair[0].max(pair[1]),
            format!("the tensor `{}` is there twice", cut(name(&pair[0]))),
        ))),
        None => Ok(tensors),
    }
}

/// The alignment of data: a power of two and a multiple of 8, as the format says.
fn alignment(metadata: Metadata<'_>) -> Result<usize> {
    let Some(alignment) = metadata.optional::<u32>(ALIGNMENT_KEY)? else { return Ok(DEFAULT_ALIGNMENT) };
    usize::try_from(alignment).ok().filter(|&value| value >= 8 && value.is_power_of_two()).ok_or_else(|| {
        Error::config(
            metadata.path.display().to_string(),
            ALIGNMENT_KEY,
            "a power of two that is a multiple of 8",
            alignment,
        )
    })
}

/// Checks that every tensor lies aligned within the file, and that none overlap.
fn check_data(bytes: &[u8], tensors: &[usize], data_at: usize, alignment: usize) -> Result<(), Fault> {
    let mut ranges = Vec::with_capacity(tensors.len());
    for &at in tensors {
        let Ok((entry, _)) = tensor_at(bytes, at) else { continue };
        let range = entry.range(data_at, bytes.len())?;
        if !range.start.is_multiple_of(alignment) {
            let problem = format!(
                "tensor `{}`: expected an offset that is a multiple of {alignment}, found {}",
                cut(entry.name),
                entry.offset
            );
            return Err(Fault::new(at, problem));
        }
        if !range.is_empty() {
            ranges.push((range.start, range.end));
        }
    }
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => {
            let problem = format!("two tensors overlap: bytes {:?} and {:?}", pair[0], pair[1]);
            Err(Fault::new(pair[1].0, problem))
        }
        None => Ok(()),
    }
}

/// Why the description of a tensor was not read.
pub(super) enum Unread<'a> {
    Damaged(Fault),
    Unsupported { name: &'a str, encoding: &'static str },
}

impl From<Fault> for Unread<'_> {
    fn from(fault: Fault) -> Self {
        Self::Damaged(fault)
    }
}

/// The description of a tensor at an offset, and a cursor behind it.
pub(super) fn tensor_at(bytes: &[u8], at: usize) -> Result<(TensorEntry<'_>, Cursor<'_>), Unread<'_>> {
    let mut cursor = Cursor::new(bytes, at);
    let name = cursor.text("name of a tensor")?;
    let refuse = |problem: String| Fault::new(at, format!("tensor `{}`: {problem}", cut(name)));
    let rank = cursor.u32("rank of a tensor")?;
    if rank > MAX_RANK {
        return Err(refuse(format!("expected at most {MAX_RANK} dimensions, found {rank}")).into());
    }
    let dims = cursor.take(8 * rank as usize, "dimensions of a tensor")?;
    let number = cursor.u32("encoding of a tensor")?;
    let encoding = match encoding::encoding(number) {
        Ok(encoding) => encoding,
        Err(Some(encoding)) => return Err(Unread::Unsupported { name, encoding }),
        Err(None) => return Err(refuse(format!("unknown encoding {number}")).into()),
    };
    let offset = cursor.u64("offset of a tensor")?;
    Ok((TensorEntry { name, encoding, dims, offset, at }, cursor))
}

impl TensorEntry<'_> {
    /// The dimensions, slowest first.
    fn sizes(&self) -> impl Iterator<Item = u64> {
        self.dims.rchunks_exact(8).map(|bytes| {
            let mut array = [0; 8];
            array.copy_from_slice(bytes);
            u64::from_le_bytes(array)
        })
    }

    /// The shape, slowest dimension first. That it fits has been checked by [`range`](Self::range).
    pub(super) fn shape(&self) -> Vec<i64> {
        self.sizes().map(|size| i64::try_from(size).unwrap_or(i64::MAX)).collect()
    }

    /// Where in the file the data lie.
    pub(super) fn range(&self, data_at: usize, file_length: usize) -> Result<Range<usize>, Fault> {
        let refuse = |problem: String| Fault::new(self.at, format!("tensor `{}`: {problem}", cut(self.name)));
        let shape = || format!("{:?}", self.sizes().collect::<Vec<_>>());
        // Strides are computed with sizes of 0 taken as 1, so these must not overflow either.
        let fits = self
            .sizes()
            .try_fold(1_i64, |product, size| product.checked_mul(i64::try_from(size.max(1)).ok()?))
            .and_then(|product| product.checked_mul(8))
            .and_then(|product| usize::try_from(product).ok());
        if fits.is_none() {
            return Err(refuse(format!("the shape {} overflows", shape())));
        }
        let elements = self.sizes().fold(1, |product: usize, size| product.saturating_mul(size as usize));
        let (block, bytes) = self.encoding.block();
        let row = self.sizes().last().unwrap_or(1);
        if !row.is_multiple_of(block as u64) {
            return Err(refuse(format!(
                "expected rows of a multiple of {block} elements, found shape {}",
                shape()
            )));
        }
        let start = usize::try_from(self.offset).ok().and_then(|offset| data_at.checked_add(offset));
        let length = elements.checked_div(block).and_then(|blocks| blocks.checked_mul(bytes));
        start
            .zip(length)
            .and_then(|(start, length)| Some(start..start.checked_add(length)?))
            .filter(|range| range.end <= file_length)
            .ok_or_else(|| {
                refuse(format!(
                    "its data, shape {} from {} behind {data_at}, end after the file's {file_length} bytes",
                    shape(),
                    self.offset
                ))
            })
    }
}

/// The beginning of a name, for errors.
fn cut(name: &str) -> &str {
    name.char_indices().nth(80).map_or(name, |(end, _)| &name[..end])
}
