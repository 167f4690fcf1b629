//! Support for the benchmark suites, the conformance tool and the demo of controlgen (not published).

pub mod attribute;
pub mod conformance;
pub mod decode;
pub mod device_suite;
pub mod grammars;
pub mod lexical;
pub mod models;
pub mod paired;
pub mod sentiment;
pub mod shapes;
mod table;
pub mod training;

use std::process::ExitCode;

/// What a binary of ours ends with: one clear message on stderr and code 1 where it failed.
pub fn exit(result: controlgen_core::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A number on the command line.
fn number<T: std::str::FromStr>(what: &str, text: &str) -> controlgen_core::Result<T> {
    text.parse().map_err(|_| controlgen_core::Error::value(what, "a number", text))
}

/// The guide's code, compiled and run as documentation tests.
#[cfg(doctest)]
mod guide {
    #[doc = include_str!("../../docs/guide/text.md")]
    mod text {}
    #[doc = include_str!("../../docs/guide/constraints.md")]
    mod constraints {}
    #[doc = include_str!("../../docs/guide/steering.md")]
    mod steering {}
    #[doc = include_str!("../../docs/guide/inside.md")]
    mod inside {}
    #[doc = include_str!("../../docs/guide/training.md")]
    mod training {}
    #[doc = include_str!("../../docs/guide/adapters.md")]
    mod adapters {}
    #[doc = include_str!("../../docs/guide/images.md")]
    mod images {}
}
