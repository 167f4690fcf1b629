//! What the controls demand of their arguments.

use std::collections::HashSet;

use controlgen_core::{Error, Result};

/// `value`, if `holds`; the error says what was expected. A NaN must fail `holds`.
pub(super) fn number(what: &str, expected: &str, value: f64, holds: bool) -> Result<f64> {
    if holds { Ok(value) } else { Err(Error::value(what, expected, value)) }
}

/// A count of at least 1.
pub(super) fn count(what: &str, value: usize) -> Result<usize> {
    if value > 0 { Ok(value) } else { Err(Error::value(what, "at least 1", value)) }
}

/// One or more of something.
pub(super) fn at_least_one(what: &str, item: &str, found: usize) -> Result<()> {
    if found > 0 { Ok(()) } else { Err(Error::value(what, format!("at least one {item}"), "none")) }
}

/// Token ids that may stand in a sequence: not negative.
pub(super) fn tokens(what: &str, ids: &[i64]) -> Result<()> {
    match ids.iter().find(|&&id| id < 0) {
        Some(id) => Err(Error::value(what, "token ids of at least 0", id)),
        None => Ok(()),
    }
}

/// One or more token ids; repetitions are dropped.
pub(super) fn token_set(what: &str, ids: impl IntoIterator<Item = i64>) -> Result<Vec<i64>> {
    let mut seen = HashSet::new();
    let ids: Vec<i64> = ids.into_iter().filter(|&id| seen.insert(id)).collect();
    tokens(what, &ids)?;
    at_least_one(what, "token id", ids.len())?;
    Ok(ids)
}

/// A sequence of one or more token ids.
pub(super) fn sequence(what: &str, ids: &[i64]) -> Result<()> {
    tokens(what, ids)?;
    at_least_one(what, "token id in a sequence", ids.len())
}

/// As many of something as the state has rows.
pub(super) fn rows(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::value(format!("rows of {what}"), format!("{expected}, as many as were started"), found))
    }
}
