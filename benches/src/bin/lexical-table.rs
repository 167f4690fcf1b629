//! Text with wanted words by several methods, and the table of how well they do it. See `benches::lexical::USAGE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    benches::exit(benches::lexical::run(std::env::args().skip(1)))
}
