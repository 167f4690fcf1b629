//! What holds on the CPU, checked on another device: parity, distributions, and times.
//!
//! The binary `device-suite` runs it. It carries all that it needs, so that it can be taken to a machine that has the
//! device, LibTorch 2.11 and nothing else: `cargo xtask device-suite` packs it.

mod controls;
mod distribution;
mod parity;
pub mod random_llama;
mod timing;

use std::fmt;
use std::path::Path;

use controlgen_core::{Placement, Result};
use tch::{Device, Kind};

/// The element types that are checked.
pub const KINDS: [(Kind, &str); 3] = [(Kind::Float, "f32"), (Kind::BFloat16, "bf16"), (Kind::Half, "f16")];

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was done.
    pub check: String,
    /// In which element type.
    pub kind: &'static str,
    /// What came out.
    pub figure: String,
    /// What was asked for; a time is only stated.
    pub bound: Option<(String, bool)>,
}

impl Row {
    /// A figure that must not exceed a bound. A figure that is no number exceeds it.
    fn at_most(check: impl Into<String>, kind: &'static str, figure: f64, bound: f64) -> Self {
        let holds = figure <= bound;
        let bound = Some((format!("≤ {bound:.0e}"), holds));
        Self { check: check.into(), kind, figure: format!("{figure:.1e}"), bound }
    }

    /// A figure that is stated.
    fn stated(check: impl Into<String>, kind: &'static str, figure: String) -> Self {
        Self { check: check.into(), kind, figure, bound: None }
    }

    /// Whether it is as it should be.
    pub fn holds(&self) -> bool {
        self.bound.as_ref().is_none_or(|bound| bound.1)
    }
}

/// As a line of a Markdown table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { check, kind, figure, bound } = self;
        let (bound, verdict) = match bound {
            Some((bound, true)) => (bound.as_str(), "holds"),
            Some((bound, false)) => (bound.as_str(), "FAILS"),
            None => ("", ""),
        };
        write!(f, "| {check} | {kind} | {figure} | {bound} | {verdict} |")
    }
}

/// Runs everything on `device`, with the models in `models`; each row is shown as it comes.
///
/// # Errors
/// What keeps a check from being run at all.
pub fn run(device: Device, models: &Path, show: &mut dyn FnMut(&Row)) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut add = |new: Vec<Row>| {
        new.iter().for_each(&mut *show);
        rows.extend(new);
    };
    for (kind, name) in KINDS {
        let placement = Placement::new(device, kind);
        add(parity::models_of_text(models, placement, name)?);
        add(controls::adapters(models, placement, name)?);
        add(controls::attention_edits(placement, name)?);
    }
    add(distribution::sampling(device)?);
    add(distribution::noise(device)?);
    for (kind, name) in KINDS {
        add(timing::language_model(Placement::new(device, kind), name)?);
    }
    Ok(rows)
}
