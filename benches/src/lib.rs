//! Support for the benchmark suites, the conformance tool and the demo of controlgen (not published).

pub mod conformance;

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
