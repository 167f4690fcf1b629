//! From the bytes of a map into a tensor, a piece at a time.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::TensorInfo;
use crate::sys::{Map, copy_from_bytes};
use crate::{Error, Result};

/// Bytes of a map that are read before their pages are released.
const PIECE: usize = 4 << 20;
/// Ranges of fewer bytes are left to the system: they share their pages with other tensors.
const ADVISED: usize = 64 << 10;

/// Elements that are converted at a time. LibTorch splits from 32,768 on between its threads, which costs
/// more than it gains for work that is bound by memory, and ten times more on a machine that is busy.
pub(crate) const SERIAL: usize = 1 << 14;

/// How many elements lie in a block, and how many bytes it takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) elements: usize,
    pub(crate) bytes: usize,
}

/// Whether a stored element type may be read as another: the same, between floating-point types, or between
/// integers where no value is lost.
pub(crate) fn converts(from: Kind, to: Kind) -> bool {
    use Kind::{
        BFloat16, Double, Float, Float8e4m3fn, Float8e4m3fnuz, Float8e5m2, Float8e5m2fnuz, Half, Int, Int8,
        Int16, Int64, Uint8,
    };
    let is_float = |kind| matches!(kind, Half | BFloat16 | Float | Double);
    let is_float8 = |kind| matches!(kind, Float8e4m3fn | Float8e4m3fnuz | Float8e5m2 | Float8e5m2fnuz);
    from == to
        || ((is_float(from) || is_float8(from)) && is_float(to))
        || matches!((from, to), (Uint8 | Int8, Int16 | Int | Int64) | (Int16, Int | Int64) | (Int, Int64))
}

/// Checks that a stored tensor may be read into `into`: the same shape, and an element type it converts to.
pub(crate) fn check_target(what: &str, name: &str, info: &TensorInfo, into: &Tensor) -> Result<()> {
    let tensor = || format!("{what}: tensor `{name}`");
    if !into.defined() {
        return Err(Error::value(tensor(), "a tensor to read into", "an undefined one"));
    }
    if into.is_sparse() || into.is_mkldnn() {
        return Err(Error::value(tensor(), "a dense tensor to read into", "another layout"));
    }
    let found = into.size();
    if found != info.shape {
        return Err(Error::shape(tensor(), format!("{found:?}"), &info.shape));
    }
    let to = into.f_kind()?;
    if !converts(info.kind, to) {
        return Err(Error::Kind {
            what: tensor(),
            expected: format!("{to:?} or what converts to it"),
            found: format!("{:?}", info.kind),
        });
    }
    Ok(())
}

/// Copies a tensor of LibTorch's own element type.
pub(crate) fn plain(map: &Map, range: Range<usize>, kind: Kind, into: &mut Tensor) -> Result<()> {
    let block = Block { elements: 1, bytes: kind.elt_size_in_bytes() };
    let same = into.f_kind()? == kind;
    let per_chunk = if same { PIECE.div_ceil(block.bytes) } else { SERIAL };
    chunks(map, range, block, per_chunk, into, |data, _, slice| {
        // LibTorch trusts that a truth value is 0 or 1.
        if kind == Kind::Bool
            && let Some(other) = data.iter().find(|&&byte| byte > 1)
        {
            return Err(Error::format(map.path(), format!("expected truth values 0 or 1, found {other}")));
        }
        copy_from_bytes(data, kind, slice)
    })
}

/// Calls `write` with the bytes of at most `per_chunk` elements, their number, and the slice `[number]` of
/// `into` that they belong to, until the whole range is read. `per_chunk` is a multiple of the block.
///
/// Pages of the map are released once they are read, so that it takes little memory whatever its size. A
/// tensor on another device, or one that is not contiguous, is written through a copy of itself.
pub(crate) fn chunks(
    map: &Map,
    range: Range<usize>,
    block: Block,
    per_chunk: usize,
    into: &mut Tensor,
    mut write: impl FnMut(&[u8], usize, &mut Tensor) -> Result<()>,
) -> Result<()> {
    let _guard = tch::no_grad_guard();
    if into.device() != Device::Cpu || !into.is_contiguous() {
        let mut whole = Tensor::f_empty(into.size(), (into.f_kind()?, Device::Cpu))?;
        chunks(map, range, block, per_chunk, &mut whole, write)?;
        return Ok(into.f_copy_(&whole)?);
    }
    let data = map.bytes().get(range.clone()).ok_or_else(|| {
        Error::format(
            map.path(),
            format!("expected data in bytes {range:?}, found {} bytes", map.bytes().len()),
        )
    })?;
    let flat = into.f_view([-1])?;
    let bytes_per_chunk = per_chunk.div_ceil(block.elements.max(1)).saturating_mul(block.bytes);
    let (mut done, mut populated, mut released) = (0, range.start, range.start);
    let mut at = range.start;
    for chunk in data.chunks(bytes_per_chunk.max(1)) {
        if at >= populated {
            populated = range.end.min(at + PIECE.max(chunk.len()));
            if populated - at >= ADVISED {
                map.populate(&(at..populated));
            }
        }
        let count = chunk.len().div_ceil(block.bytes.max(1)).saturating_mul(block.elements);
        let (start, length) = (i64::try_from(done), i64::try_from(count));
        let (Ok(start), Ok(length)) = (start, length) else {
            return Err(Error::value("elements of a tensor", "< 2^63", count));
        };
        write(chunk, count, &mut flat.f_narrow(0, start, length)?)?;
        done += count;
        at += chunk.len();
        if at - released >= PIECE || at == range.end {
            if at - released >= ADVISED {
                map.release(&(released..at));
            }
            released = at;
        }
    }
    Ok(())
}
