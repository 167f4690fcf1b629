//! How fast a device is, and how much of its memory's speed decoding reaches.

use std::time::Instant;

use controlgen_core::{LanguageModel, LmInput, Pass, Placement, Result, Rows, Source, State};
use tch::{Device, Kind, Tensor};

use super::{Row, random_llama};

/// Tokens of the prompt.
const PROMPT: i64 = 512;

/// Prefill and decoding of a model of 135 million parameters, in one row and in several.
pub fn language_model(placement: Placement, kind: &'static str) -> Result<Vec<Row>> {
    let _no_gradients = tch::no_grad_guard();
    let model = random_llama::open(placement)?;
    let (steps, many) = if placement.device == Device::Cpu { (16, 8) } else { (128, 64) };
    let read = memory(placement.device)?;
    let bytes = 134_515_008.0 * if placement.kind == Kind::Float { 4.0 } else { 2.0 };
    let mut rows = Vec::new();

    prefill(&*model)?;
    let (seconds, mut state) = prefill(&*model)?;
    let figure = format!("{:.0} tokens/s", PROMPT as f64 / seconds);
    rows.push(Row::stated(format!("prefill of {PROMPT} tokens, 135M"), kind, figure));

    decode(&*model, &mut state, 2)?;
    let seconds = decode(&*model, &mut state, steps)?;
    let share = 100.0 * bytes / seconds / read;
    let figure = format!("{:.0} tokens/s, {share:.0} % of memory's {:.0} GB/s", seconds.recip(), read / 1e9);
    rows.push(Row::stated("decoding, one row, 135M", kind, figure));

    state.reorder(&vec![0; usize::try_from(many).unwrap_or(0)])?;
    decode(&*model, &mut state, 2)?;
    let seconds = decode(&*model, &mut state, steps)?;
    let figure = format!("{:.0} tokens/s", many as f64 / seconds);
    rows.push(Row::stated(format!("decoding, {many} rows, 135M"), kind, figure));
    Ok(rows)
}

/// Seconds to read the prompt, and what was read.
fn prefill(model: &dyn LanguageModel) -> Result<(f64, State)> {
    let spec = model.spec();
    let ids = Tensor::f_arange(PROMPT, (Kind::Int64, spec.placement.device))?;
    let ids = ids.f_mul_scalar(7919)?.f_remainder(spec.vocab)?.f_unsqueeze(0)?;
    let pass = Pass::default();
    let mut state = model.start(Source::Rows(1), &pass)?;
    state.reserve(PROMPT + 512)?;
    let begin = Instant::now();
    let output = model.forward(LmInput::ids(&ids).last(), &mut state, &pass)?;
    output.logits.f_sum(Kind::Double)?.f_double_value(&[])?;
    Ok((begin.elapsed().as_secs_f64(), state))
}

/// Seconds a step: the most probable token of each row, read in turn.
fn decode(model: &dyn LanguageModel, state: &mut State, steps: u32) -> Result<f64> {
    let pass = Pass::default();
    let mut ids = Tensor::f_zeros([state.rows(), 1], (Kind::Int64, model.spec().placement.device))?;
    let begin = Instant::now();
    for _ in 0..steps {
        let logits = model.forward(LmInput::ids(&ids).last(), state, &pass)?.logits;
        ids = logits.f_select(1, -1)?.f_argmax(-1, true)?;
    }
    ids.f_sum(Kind::Int64)?.f_int64_value(&[])?;
    Ok(begin.elapsed().as_secs_f64() / f64::from(steps))
}

/// Bytes a second that the device reads: the sum of half a gigabyte, the best of five.
fn memory(device: Device) -> Result<f64> {
    let numbers = Tensor::f_ones([1 << 27], (Kind::Float, device))?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        numbers.f_sum(Kind::Float)?.f_double_value(&[])?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(4.0 * f64::from(1 << 27) / best)
}
