//! Trains classifiers of sentiment on movie reviews. See `benches::sentiment::USAGE`.

use std::process::ExitCode;

fn main() -> ExitCode {
    benches::exit(benches::sentiment::run(std::env::args().skip(1)))
}
