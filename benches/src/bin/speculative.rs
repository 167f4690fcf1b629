//! What drafting saves a text that says much again: speculative greedy search over greedy search.
//!
//! `speculative [--model DIRECTORY] [--dtype bf16|f32] [--tokens N] [--fours N] [--draft N] [--layers K]`
//!
//! The prompt is a passage and the beginning of the same passage, so that the model copies. Both ways complete it with N
//! tokens (64), one text at a time, and are timed side by side (`benches::paired`); printed are the median of the ratios,
//! time of greedy search over that of the other, with a 95 % interval by the percentile bootstrap, what was kept of the
//! drafts, and whether the tokens are the same. Drafts have 7 tokens and are looked up in the text, and, with
//! `--layers`, made by the model's own first K layers. Without `--model`: SmolLM2 in f32 and in bf16, where set-up has put it.

use std::process::ExitCode;

use benches::models;
use benches::paired::{estimate, ratios};
use controlgen_core::{Error, Pass, Placement, Result, TokenControls, kind};
use controlgen_text::TextModel;
use controlgen_text::search::{Choice, Search, Speculative, Task};
use controlgen_text::tokenizer::Special;
use tch::Device;

/// Written for this measurement.
const PASSAGE: &str = "The harbour master keeps a list of all boats that have come in since Monday. The Blue Heron \
    carries timber and rope, the Marigold carries salt and lamp oil, and the Old Constance carries nothing but \
    letters. Each captain signs the list, pays two silver coins for the berth, and leaves the name of a person in \
    town who answers for the crew. At noon the list is read aloud on the quay.";

struct Options {
    model: Option<String>,
    dtypes: Vec<String>,
    tokens: usize,
    fours: usize,
    draft: usize,
    layers: Option<usize>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let dtypes = vec!["f32".to_owned(), "bf16".to_owned()];
        let mut options = Self { model: None, dtypes, tokens: 64, fours: 12, draft: 7, layers: None };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))
            };
            let number = |text: String| {
                let number = text.parse().ok().filter(|&number: &usize| number > 0);
                number.ok_or_else(|| Error::value(argument.as_str(), "a number > 0", text))
            };
            match argument.as_str() {
                "--model" => options.model = Some(value()?),
                "--dtype" => options.dtypes = vec![value()?],
                "--tokens" => options.tokens = number(value()?)?,
                "--fours" => options.fours = number(value()?)?,
                "--draft" => options.draft = number(value()?)?,
                "--layers" => options.layers = Some(number(value()?)?),
                other => {
                    let expected =
                        "--model DIRECTORY, --dtype bf16|f32, --tokens N, --fours N, --draft N or --layers K";
                    return Err(Error::value("argument", expected, other));
                }
            }
        }
        Ok(options)
    }
}

fn report(name: &str, model: &TextModel, options: &Options) -> Result<()> {
    let beginning: String = PASSAGE.split_inclusive(' ').take(6).collect();
    let text = format!("{PASSAGE}\n\n{}", beginning.trim_end());
    let prompts = [model.tokenizer().encode(&text, Special::Add)?];
    let none = TokenControls::new();
    let task = Task {
        lm: model.lm(),
        prompts: &prompts,
        controls: &none,
        pass: Pass::default(),
        max_new_tokens: options.tokens,
        eos: &[],
        n: 1,
    };
    let greedy = Choice::Greedy.run(&task, &mut ())?;
    let draft = options.draft;
    let look_up = Speculative::prompt_lookup(Choice::Greedy, 3, draft)?;
    let mut ways = vec![(format!("look-up, {draft} tokens"), look_up)];
    if let Some(layers) = options.layers {
        let first = Speculative::draft_model(Choice::Greedy, model.first_layers(layers)?, draft)?;
        ways.push((format!("the first {layers} layers, {draft} tokens"), first));
    }
    for (what, search) in ways {
        let (found, kept) = search.complete(&task, &mut ())?;
        let all = ratios(options.fours, |other| {
            if other { Choice::Greedy.run(&task, &mut ()) } else { search.run(&task, &mut ()) }.map(drop)
        })?;
        let (ratio, low, high) = estimate(&all);
        println!(
            "{name}, {} + {} tokens, {what}: {ratio:.2} times as fast as greedy search, 95 % interval {low:.2} – {high:.2} \
             ({} 1.3); kept {} of {} drafted, {} passes; the same tokens: {}",
            prompts[0].len(),
            options.tokens,
            if low >= 1.3 { "at least" } else { "NOT at least" },
            kept.accepted,
            kept.drafted,
            kept.passes,
            found[0].ids == greedy[0].ids,
        );
    }
    Ok(())
}

fn run() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let folder = match &options.model {
        Some(directory) => directory.into(),
        None => models::smollm2()
            .ok_or_else(|| Error::value("SmolLM2", "`cargo xtask setup` to have put it there", "nothing"))?
            .join("hf"),
    };
    let name = options.model.as_deref().unwrap_or("SmolLM2-135M");
    for dtype in &options.dtypes {
        let model = TextModel::open(&folder, Placement::new(Device::Cpu, kind(dtype)?))?;
        report(&format!("{name}, {dtype}"), &model, &options)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
