//! Criterion suites over the traits: what our models and controls are measured with, for anybody's.
//!
//! ```no_run
//! use controlgen_core::testing::{TableLm, bench::bench_language_model};
//! use criterion::{Criterion, criterion_group, criterion_main};
//!
//! fn suite(c: &mut Criterion) {
//!     let model = TableLm::random(8, 0).expect("a model");
//!     bench_language_model(c, "table", &model).expect("a measurement");
//! }
//!
//! criterion_group!(benches, suite);
//! criterion_main!(benches);
//! ```

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use tch::{Kind, Tensor};

use crate::{
    Condition, Denoiser, Error, LanguageModel, LmInput, Pass, Result, Rows, Source, State, TokenControl,
};

/// How many tokens are read before a step of decoding is measured, context permitting.
const PROMPT: i64 = 32;

/// Measures a language model, under `name`:
///
/// - `prefill/n`: reading n = 32 and 256 tokens into a new state, batch 1, the last position's logits;
/// - `decode/b`: one token a row after a prompt of 32, batch b = 1 and 8;
/// - `fork/b`: forking that state, and `fork_decode/b`: forking it and one step of the fork, which pays for what the
///   fork put off;
/// - `reorder/b`: moving every row of it.
///
/// Lengths that the model's context does not hold are left out. Gradients are off, and each pass is waited for by
/// reading one of its logits.
///
/// # Errors
/// The model's, before or during a measurement.
pub fn bench_language_model(c: &mut Criterion, name: &str, model: &dyn LanguageModel) -> Result<()> {
    let _no_gradients = tch::no_grad_guard();
    let context = model.spec().context;
    let mut group = c.benchmark_group(name);
    for len in [32u32, 256] {
        if i64::from(len) > context {
            continue;
        }
        let ids = ids(model, 1, i64::from(len))?;
        group.throughput(Throughput::Elements(u64::from(len)));
        measure(&mut group, BenchmarkId::new("prefill", len), || {
            let mut state = start(model, 1, i64::from(len))?;
            step(model, &ids, &mut state)
        })?;
    }
    let prompt = PROMPT.min(context - 1);
    if prompt < 1 {
        return Ok(());
    }
    for batch in [1u32, 8] {
        let rows = i64::from(batch);
        let mut state = start(model, rows, prompt + 1)?;
        step(model, &ids(model, rows, prompt)?, &mut state)?;
        let next = ids(model, rows, 1)?;
        group.throughput(Throughput::Elements(u64::from(batch)));
        measure(&mut group, BenchmarkId::new("decode", batch), || {
            step(model, &next, &mut state)?;
            state.truncate(prompt)
        })?;
        measure(&mut group, BenchmarkId::new("fork", batch), || state.fork().map(drop))?;
        measure(&mut group, BenchmarkId::new("fork_decode", batch), || {
            step(model, &next, &mut state.fork()?)
        })?;
        if rows > 1 {
            let rotated: Vec<i64> = (0..rows).map(|row| (row + 1) % rows).collect();
            measure(&mut group, BenchmarkId::new("reorder", batch), || state.reorder(&rotated))?;
        }
    }
    group.finish();
    Ok(())
}

/// Measures a token control over `vocab` tokens and `batch` rows, under `name`: `start/b` with prompts of 32 tokens,
/// and after it `score/b`, `advance/b` and `reorder/b`.
///
/// # Errors
/// [`Error::Value`] for no tokens or rows; the control's.
pub fn bench_control<C: TokenControl>(
    c: &mut Criterion,
    name: &str,
    control: &C,
    vocab: i64,
    batch: i64,
) -> Result<()> {
    if vocab < 1 || batch < 1 {
        return Err(Error::value("vocabulary and batch", ">= 1", format!("{vocab} and {batch}")));
    }
    let _no_gradients = tch::no_grad_guard();
    let token = |i: i64| (i * 7919 + 13).rem_euclid(vocab);
    let prompts: Vec<Vec<i64>> =
        (0..batch).map(|row| (0..PROMPT).map(|i| token(row * PROMPT + i)).collect()).collect();
    let chosen: Vec<i64> = (0..batch).map(|row| token(row + 5)).collect();
    let rotated: Vec<i64> = (0..batch).map(|row| (row + 1) % batch).collect();
    let noise =
        Tensor::f_arange(batch * vocab, (Kind::Double, tch::Device::Cpu))?.f_mul_scalar(12.9898)?.f_sin()?;
    let logits = noise.f_mul_scalar(8.0)?.f_to_kind(Kind::Float)?.f_view([batch, vocab])?;

    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(u64::try_from(batch).unwrap_or(0)));
    measure(&mut group, BenchmarkId::new("start", batch), || control.start(&prompts).map(drop))?;
    let fresh = || control.start(&prompts);
    measure_after(
        &mut group,
        BenchmarkId::new("score", batch),
        || Ok((fresh()?, logits.f_detach_copy()?)),
        |(state, own)| control.score(state, own.shallow_clone()).map(drop),
    )?;
    measure_after(&mut group, BenchmarkId::new("advance", batch), fresh, |state| {
        control.advance(state, &chosen)
    })?;
    measure_after(&mut group, BenchmarkId::new("reorder", batch), fresh, |state| state.reorder(&rotated))?;
    group.finish();
    Ok(())
}

