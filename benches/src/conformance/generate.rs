//! Completing a prompt: one JSON line, or as many as `--repeat` asks for, to measure a process that is warm.

use std::io::Write;

use controlgen_core::{Error, Result};
use controlgen_text::{Generation, GenerationConfig, TextModel};
use serde_json::json;

use super::arguments::Arguments;

pub fn run(arguments: &[String]) -> Result<()> {
    let known = ["prompt", "input-ids", "config", "seed", "repeat", "dtype", "device"];
    let arguments = Arguments::parse(arguments, &known)?;
    let [path] = arguments.paths(["MODEL_DIR"])?;
    let config = match arguments.get("config") {
        Some(path) => GenerationConfig::open(path)?,
        None => GenerationConfig::default(),
    };
    let texts: Vec<&str> = arguments.all("prompt").collect();
    let ids = arguments.all("input-ids").map(parse_ids).collect::<Result<Vec<_>>>()?;
    let seed = arguments.number("seed", 0)?;
    let model = TextModel::open(&path, arguments.placement()?)?;
    if texts.is_empty() == ids.is_empty() {
        let found = if texts.is_empty() { "neither" } else { "both" };
        return Err(Error::value("prompt", "--prompt or --input-ids", found));
    }
    for _ in 0..arguments.number("repeat", 1)? {
        let generate = if ids.is_empty() {
            model.generate_batch(texts.iter().copied())
        } else {
            model.generate_ids(ids.iter().cloned())
        };
        // Whether anything is drawn is for the configuration to say.
        print(&generate.sample(seed).config(&config).run()?)?;
    }
    Ok(())
}

fn print(done: &Generation) -> Result<()> {
    let sequences: Vec<_> = done
        .completions
        .iter()
        .map(|c| {
            let mut line = json!({ "ids": c.ids, "text": c.text, "logprobs": c.logprobs, "score": c.score });
            if !c.unmet.is_empty() {
                line["unmet"] = json!(c.unmet); // clauses, by number
            }
            line
        })
        .collect();
    let line = json!({
        "sequences": sequences,
        "prompt_tokens": done.prompt_tokens,
        "prefill_seconds": done.prefill.as_secs_f64(),
        "decode_seconds": done.decode.as_secs_f64(),
        "tokens_per_second": done.tokens_per_second(),
    });
    // Whoever reads may be gone.
    writeln!(std::io::stdout(), "{line}").map_err(|error| Error::io("stdout", error))
}

fn parse_ids(text: &str) -> Result<Vec<i64>> {
    text.split(',')
        .map(|id| id.trim().parse().map_err(|_| Error::value("--input-ids", "numbers and commas", text)))
        .collect()
}
