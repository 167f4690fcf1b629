//! What an empty stack of controls costs a step of decoding, against none.
//!
//! `control-cost [--model DIRECTORY] [--dtype bf16|f32] [--pairs N]`
//!
//! The two are timed side by side (`benches::paired`). Printed are the median of the ratios and a 95 % interval of it by
//! the percentile bootstrap; and, as what such a measurement can resolve here, the same of none
//! against none. Without `--model`: the fixture in f32 and, where set-up has put it, SmolLM2 in bf16.

use std::process::ExitCode;

use benches::decode::Decoding;
use benches::models;
use benches::paired::{estimate, ratios};
use controlgen_core::{Controls, Error, LanguageModel, Result};

/// Tokens read before the step.
const PROMPT: i64 = 32;
fn report(name: &str, model: &dyn LanguageModel, pairs: usize) -> Result<()> {
    let mut decoding = Decoding::start(model, PROMPT)?;
    let empty = Controls::bind(model.sites(), Vec::new())?;
    let (ratio, low, high) =
        estimate(&ratios(pairs, |other| decoding.step(Some(&empty).filter(|_| other)).map(drop))?);
    let (same, same_low, same_high) = estimate(&ratios(pairs, |_| decoding.step(None).map(drop))?);
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
