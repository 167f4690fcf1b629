//! Text from a real model under several controls, each beside the uncontrolled text.
//!
//! `demo [--model DIRECTORY] [--dtype bf16|f32] [--tokens N] [--json]`

use std::io::IsTerminal;
use std::process::ExitCode;

use controlgen_core::progress::Flow;
use controlgen_core::{Error, Placement, Result, TokenControls, device, kind};
use controlgen_text::controls::{
    BannedWords, ForcedPrefix, LogitBias, MinLength, NoRepeatNgram, RepetitionPenalty, Temperature, TopP,
};
use controlgen_text::tokenizer::Special;
use controlgen_text::{Generation, TextModel};
use indicatif::{ProgressBar, ProgressStyle};

/// Where `cargo xtask setup` puts the model.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.controlgen/models/smollm2-135m-instruct/hf");

/// One control to show.
struct Show {
    name: &'static str,
    prompt: &'static str,
    controls: TokenControls,
    /// Drawn with this seed, or greedy.
    seed: Option<u64>,
    /// What the control promises.
    checks: Vec<Check>,
}

/// A promise, and whether a text of so many tokens keeps it.
type Check = (String, Box<dyn Fn(&str, &[i64]) -> bool>);

struct Options {
    model: String,
    dtype: String,
    tokens: usize,
    json: bool,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self { model: MODEL.into(), dtype: "bf16".into(), tokens: 48, json: false };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))
            };
            match argument.as_str() {
                "--model" => options.model = value()?,
                "--dtype" => options.dtype = value()?,
                "--tokens" => {
                    let text = value()?;
                    let tokens = text.parse().ok().filter(|&tokens| tokens > 0);
                    options.tokens = tokens.ok_or_else(|| Error::value("--tokens", "a number > 0", text))?;
                }
                "--json" => options.json = true,
                other => {
                    let expected = "--model DIRECTORY, --dtype bf16|f32, --tokens N or --json";
                    return Err(Error::value("argument", expected, other));
                }
            }
        }
        Ok(options)
    }
}

fn contains(text: &str, word: &str) -> bool {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_alphanumeric()).any(|found| found == word)
}

/// The first four different words of at least five letters, in lower case.
fn long_words(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for word in text.to_lowercase().split(|c: char| !c.is_alphanumeric()) {
        if word.chars().count() >= 5 && found.iter().all(|other| other != word) {
            found.push(word.to_owned());
        }
    }
    found.truncate(4);
    found
}

fn repeats(ids: &[i64], n: usize) -> bool {
    let mut seen = std::collections::HashSet::new();
    ids.windows(n).any(|gram| !seen.insert(gram.to_vec()))
}

fn shows(model: &TextModel, tokens: usize) -> Result<Vec<Show>> {
    let tokenizer = model.tokenizer();
    let summer = "My favourite thing about the summer is";
    let dragon = "The knight rode out of the castle, and in the forest he met";
    // Words that it would say, which differ from processor to processor in bf16.
    let banned = long_words(model.generate(summer).max_new_tokens(tokens).run()?.text());
    let letter = " a letter that nobody had";
    let (at_least, eos) = (tokens, model.eos().to_vec());
    let biased = tokenizer.encode(" dragon", Special::Keep)?;
    Ok(vec![
        Show {
            name: "banned words",
            prompt: summer,
            controls: TokenControls::new().with(BannedWords::words(tokenizer, &banned)?),
            seed: None,
            checks: vec![(
                format!("none of {} occurs", banned.join(", ")),
                Box::new(move |text, _| !banned.iter().any(|word| contains(text, word))),
            )],
        },
        Show {
            name: "no repeated trigram",
            prompt: "The days of the week are Monday,",
            controls: TokenControls::new().with(NoRepeatNgram::new(3)?),
            seed: None,
            checks: vec![("no three tokens occur twice".into(), Box::new(|_, ids| !repeats(ids, 3)))],
        },
        Show {
            name: "repetition penalty 1.3",
            prompt: dragon,
            controls: TokenControls::new().with(RepetitionPenalty::new(1.3)?),
            seed: None,
            checks: vec![("no five tokens occur twice".into(), Box::new(|_, ids| !repeats(ids, 5)))],
        },
        Show {
            name: "forced prefix",
            prompt: dragon,
            controls: TokenControls::new().with(ForcedPrefix::new(tokenizer.encode(letter, Special::Keep)?)?),
            seed: None,
            checks: vec![(
                format!("the text begins with `{}`", letter.trim()),
                Box::new(move |text, _| text.starts_with(letter)),
            )],
        },
        Show {
            name: "logit bias +4 on `dragon`",
            prompt: dragon,
            controls: TokenControls::new()
                .with(LogitBias::sequences([(biased.as_slice(), 4.0)])?)
                .with(NoRepeatNgram::new(2)?),
            seed: None,
            checks: vec![(
                "a dragon occurs".into(),
                Box::new(|text, _| contains(text, "dragon") || contains(text, "dragons")),
            )],
        },
        Show {
            name: "temperature 0.8, top-p 0.9, seed 7",
            prompt: summer,
            controls: TokenControls::new().with(Temperature::new(0.8)?).with(TopP::new(0.9)?),
            seed: Some(7),
            checks: vec![("something was said".into(), Box::new(|text, _| !text.trim().is_empty()))],
        },
        Show {
            name: "at least as many tokens as were asked for",
            prompt: "Question: Where do penguins live?\nAnswer:",
            controls: TokenControls::new().with(MinLength::new(at_least, eos)?),
            seed: None,
            checks: vec![(
                format!("{at_least} tokens or more"),
                Box::new(move |_, ids| ids.len() >= at_least),
            )],
        },
    ])
}

