//! Masks of grammars over SmolLM2's vocabulary, at places of several kinds, for one row and for eight.

use std::process::ExitCode;
use std::time::Duration;

use benches::models;
use controlgen_core::{Error, Result, Rows, TokenControl};
use controlgen_text::grammar::{Grammar, GrammarControl, GrammarState, Vocabulary};
use controlgen_text::tokenizer::{Special, Tokenizer};
use criterion::{BatchSize, BenchmarkId, Criterion};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// SmolLM2's tokenizer where set-up has put it, else a small one; its name.
fn tokenizer() -> Result<(&'static str, Tokenizer)> {
    if let Some(folder) = models::smollm2().filter(|_| models::measuring()) {
        return Ok(("smollm2", Tokenizer::open(folder.join("hf"))?));
    }
    let small =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../controlgen-text/tests/fixtures/tokenizer/byte_level");
    Ok(("small", Tokenizer::open(small)?))
}

/// Advances by a text, as far as it goes where its spelling is forced.
fn follow(
    control: &GrammarControl,
    state: &mut GrammarState,
    tokenizer: &Tokenizer,
    said: &str,
) -> Result<()> {
    let mut left = said;
    while !left.is_empty() {
        let forced = control.forced(state, 0)?;
        let id = match forced {
            Some(id) => Some(id),
            None => tokenizer.encode(left, Special::Keep)?.first().copied(),
        };
        let bytes = id.and_then(|id| tokenizer.token_bytes(id)).unwrap_or_default();
        let rest = std::str::from_utf8(&bytes).ok().and_then(|text| left.strip_prefix(text));
        let (Some(id), Some(rest)) = (id, rest) else { break };
        control.advance(state, &[id])?;
        left = rest;
    }
    Ok(())
}

fn masks(c: &mut Criterion) -> Result<()> {
    let (name, tokenizer) = tokenizer()?;
    let vocabulary = Vocabulary::new(&tokenizer, &[2])?;
    let schema = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 20}, "email": {"type": "string", "format": "email"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "email", "age"], "additionalProperties": false});
    let json = Grammar::json_schema(&schema)?;
    let lark = Grammar::lark("start: sum\nsum: n ((\"+\" | \"-\") n)*\nn: /[0-9]+/ | \"(\" sum \")\"")?;
    let places = [
        ("json/known", &json, "{\"na"),
        ("json/string", &json, "{\"name\": \"An"),
        ("json/format", &json, "{\"name\": \"Anna\", \"email\": \"anna@exam"),
        ("json/number", &json, "{\"name\": \"Anna\", \"email\": \"anna@example.com\", \"age\": 1"),
        ("regex/words", &Grammar::regex(r"(\w+ )*\w+\.")?, "one tw"),
        ("lark/recursion", &lark, "(1+(2-3)+((4"),
    ];
    let mut group = c.benchmark_group(format!("mask/{name}"));
    for (place, grammar, said) in places {
        let control = GrammarControl::new(grammar, &vocabulary)?;
        for batch in [1i64, 8] {
            let mut state = control.start(&[vec![0]])?;
            follow(&control, &mut state, &tokenizer, said)?;
            state.reorder(&vec![0; usize::try_from(batch).unwrap_or(1)])?;
            let plain = Tensor::f_zeros([batch, tokenizer.vocab_size()], (Kind::Float, Device::Cpu))?;
            let plain = || plain.f_detach_copy().map_err(Error::from);
            let _ = control.score(&mut state, plain()?)?;
            group.bench_function(BenchmarkId::new(place, batch), |b| {
                b.iter_batched(plain, |logits| control.score(&mut state, logits?), BatchSize::SmallInput);
            });
        }
    }
    group.finish();
    Ok(())
}

fn run() -> Result<()> {
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(1));
    let mut c =
        Criterion::default().warm_up_time(warm_up).measurement_time(measurement).configure_from_args();
    masks(&mut c)?;
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
