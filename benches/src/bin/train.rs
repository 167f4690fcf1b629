//! Trains the models that the repository carries. See `benches::training::USAGE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    benches::exit(benches::training::command(std::env::args().skip(1)))
}
