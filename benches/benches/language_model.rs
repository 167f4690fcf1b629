//! Prefill, decoding, forks and reordering of language models.

use std::process::ExitCode;
use std::time::Duration;

use controlgen_core::Result;
use controlgen_core::testing::bench::bench_language_model;
use criterion::Criterion;

fn run() -> Result<()> {
    // Passes of tens of milliseconds, some of half a second.
    let mut c =
        Criterion::default().sample_size(20).measurement_time(Duration::from_secs(8)).configure_from_args();
    for (name, model) in benches::models::all()? {
        bench_language_model(&mut c, &name, &*model)?;
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