/// Measures a denoiser, under `name`, at the size that it was made for:
///
/// - `prepare/n`: preparing the n conditions that are given;
/// - `step/b`: a prediction for b = 1, 2 and 8 rows, which are under the conditions in turn.
///
/// Gradients are off, and each call is waited for by reading one of its numbers.
///
/// # Errors
/// [`Error::Value`] for no conditions; the denoiser's, before or during a measurement.
pub fn bench_denoiser(
    c: &mut Criterion,
    name: &str,
    model: &dyn Denoiser,
    conditions: &[Condition],
) -> Result<()> {
    if conditions.is_empty() {
        return Err(Error::value("conditions", "one at least", 0));
    }
    let _no_gradients = tch::no_grad_guard();
    let (spec, pass) = (model.spec(), Pass::default());
    let options = (Kind::Float, spec.placement.device);
    let mut group = c.benchmark_group(name);
    let prepared = model.prepare(conditions, &pass)?;
    measure(&mut group, BenchmarkId::new("prepare", conditions.len()), || {
        model.prepare(conditions, &pass).map(drop)
    })?;
    for batch in [1u32, 2, 8] {
        let rows = i64::from(batch);
        let shape = [rows, spec.channels, spec.size[0], spec.size[1]];
        let x = Tensor::f_arange(shape.iter().product::<i64>(), options)?.f_mul_scalar(12.9898)?.f_sin()?;
        let (x, t) = (x.f_view(shape)?, Tensor::f_full([rows], 0.5, options)?);
        let of = (0..rows).map(|row| row.rem_euclid(prepared.rows())).collect::<Vec<_>>();
        let prepared = prepared.select(&of)?;
        group.throughput(Throughput::Elements(u64::from(batch)));
        measure(&mut group, BenchmarkId::new("step", batch), || {
            let made = model.predict(&x, &t, &prepared, &pass)?.value;
            std::hint::black_box(made.f_double_value(&[0, 0, 0, 0])?);
            Ok(())
        })?;
    }
    group.finish();
    Ok(())
}

/// Token ids `[rows, len]` that vary.
fn ids(model: &dyn LanguageModel, rows: i64, len: i64) -> Result<Tensor> {
    let spec = model.spec();
    let ids = Tensor::f_arange(rows * len, (Kind::Int64, tch::Device::Cpu))?
        .f_mul_scalar(7919)?
        .f_add_scalar(13)?;
    Ok(ids.f_remainder(spec.vocab)?.f_view([rows, len])?.f_to_device(spec.placement.device)?)
}

fn start(model: &dyn LanguageModel, rows: i64, len: i64) -> Result<State> {
    let mut state = model.start(Source::Rows(rows), &Pass::default())?;
    state.reserve(len)?;
    Ok(state)
}

/// A pass, and the wait for it.
fn step(model: &dyn LanguageModel, ids: &Tensor, state: &mut State) -> Result<()> {
    let logits = model.forward(LmInput::ids(ids).last(), state, &Pass::default())?.logits;
    std::hint::black_box(logits.f_double_value(&[0, 0, 0])?);
    Ok(())
}

/// Measures what may fail: once before the measurement, and never again after the first error.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    mut run: impl FnMut() -> Result<()>,
) -> Result<()> {
    run()?;
    let mut failed = None;
    group.bench_function(id, |bencher| {
        bencher.iter(|| {
            if failed.is_none() {
                failed = run().err();
            }
        });
    });
    failed.map_or(Ok(()), Err)
}

