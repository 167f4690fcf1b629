//! What must hold of energies and gradients: one number a row, and all of them numbers.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Refuses anything but one floating-point number for each of `rows`; of any number of rows where `None`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Kind`].
pub fn one_a_row(what: &str, value: &Tensor, rows: Option<i64>) -> Result<()> {
    let size = value.size();
    if size.len() != 1 || rows.is_some_and(|rows| size[0] != rows) {
        let expected = rows.map_or("[B]".to_owned(), |rows| format!("[{rows}]"));
        return Err(Error::shape(what, expected, &size));
    }
    floating(what, value)
}

/// Refuses integers and booleans.
///
/// # Errors
/// [`Error::Kind`].
pub fn floating(what: &str, tensor: &Tensor) -> Result<()> {
    if tensor.is_floating_point() {
        return Ok(());
    }
    let found = format!("{:?}", tensor.f_kind()?);
    Err(Error::Kind { what: what.to_owned(), expected: "a floating-point type".into(), found })
}

/// Refuses NaN and infinities, naming the rows (the first dimension) that have any.
///
/// # Errors
/// [`Error::NotFinite`].
pub fn finite(what: &str, tensor: &Tensor) -> Result<()> {
    refuse(what, tensor, &tensor.f_isfinite()?.f_logical_not()?)
}

/// Refuses NaN alone: an infinite energy means "never".
///
/// # Errors
/// [`Error::NotFinite`].
pub fn not_nan(what: &str, tensor: &Tensor) -> Result<()> {
    refuse(what, tensor, &tensor.f_isnan()?)
}

fn refuse(what: &str, tensor: &Tensor, bad: &Tensor) -> Result<()> {
    if bad.f_any()?.f_int64_value(&[])? == 0 {
        return Ok(());
    }
    let nan = tensor.f_isnan()?.f_any()?.f_int64_value(&[])? != 0;
    let rows = bad.f_reshape([bad.size().first().copied().unwrap_or(1), -1])?.f_any_dim(1, false)?;
    let rows: Vec<i64> = Vec::try_from(rows.f_nonzero()?.f_view(-1)?.f_to_kind(Kind::Int64)?)?;
    let shown = rows.iter().take(8).map(i64::to_string).collect::<Vec<_>>().join(", ");
    let more = if rows.len() > 8 { format!(" and {} more", rows.len() - 8) } else { String::new() };
    Err(Error::NotFinite {
        what: what.to_owned(),
        at: format!("row{} {shown}{more}", if rows.len() == 1 { "" } else { "s" }),
        found: if nan { "NaN" } else { "infinity" }.into(),
    })
}
