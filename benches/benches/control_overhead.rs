//! What controls inside the model cost a step of decoding: none, an empty stack, one that does nothing everywhere.
//!
//! Differences below a percent drown here, where each is measured in its turn; the binary `control-cost` measures them in
//! pairs.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Duration;

use benches::decode::{Decoding, identity};
use controlgen_core::{Controls, Result};
use criterion::Criterion;

fn run() -> Result<()> {
    let mut c =
        Criterion::default().sample_size(50).measurement_time(Duration::from_secs(5)).configure_from_args();
    for (name, model) in benches::models::all()? {
        let mut decoding = Decoding::start(&*model, 32)?;
        let empty = Controls::bind(model.sites(), Vec::new())?;
        let everywhere = identity(&*model)?;
        let mut group = c.benchmark_group(format!("control_overhead/{name}"));
        for (what, controls) in [("none", None), ("empty", Some(&empty)), ("identity", Some(&everywhere))] {
            decoding.step(controls)?;
            let mut failed = None;
            group.bench_function(what, |b| {
                b.iter(|| {
                    if failed.is_none() {
                        failed = black_box(decoding.step(controls)).err();
                    }
                });
            });
            failed.map_or(Ok(()), Err)?;
        }
        group.finish();
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
