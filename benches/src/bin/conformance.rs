//! Holds controlgen against a peer: see `conformance help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    benches::exit(benches::conformance::run(&arguments))
}
