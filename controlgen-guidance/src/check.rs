//! What stages demand of their arguments.

use controlgen_core::{Error, Result};

/// A finite number.
pub(crate) fn finite(what: &str, value: f64) -> Result<f64> {
    if value.is_finite() { Ok(value) } else { Err(Error::value(what, "a finite number", value)) }
}