fn generate(
    model: &TextModel,
    show: &Show,
    controlled: bool,
    tokens: usize,
    bar: &ProgressBar,
) -> Result<Generation> {
    let mut generate = model.generate(show.prompt).max_new_tokens(tokens).on_step(|n| {
        bar.inc(n);
        Flow::Continue
    });
    if controlled {
        generate = generate.with(show.controls.clone());
        if let Some(seed) = show.seed {
            generate = generate.sample(seed);
        }
    }
    generate.run()
}

/// Breaks a text into lines of at most `width` characters, at spaces.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last().map_or(0, |line| line.chars().count());
        if line > 0 && line + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

fn print(show: &Show, plain: &Generation, controlled: &Generation) {
    const WIDTH: usize = 54;
    println!("\n{}", "─".repeat(2 * WIDTH + 3));
    println!("{}   ·   prompt: {}", show.name.to_uppercase(), show.prompt.replace('\n', " "));
    println!("{:<WIDTH$} │ controlled", "uncontrolled");
    let (left, right) = (wrap(plain.text(), WIDTH), wrap(controlled.text(), WIDTH));
    for i in 0..left.len().max(right.len()) {
        let at = |lines: &[String]| lines.get(i).cloned().unwrap_or_default();
        println!("{:<WIDTH$} │ {}", at(&left), at(&right));
    }
    let speed = |g: &Generation| format!("{} tokens, {:.1} a second", g.new_tokens(), g.tokens_per_second());
    println!("{:<WIDTH$} │ {}", speed(plain), speed(controlled));
}

fn run() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let placement = Placement::new(device("cpu")?, kind(&options.dtype)?);
    let model = TextModel::open(&options.model, placement)?;
    let shows = shows(&model, options.tokens)?;
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::new((2 * shows.len() * options.tokens) as u64)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {pos}/{len} tokens, {per_sec}, {eta} left  {msg}")
    {
        bar.set_style(style);
    }
    let mut broken = Vec::new();
    for show in &shows {
        bar.set_message(show.name);
        let plain = generate(&model, show, false, options.tokens, &bar)?;
        let controlled = generate(&model, show, true, options.tokens, &bar)?;
        let ids = controlled.completions.first().map_or(&[][..], |completion| &completion.ids);
        let checks: Vec<_> =
            show.checks.iter().map(|(what, holds)| (what, holds(controlled.text(), ids))).collect();
        if options.json {
            let checks: Vec<_> = checks
                .iter()
                .map(|(what, holds)| serde_json::json!({ "what": what, "holds": holds }))
                .collect();
            let line = serde_json::json!({
                "control": show.name, "prompt": show.prompt,
                "uncontrolled": plain.text(), "controlled": controlled.text(),
                "tokens": controlled.new_tokens(), "tokens_per_second": controlled.tokens_per_second(),
                "checks": checks,
            });
            bar.suspend(|| println!("{line}"));
        } else {
            bar.suspend(|| print(show, &plain, &controlled));
        }
        let failed = checks.iter().filter(|(_, holds)| !holds);
        broken.extend(failed.map(|(what, _)| format!("{}: {what}", show.name)));
    }
    bar.finish_and_clear();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Error::value("what the controls promise", "to hold", format!("broken: {}", broken.join("; "))))
}

fn main() -> ExitCode {
    benches::exit(run())
}
