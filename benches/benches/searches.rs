//! A step of each search, with as many rows.

use std::process::ExitCode;
use std::time::Duration;

use controlgen_core::{LanguageModel, Pass, Result, TokenControls};
use controlgen_text::controls::{LogitBias, Temperature};
use controlgen_text::lexical::Clauses;
use controlgen_text::search::{
    BeamSearch, Choice, ContrastiveSearch, EarlyStopping, GridBeamSearch, NeuroLogic, Search, Smc,
    StochasticBeamSearch, Task,
};
use controlgen_text::words::TokenTrie;
use criterion::{BenchmarkId, Criterion, Throughput};

/// Steps of a run; the prompt is read once for all of them.
const STEPS: usize = 8;

fn bench(c: &mut Criterion, name: &str, lm: &dyn LanguageModel) -> Result<()> {
    let prompts = [vec![5, 17, 40, 8]];
    let controls = TokenControls::new().with(LogitBias::new([(7, 1.5), (9, -2.0)])?);
    let shaped = controls.clone().with(Temperature::new(1.3)?);
    // Whatever the tokens are, they spell numbers, of which three are to be said.
    let trie = TokenTrie::from_bytes((0..lm.spec().vocab).map(|id| format!(" {id}")))?;
    let clauses = Clauses::new(&trie, ["12", "34", "56"])?;
    let mut group = c.benchmark_group(format!("{name}/step"));
    group.throughput(Throughput::Elements(STEPS as u64));
    for rows in [4, 16] {
        let sampling = Choice::Sample { seed: 0, first: 0 };
        let smc = || Smc::new(rows, 0);
        let beams = BeamSearch::new(rows)?.early_stopping(EarlyStopping::Exhausted);
        let ways: [(&str, Box<dyn Search>, &TokenControls, usize); 9] = [
            ("sampling", Box::new(sampling), &controls, rows),
            ("smc", Box::new(smc()?), &controls, 1),
            ("smc, resampled each time", Box::new(smc()?.ess_threshold(1.0)?), &controls, 1),
            ("smc, with a proposal", Box::new(smc()?), &shaped, 1),
            ("stochastic beam", Box::new(StochasticBeamSearch::new(rows, 0)?), &controls, 1),
            ("contrastive", Box::new(ContrastiveSearch::new(0.6, rows)?), &controls, 1),
            ("beam", Box::new(beams), &controls, 1),
            ("neurologic", Box::new(NeuroLogic::new(beams, &clauses)), &controls, 1),
            ("grid beam", Box::new(GridBeamSearch::new(beams, &clauses)), &controls, 1),
        ];
        for (way, search, controls, n) in ways {
            let pass = Pass::default();
            let task = Task { lm, prompts: &prompts, controls, pass, max_new_tokens: STEPS, eos: &[], n };
            let mut failed = None;
            group.bench_function(BenchmarkId::new(way, rows), |b| {
                b.iter(|| {
                    if let Err(error) = search.run(&task, &mut ()) {
                        failed = Some(error);
                    }
                });
            });
            failed.map_or(Ok(()), Err)?;
        }
    }
    group.finish();
    Ok(())
}

fn run() -> Result<()> {
    let mut c =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5)).configure_from_args();
    for (name, model) in benches::models::all()? {
        bench(&mut c, &name, &*model)?;
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
