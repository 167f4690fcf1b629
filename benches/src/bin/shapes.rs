//! The world of captioned shapes. See `benches::shapes::USAGE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    benches::exit(benches::shapes::run(std::env::args().skip(1)))
}
