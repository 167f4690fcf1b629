//! Opening models: Hugging Face directories and GGUF files, from the page cache.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use benches::models;
use controlgen_core::{Placement, Result, kind};
use controlgen_text::TextModel;
use controlgen_text::tokenizer::Tokenizer;
use criterion::{BenchmarkId, Criterion};
use tch::Device;

/// Measures what may fail: once before, and never again after the first error.
fn measure<T>(c: &mut Criterion, id: BenchmarkId, run: impl Fn() -> Result<T>) -> Result<()> {
    run()?;
    let mut failed = None;
    c.benchmark_group("load").bench_function(id, |b| {
        b.iter_with_large_drop(|| match failed {
            None => run().map_err(|error| failed = Some(error)).ok(),
            Some(_) => None,
        });
    });
    failed.map_or(Ok(()), Err)
}

fn text_model(c: &mut Criterion, what: &str, path: &Path, dtype: &str) -> Result<()> {
    let placement = Placement::new(Device::Cpu, kind(dtype)?);
    measure(c, BenchmarkId::new(what, dtype), || TextModel::open(path, placement))
}

fn run() -> Result<()> {
    let mut c =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(8)).configure_from_args();
    for dtype in ["f32", "bf16"] {
        measure(&mut c, BenchmarkId::new("fixture", dtype), || models::open(&models::fixture(), dtype))?;
    }
    if let Some(folder) = models::smollm2().filter(|_| models::measuring()) {
        for dtype in ["f32", "bf16"] {
            text_model(&mut c, "smollm2-directory", &folder.join("hf"), dtype)?;
            text_model(&mut c, "smollm2-gguf", &folder.join(models::SMOLLM2_GGUF), dtype)?;
        }
        measure(&mut c, BenchmarkId::new("smollm2", "tokenizer"), || Tokenizer::open(folder.join("hf")))?;
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
