//! Texts of a wanted sentiment by several methods, and the table of how well they do it. See `benches::attribute::USAGE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    benches::exit(benches::attribute::run(std::env::args().skip(1)))
}
