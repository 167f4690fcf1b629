//! Batches of unequal rows.

use tch::Tensor;

use crate::{Error, Result};

/// Ids `[B, T]` and `keep` `[B, T]` of rows filled with `pad` on the left, as decoder models are prompted.
///
/// # Errors
/// [`Error::Value`] for no rows, or only empty ones.
pub fn left_padded(rows: &[Vec<i64>], pad: i64) -> Result<(Tensor, Tensor)> {
    padded(rows, pad, true)
}

/// Ids `[B, T]` and `keep` `[B, T]` of rows filled with `pad` on the right.
///
/// # Errors
/// [`Error::Value`] for no rows, or only empty ones.
pub fn right_padded(rows: &[Vec<i64>], pad: i64) -> Result<(Tensor, Tensor)> {
    padded(rows, pad, false)
}

fn padded(rows: &[Vec<i64>], pad: i64, left: bool) -> Result<(Tensor, Tensor)> {
    let len = rows.iter().map(Vec::len).max().unwrap_or(0);
    if len == 0 {
        let found = format!("{} rows, the longest of 0", rows.len());
        return Err(Error::value("rows", "at least one token", found));
    }
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    for row in rows {
        let fill = len - row.len();
        let (before, after) = if left { (fill, 0) } else { (0, fill) };
        ids.extend(std::iter::repeat_n(pad, before).chain(row.iter().copied()));
        ids.extend(std::iter::repeat_n(pad, after));
        keep.extend(std::iter::repeat_n(false, before));
        keep.extend(std::iter::repeat_n(true, row.len()));
        keep.extend(std::iter::repeat_n(false, after));
    }
    let shape = [i64::try_from(rows.len()).unwrap_or(i64::MAX), i64::try_from(len).unwrap_or(i64::MAX)];
    Ok((Tensor::f_from_slice(&ids)?.f_view(shape)?, Tensor::f_from_slice(&keep)?.f_view(shape)?))
}
