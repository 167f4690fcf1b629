//! What commands that print a table of methods share: records that can be resumed, a plot, a bar.

mod plot;
mod records;

use std::io::IsTerminal;
use std::path::Path;

use controlgen_core::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

pub use plot::{Chart, Point};
pub use records::{Keyed, Records};

/// The last two parts of the path: a directory may be called after its format.
pub fn model_name(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    parts[parts.len().saturating_sub(2)..].join("/")
}

/// A bar of so many steps, where someone sees it.
pub fn progress(steps: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(steps as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} texts, {elapsed}, {eta} left  {msg}");
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// The ones of `all` that a list of names with commas, or `all`, asks for.
pub fn chosen<T>(names: &str, all: &'static [T], name: fn(&T) -> &'static str) -> Result<Vec<&'static T>> {
    if names == "all" {
        return Ok(all.iter().collect());
    }
    let known = || all.iter().map(name).collect::<Vec<_>>().join(", ");
    names
        .split(',')
        .map(|wanted| {
            let found = all.iter().find(|one| name(one) == wanted);
            found.ok_or_else(|| Error::value("--methods", format!("some of {}", known()), wanted))
        })
        .collect()
}
