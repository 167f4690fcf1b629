//! Writing of safetensors files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use tch::Tensor;

use super::header::{dtype_name, dtype_names};
use super::replace::replace_with;
use crate::{Error, Result};

/// Bytes of a tensor that are copied and written at a time.
const PIECE: usize = 4 << 20;

/// Writes tensors to a safetensors file, which appears complete or not at all: it is written beside its place
/// under a temporary name, and then renamed. What was there is replaced.
///
/// Tensors may lie on any device and need not be contiguous; element types are those of safetensors that
/// LibTorch has. `metadata` goes to the header: transformers expects `("format", "pt")`. Equal input gives
/// equal bytes.
///
/// # Errors
/// [`Error::Value`] for a name or key that is there twice or is `__metadata__`; [`Error::Kind`] for an
/// element type that the format lacks; [`Error::Io`] if writing fails, in which case what was there is as
/// before.
pub fn save(path: impl AsRef<Path>, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let path = path.as_ref();
    // The widest elements first, so that every tensor is aligned for its type; equal ones by name.
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    for (name, tensor) in &order {
        check(name, tensor)?;
    }
    order.sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.kind().elt_size_in_bytes()), name));
    let header = header(&order, metadata)?;
    replace_with(path, |out| {
        let fail = |error| Error::io(path, error);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
        out.write_all(&header).map_err(fail)?;
        order.iter().try_for_each(|(_, tensor)| write(tensor, |bytes| out.write_all(bytes).map_err(fail)))
    })
}

fn check(name: &str, tensor: &Tensor) -> Result<()> {
    let what = || format!("tensor `{name}` to be saved");
    if name == "__metadata__" {
        return Err(Error::value("name of a tensor to be saved", "any but `__metadata__`", name));
    }
    if !tensor.defined() {
        return Err(Error::value(what(), "a tensor", "an undefined one"));
    }
    if tensor.is_sparse() {
        return Err(Error::value(what(), "a dense tensor", "a sparse one"));
    }
    let kind = tensor.f_kind()?;
    if dtype_name(kind).is_none() {
        return Err(Error::Kind { what: what(), expected: dtype_names(), found: format!("{kind:?}") });
    }
    Ok(())
}

/// The JSON text, padded so that the data begin at a multiple of eight bytes.
fn header(tensors: &[&(String, Tensor)], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut members = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        let sorted: BTreeMap<_, _> = metadata.iter().copied().collect();
        if sorted.len() < metadata.len() {
            return Err(Error::value(
                "keys of the metadata to be saved",
                "each once",
                format!("{metadata:?}"),
            ));
        }
        let pairs: Vec<_> =
            sorted.into_iter().map(|(key, value)| format!("{}:{}", text(key), text(value))).collect();
        members.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut names = std::collections::BTreeSet::new();
    let mut at = 0;
    for (name, tensor) in tensors {
        if !names.insert(name.as_str()) {
            return Err(Error::value(
                "names of the tensors to be saved",
                "each once",
                format!("`{name}` twice"),
            ));
        }
        let kind = tensor.f_kind()?;
        let end = at + tensor.numel() * kind.elt_size_in_bytes();
        members.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":{:?},\"data_offsets\":[{at},{end}]}}",
            text(name),
            dtype_name(kind).unwrap_or_default(),
            tensor.size(),
        ));
        at = end;
    }
    let mut header = format!("{{{}}}", members.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Hands out the elements of a tensor in order, a piece at a time.
fn write(tensor: &Tensor, mut out: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let flat = tensor.f_contiguous()?.f_view([-1])?;
    let width = flat.f_kind()?.elt_size_in_bytes();
    let per_piece = PIECE.div_ceil(width);
    let mut buffer = vec![0; per_piece.min(flat.numel()) * width];
    let mut at = 0;
    while at < flat.numel() {
        let count = per_piece.min(flat.numel() - at);
        let bytes = &mut buffer[..count * width];
        flat.f_narrow(0, at as i64, count as i64)?.f_copy_data_u8(bytes, count)?;
        out(bytes)?;
        at += count;
    }
    Ok(())
}
