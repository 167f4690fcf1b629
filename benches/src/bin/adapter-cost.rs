//! What adapters cost a step of decoding, against the model without them.
//!
//! `adapter-cost [--model DIRECTORY] [--dtype bf16|f32] [--pairs N] [--rank R]`
//!
//! LoRA at every linear site but the output, with factors that are not zero: as a control, and merged. (IA)³ at keys,
//! values and down projections; a prefix of 10 positions; a bottleneck of a sixteenth at attention and feed-forward. Each
//! is timed side by side with the model alone (`benches::paired`); printed are the median of the ratios and a 95 % interval
//! of it by the percentile bootstrap; and, as what such a measurement can resolve here, the same of the model against
//! itself. Without `--model`: SmolLM2 in f32 and in bf16, where set-up has put it.

use std::process::ExitCode;

use benches::decode::Decoding;
use benches::models;
use benches::paired::{estimate, ratios};
use controlgen_core::{Adapter, Controls, Error, LanguageModel, Result, SiteMap};
use controlgen_peft::{
    Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Merged, Prefix, PrefixConfig,
};

/// Tokens read before the step.
const PROMPT: i64 = 32;

/// LoRA whose B is what another's A would be: values of the usual size.
fn lora(sites: &SiteMap, r: i64) -> Result<Lora> {
    let adapter = Lora::new(LoraConfig { r, ..LoraConfig::default() }, sites, 1)?;
    let _no_gradients = tch::no_grad_guard();
    for (_, parameter) in adapter.parameters() {
        parameter.f_add_scalar(0.01).and_then(|shifted| parameter.shallow_clone().f_copy_(&shifted))?;
    }
    Ok(adapter)
}

fn report(name: &str, model: &dyn LanguageModel, pairs: usize, rank: i64) -> Result<()> {
    let sites = model.sites();
    let mut alone = Decoding::start(model, PROMPT)?;
    let print = |what: &str, limit: f64, ratios: &[f64]| {
        let (ratio, low, high) = estimate(ratios);
        let within = if high <= limit { "within" } else { "NOT within" };
        let limit = if limit.is_finite() { format!(" ({within} {limit})") } else { String::new() };
        println!("{name}: {what}: median {ratio:.4}, 95 % interval {low:.4} – {high:.4}{limit}");
    };
    print("the model over itself", f64::INFINITY, &ratios(pairs, |_| alone.step(None).map(drop))?);

    let lora = lora(sites, rank)?;
    let merged = Merged::new(model.handle(), &[&lora])?;
    let mut in_weights = Decoding::start(merged.model(), PROMPT)?;
    let over =
        ratios(
            pairs,
            |other| {
                if other { in_weights.step(None).map(drop) } else { alone.step(None).map(drop) }
            },
        )?;
    print(&format!("LoRA r = {rank}, merged, over the model"), f64::INFINITY, &over);

    let neck =
        BottleneckConfig { target_modules: vec!["self_attn".into(), "mlp".into()], ..Default::default() };
    let stack: [(String, f64, Box<dyn Adapter>); 4] = [
        (format!("LoRA r = {rank}"), 1.15, Box::new(lora)),
        ("(IA)³".into(), f64::INFINITY, Box::new(Ia3::new(Ia3Config::default(), sites)?)),
        (
            "prefix of 10".into(),
            f64::INFINITY,
            Box::new(Prefix::new(PrefixConfig { num_virtual_tokens: 10, ..Default::default() }, sites, 1)?),
        ),
        ("bottleneck".into(), f64::INFINITY, Box::new(Bottleneck::new(neck, sites, 1)?)),
    ];
    for (what, limit, adapter) in stack {
        let controls = Controls::bind(sites, vec![adapter.handle()])?;
        let over = ratios(pairs, |other| alone.step(Some(&controls).filter(|_| other)).map(drop))?;
        print(&format!("{what} over the model"), limit, &over);
    }
    Ok(())
}

fn run() -> Result<()> {
    let (mut model, mut dtype, mut pairs, mut rank) = (None, "bf16".to_owned(), 200, 8);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        let number = |text: String| {
            let number = text.parse().ok().filter(|&number: &usize| number > 0);
            number.ok_or_else(|| Error::value(argument.as_str(), "a number > 0", text))
        };
        match argument.as_str() {
            "--model" => model = Some(value()?),
            "--dtype" => dtype = value()?,
            "--pairs" => pairs = number(value()?)?,
            "--rank" => rank = number(value()?)? as i64,
            other => {
                let expected = "--model DIRECTORY, --dtype bf16|f32, --pairs N or --rank R";
                return Err(Error::value("argument", expected, other));
            }
        }
    }
    if let Some(directory) = model {
        let opened = models::open(directory.as_ref(), &dtype)?;
        return report(&format!("{directory}, {dtype}"), &*opened, pairs, rank);
    }
    let folder = models::smollm2()
        .ok_or_else(|| Error::value("SmolLM2", "`cargo xtask setup` to have put it there", "nothing"))?;
    for dtype in ["f32", "bf16"] {
        let opened = models::open(&folder.join("hf"), dtype)?;
        report(&format!("SmolLM2-135M, {dtype}"), &*opened, pairs, rank)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
