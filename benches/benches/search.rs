//! Steps of searches: the time of a run of a few tokens, as steps a second.

use std::process::ExitCode;
use std::time::Duration;

use controlgen_core::{LanguageModel, Pass, Result, TokenControls};
use controlgen_text::search::{BeamSearch, Choice, DiverseBeamSearch, EarlyStopping, Search, Task};
use criterion::{Criterion, Throughput};

/// Tokens of each run.
const STEPS: usize = 8;

/// A search with its controls.
type Run = (&'static str, TokenControls, Box<dyn Search>);

fn searches() -> Result<Vec<Run>> {
    let none = TokenControls::new;
    let beams =
        |num_beams| -> Result<_> { Ok(BeamSearch::new(num_beams)?.early_stopping(EarlyStopping::Exhausted)) };
    Ok(vec![
        ("greedy", none(), Box::new(Choice::Greedy)),
        ("beam/4", none(), Box::new(beams(4)?)),
        ("beam/20", none(), Box::new(beams(20)?)),
        ("diverse_beam/4x2", none(), Box::new(DiverseBeamSearch::new(beams(8)?, 2, 0.5)?)),
    ])
}

fn measure(c: &mut Criterion, model: &str, lm: &dyn LanguageModel) -> Result<()> {
    let prompts = [(3..35).collect::<Vec<i64>>()];
    let mut group = c.benchmark_group(format!("search/{model}"));
    group.throughput(Throughput::Elements(STEPS as u64));
    for (name, controls, search) in searches()? {
        let task = Task {
            lm,
            prompts: &prompts,
            controls: &controls,
            pass: Pass::default(),
            max_new_tokens: STEPS,
            eos: &[],
            n: 1,
        };
        search.run(&task, &mut ())?;
        group.bench_function(name, |b| b.iter(|| search.run(&task, &mut ())));
    }
    group.finish();
    Ok(())
}

fn run() -> Result<()> {
    let mut c =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(8)).configure_from_args();
    for (name, model) in benches::models::all()? {
        measure(&mut c, &name, &*model)?;
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
