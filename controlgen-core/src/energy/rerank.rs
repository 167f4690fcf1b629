//! Choosing among finished samples.

use std::cmp::Ordering;

use tch::Kind;

use super::{EnergyFn, checks};
use crate::Result;

/// The rows of x from the lowest energy to the highest; ties in the order in which they came. An energy of +∞, such
/// as that of a broken constraint, comes last.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) where the energy is not one number a row;
/// [`Error::NotFinite`](crate::Error::NotFinite), naming the rows, where it is NaN; the energy's own.
pub fn rerank<X: ?Sized, E: EnergyFn<X> + ?Sized>(energy: &E, x: &X) -> Result<Vec<usize>> {
    let _no_gradients = tch::no_grad_guard();
    let value = energy.energy(x)?;
    checks::one_a_row("energy", &value, None)?;
    checks::not_nan("energy", &value)?;
    let value: Vec<f64> = Vec::try_from(value.f_to_kind(Kind::Double)?)?;
    let mut rows: Vec<usize> = (0..value.len()).collect();
    rows.sort_by(|&a, &b| value[a].partial_cmp(&value[b]).unwrap_or(Ordering::Equal));
    Ok(rows)
}