/// The same for what uses up what it works on, which `setup` makes outside the measured time.
fn measure_after<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    setup: impl Fn() -> Result<T>,
    mut run: impl FnMut(&mut T) -> Result<()>,
) -> Result<()> {
    run(&mut setup()?)?;
    let mut failed = None;
    group.bench_function(id, |bencher| {
        let routine = |made: &mut Result<T>| {
            if let (Ok(made), None) = (made, &failed) {
                failed = run(made).err();
            }
        };
        bencher.iter_batched_ref(&setup, routine, BatchSize::SmallInput);
    });
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Component, Mixture, MixtureDenoiser, TableLm, TableLmConfig};
    use crate::{NoiseLevel, Parameterisation, PerRow, RowControl};
    use std::time::Duration;

    fn quick(folder: &std::path::Path) -> Criterion {
        let short = Duration::from_millis(1);
        let c = Criterion::default().sample_size(10).warm_up_time(short).measurement_time(short);
        c.nresamples(1001).without_plots().output_directory(folder)
    }

    /// The benchmarks that left a result.
    fn measured(folder: &std::path::Path, group: &str) -> Vec<String> {
        let list = |path: std::path::PathBuf| {
            let names =
                std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name != "report").collect::<Vec<_>>()
        };
        let mut found = Vec::new();
        for id in list(folder.join(group)) {
            found.extend(list(folder.join(group).join(&id)).into_iter().map(|n| format!("{id}/{n}")));
        }
        found.sort();
        found
    }

    #[derive(Clone)]
    struct Ban(i64);
    impl RowControl for Ban {
        type State = usize;
        fn start(&self, prompt: &[i64]) -> Result<usize> {
            Ok(prompt.len())
        }
        fn score(&self, _: &usize, row: &mut Tensor) -> Result<()> {
            let _ = row.f_select(0, self.0)?.f_fill_(f64::NEG_INFINITY)?;
            Ok(())
        }
        fn advance(&self, state: &mut usize, _token: i64) -> Result<()> {
            *state += 1;
            Ok(())
        }
    }

    #[test]
    fn every_benchmark_runs() {
        let folder = tempfile::tempdir().unwrap();
        let model = TableLm::new(&TableLmConfig { context: 300, ..TableLmConfig::default() }).unwrap();
        bench_language_model(&mut quick(folder.path()), "table", &model).unwrap();
        let expected = [
            "decode/1",
            "decode/8",
            "fork/1",
            "fork/8",
            "fork_decode/1",
            "fork_decode/8",
            "prefill/256",
            "prefill/32",
            "reorder/8",
        ];
        assert_eq!(measured(folder.path(), "table"), expected);
        bench_control(&mut quick(folder.path()), "ban", &PerRow(Ban(2)), 5, 4).unwrap();
        assert_eq!(measured(folder.path(), "ban"), ["advance/4", "reorder/4", "score/4", "start/4"]);
    }

    #[test]
    fn denoisers_are_measured() {
        let folder = tempfile::tempdir().unwrap();
        let of = |class| Component { mean: vec![1.0, -1.0], deviation: 0.5, weight: 1.0, class };
        let mixture = Mixture::new([2, 1, 1], vec![of(0), of(1)]).unwrap();
        let model = MixtureDenoiser::new(mixture, Parameterisation::Epsilon, NoiseLevel::from_flow).unwrap();
        let conditions = [Condition::Null, Condition::Class(0)];
        bench_denoiser(&mut quick(folder.path()), "mixture", &model, &conditions).unwrap();
        assert_eq!(measured(folder.path(), "mixture"), ["prepare/2", "step/1", "step/2", "step/8"]);
        let none = bench_denoiser(&mut quick(folder.path()), "none", &model, &[]);
        assert!(matches!(none, Err(Error::Value { .. })));
    }

    #[test]
    fn a_short_context_leaves_out_what_does_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let model = TableLm::new(&TableLmConfig { context: 8, ..TableLmConfig::default() }).unwrap();
        bench_language_model(&mut quick(folder.path()), "short", &model).unwrap();
        assert!(measured(folder.path(), "short").iter().all(|id| !id.starts_with("prefill")));
    }

    #[test]
    fn errors_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let c = &mut quick(folder.path());
        assert!(matches!(bench_control(c, "bad", &PerRow(Ban(9)), 5, 2), Err(Error::Torch { .. })));
        assert!(matches!(bench_control(c, "bad", &PerRow(Ban(0)), 0, 2), Err(Error::Value { .. })));
    }
}
