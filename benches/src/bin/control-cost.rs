//! What an empty stack of controls costs a step of decoding, against none.
//!
//! `control-cost [--model DIRECTORY] [--dtype bf16|f32] [--pairs N]`
//!
//! Steps run in the order none, empty, empty, none (ABBA), so that a drift of the machine's speed within the four counts
//! for both alike; every second time in the opposite order, so that a place in the order counts for neither. The ratio of
//! the four is the time of the two under the stack over that of the other two. Printed are the median of the ratios and a
//! 95 % interval of it by the percentile bootstrap; and, as what such a measurement can resolve here, the same of none
//! against none. Without `--model`: the fixture in f32 and, where set-up has put it, SmolLM2 in bf16.

use std::process::ExitCode;
use std::time::Instant;

use benches::decode::Decoding;
use benches::models;
use controlgen_core::noise::Stream;
use controlgen_core::{Controls, Error, LanguageModel, Result};

/// Tokens read before the step.
const PROMPT: i64 = 32;
/// How often the ratios are drawn anew.
const RESAMPLES: usize = 10_000;

fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() >> 1;
    if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// The median, and its 95 % interval.
fn estimate(ratios: &[f64]) -> (f64, f64, f64) {
    let mut stream = Stream::new(0, 0);
    let mut draw = || {
        let pick = |_| ratios[((stream.uniform() * ratios.len() as f64) as usize).min(ratios.len() - 1)];
        median(&sorted((0..ratios.len()).map(pick).collect()))
    };
    let medians = sorted((0..RESAMPLES).map(|_| draw()).collect());
    let at = |share: f64| medians[((RESAMPLES - 1) as f64 * share).round() as usize];
    (median(&sorted(ratios.to_vec())), at(0.025), at(0.975))
}

/// Ratios of `fours` times four steps: time under `controls` over time under none.
fn ratios(decoding: &mut Decoding<'_>, controls: Option<&Controls>, fours: usize) -> Result<Vec<f64>> {
    let mut timed = |controls| -> Result<f64> {
        let begin = Instant::now();
        decoding.step(controls)?;
        Ok(begin.elapsed().as_secs_f64())
    };
    let mut four = |i: usize| {
        let (outer, inner) = if i.is_multiple_of(2) { (None, controls) } else { (controls, None) };
        let (a, b, c, d) = (timed(outer)?, timed(inner)?, timed(inner)?, timed(outer)?);
        let ratio = (b + c) / (a + d);
        Ok(if i.is_multiple_of(2) { ratio } else { ratio.recip() })
    };
    for i in 0..10 {
        four(i)?;
    }
    (0..fours).map(four).collect()
}

fn report(name: &str, model: &dyn LanguageModel, pairs: usize) -> Result<()> {
    let mut decoding = Decoding::start(model, PROMPT)?;
    let empty = Controls::bind(model.sites(), Vec::new())?;
    let (ratio, low, high) = estimate(&ratios(&mut decoding, Some(&empty), pairs)?);
    let (same, same_low, same_high) = estimate(&ratios(&mut decoding, None, pairs)?);
    println!(
        "{name}: empty stack over none, {pairs} times ABBA: median {ratio:.4}, 95 % interval {low:.4} – {high:.4} \
         ({} 1.01); none over none: {same:.4}, {same_low:.4} – {same_high:.4}",
        if high <= 1.01 { "within" } else { "NOT within" }
    );
    Ok(())
}

fn run() -> Result<()> {
    let (mut model, mut dtype, mut pairs) = (None, "bf16".to_owned(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        match argument.as_str() {
            "--model" => model = Some(value()?),
            "--dtype" => dtype = value()?,
            "--pairs" => {
                let text = value()?;
                let number = text.parse().ok().filter(|&pairs: &usize| pairs > 0);
                pairs = Some(number.ok_or_else(|| Error::value("--pairs", "a number > 0", text))?);
            }
            other => {
                let expected = "--model DIRECTORY, --dtype bf16|f32 or --pairs N";
                return Err(Error::value("argument", expected, other));
            }
        }
    }
    if let Some(directory) = model {
        let opened = models::open(directory.as_ref(), &dtype)?;
        return report(&format!("{directory}, {dtype}"), &*opened, pairs.unwrap_or(400));
    }
    report("fixture, f32", &*models::open(&models::fixture(), "f32")?, pairs.unwrap_or(2000))?;
    if let Some(folder) = models::smollm2() {
        report("SmolLM2-135M, bf16", &*models::open(&folder.join("hf"), "bf16")?, pairs.unwrap_or(400))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
