//! Controls over the next token and choices among tokens, at SmolLM2's vocabulary, for one row and for eight.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Duration;

use controlgen_core::testing::bench::bench_control;
use controlgen_core::{Result, TokenControl, TokenControls};
use controlgen_text::controls::{
    BannedWords, EpsilonCutoff, EtaCutoff, ForcedPrefix, FrequencyPresence, LogitBias, MinLength, MinP,
    NoRepeatNgram, RepetitionPenalty, Suppress, Temperature, TopK, TopP, Typical,
};
use controlgen_text::sample;
use criterion::{BenchmarkId, Criterion, Throughput};
use tch::{Device, Kind, Tensor};

const VOCAB: i64 = 49_152;
const BATCHES: [i64; 2] = [1, 8];

/// A control under its name in the reports.
fn both(c: &mut Criterion, name: &str, control: &impl TokenControl) -> Result<()> {
    BATCHES.into_iter().try_for_each(|batch| bench_control(c, name, control, VOCAB, batch))
}

fn controls(c: &mut Criterion) -> Result<()> {
    // Two hundred phrases of one to three tokens.
    let phrases = (0..200i64).map(|i| (0..=i % 3).map(|k| (i * 131 + k * 17) % VOCAB).collect::<Vec<_>>());
    let biases = (0..100i64).map(|i| (i * 400, 1.5));
    both(c, "temperature", &Temperature::new(0.8)?)?;
    both(c, "top_k", &TopK::new(50)?)?;
    both(c, "top_p", &TopP::new(0.95)?)?;
    both(c, "min_p", &MinP::new(0.05)?)?;
    both(c, "typical", &Typical::new(0.95)?)?;
    both(c, "epsilon_cutoff", &EpsilonCutoff::new(3e-4)?)?;
    both(c, "eta_cutoff", &EtaCutoff::new(3e-4)?)?;
    both(c, "repetition_penalty", &RepetitionPenalty::new(1.3)?)?;
    both(c, "repetition_penalty_normalised", &RepetitionPenalty::new(1.3)?.normalised())?;
    both(c, "frequency_presence", &FrequencyPresence::new(0.5, 0.5)?)?;
    both(c, "no_repeat_ngram", &NoRepeatNgram::new(3)?)?;
    both(c, "banned_words", &BannedWords::new(phrases)?)?;
    both(c, "forced_prefix", &ForcedPrefix::new([5, 6, 7])?)?;
    both(c, "logit_bias", &LogitBias::new(biases)?)?;
    both(c, "min_length", &MinLength::new(100, [2])?)?;
    both(c, "suppress", &Suppress::new((0..100).map(|i| i * 491))?)?;
    let usual = TokenControls::new()
        .with(RepetitionPenalty::new(1.1)?)
        .with(NoRepeatNgram::new(3)?)
        .with(Temperature::new(0.8)?)
        .with(TopK::new(50)?)
        .with(TopP::new(0.95)?);
    both(c, "the_usual_five", &usual)
}

/// What a search does with the scores.
fn choices(c: &mut Criterion) -> Result<()> {
    let mut group = c.benchmark_group("choice");
    for batch in BATCHES {
        let noise =
            Tensor::f_arange(batch * VOCAB, (Kind::Double, Device::Cpu))?.f_mul_scalar(12.9898)?.f_sin()?;
        let logits = noise.f_mul_scalar(8.0)?.f_to_kind(Kind::Float)?.f_view([batch, VOCAB])?;
        let uniforms: Vec<f64> = (0..batch).map(|row| (row as f64 + 0.5) / batch as f64).collect();
        let tokens = sample::greedy(&logits)?;
        sample::categorical(&logits, &uniforms)?;
        sample::log_prob_of(&logits, &tokens)?;
        group.throughput(Throughput::Elements(batch.unsigned_abs()));
        group.bench_function(BenchmarkId::new("greedy", batch), |b| {
            b.iter(|| black_box(sample::greedy(&logits)));
        });
        group.bench_function(BenchmarkId::new("categorical", batch), |b| {
            b.iter(|| black_box(sample::categorical(&logits, &uniforms)));
        });
        group.bench_function(BenchmarkId::new("log_prob_of", batch), |b| {
            b.iter(|| black_box(sample::log_prob_of(&logits, &tokens)));
        });
    }
    group.finish();
    Ok(())
}

fn run() -> Result<()> {
    // Over a hundred benchmarks of microseconds.
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(1));
    let mut c =
        Criterion::default().warm_up_time(warm_up).measurement_time(measurement).configure_from_args();
    controls(&mut c)?;
    choices(&mut c)?;
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
