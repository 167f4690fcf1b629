//! Whether texts under grammars are texts of the grammars, what the mask costs, and what jump-forward gains.
//!
//! `structured-output [--model DIRECTORY] [--count N] [--kind json|regex|lark] [--most N] [--pairs N]
//! [--dtype bf16|f32] [--texts FILE]`
//!
//! N texts of each kind (JSON Schema, regular expressions, Lark) are drawn at temperature 1, one by one and eight in a batch
//! by turns, and N/8 found by beams; each is judged by a validator that is not ours. A text that its length cut off counts
//! as cut off. The texts are then followed again, without a model, for the time of each mask: of three such runs, each from
//! a lexer that has seen nothing, the shortest time of each step counts. `--pairs` is how many times jump-forward is
//! timed against token by token, ABBA; 0 for not at all. `--texts` writes the texts as JSON lines. Without `--model`:
//! SmolLM2 where set-up has put it.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::grammars::{Case, cases, subscriber};
use benches::models;
use benches::paired::{estimate, ratios};
use controlgen_core::{Error, Placement, Result, TokenControl, kind};
use controlgen_text::grammar::{Grammar, GrammarControl};
use controlgen_text::search::{BeamSearch, Finish};
use controlgen_text::{Completion, TextModel};
use serde_json::json;
use tch::{Device, Kind, Tensor};

struct Options {
    model: Option<String>,
    count: usize,
    kind: Option<String>,
    most: usize,
    pairs: usize,
    texts: Option<String>,
    dtype: String,
}

fn options() -> Result<Options> {
    let mut options = Options {
        model: None,
        count: 200,
        kind: None,
        most: 400,
        pairs: 20,
        texts: None,
        dtype: "f32".to_owned(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        let number = |text: String| text.parse().map_err(|_| Error::value("argument", "a number", text));
        match argument.as_str() {
            "--model" => options.model = Some(value()?),
            "--count" => options.count = number(value()?)?,
            "--kind" => options.kind = Some(value()?),
            "--most" => options.most = number(value()?)?,
            "--pairs" => options.pairs = number(value()?)?,
            "--dtype" => options.dtype = value()?,
            "--texts" => options.texts = Some(value()?),
            other => return Err(Error::value("argument", "those that the documentation lists", other)),
        }
    }
    Ok(options)
}

/// How texts were found, and how many of them were what.
#[derive(Default)]
struct Tally {
    texts: usize,
    valid: usize,
    cut: usize,
    /// The longest run of whitespace in a text.
    longest: usize,
}

impl Tally {
    fn add(&mut self, case: &Case, how: &str, completion: &Completion) {
        self.texts += 1;
        let blank = |c: char| c.is_whitespace();
        let runs = completion.text.split(|c| !blank(c)).map(str::len);
        self.longest = self.longest.max(runs.max().unwrap_or(0));
        let whole = matches!(completion.finish, Finish::Eos(_));
        self.cut += usize::from(!whole);
        match (case.judge)(&completion.text) {
            Ok(()) if whole => self.valid += 1,
            Ok(()) => {}
            Err(problem) => {
                println!(
                    "  {} by {how}, {:?}: {problem}: {:?}",
                    case.name, completion.finish, completion.text
                );
            }
        }
    }
}

/// Draws texts of a case, and judges them and those that beams find; the drawn ones.
fn draw(
    model: &TextModel,
    case: &Case,
    control: &GrammarControl,
    n: usize,
    most: usize,
) -> Result<Vec<Completion>> {
    let mut all = Vec::new();
    let (mut alone, mut batched, mut beams) = (Tally::default(), Tally::default(), Tally::default());
    let generate = |seed| model.generate(case.prompt).with(control.clone()).sample(seed).max_new_tokens(most);
    while alone.texts + batched.texts < n {
        let seed = (alone.texts + batched.texts) as u64;
        // As many one by one as in batches of eight, near enough.
        if alone.texts <= batched.texts {
            let drawn = generate(seed).run()?.completions;
            drawn.iter().for_each(|completion| alone.add(case, "itself", completion));
            all.extend(drawn);
        } else {
            let drawn = generate(seed).n(8.min(n - alone.texts - batched.texts)).run()?.completions;
            drawn.iter().for_each(|completion| batched.add(case, "batch", completion));
            all.extend(drawn);
        }
    }
    while beams.texts < n.div_ceil(8) {
        let search = BeamSearch::new(4)?;
        // Another beginning, or it would be the same text.
        let prompt = format!("{}{}", "\n".repeat(beams.texts), case.prompt);
        let found =
            model.generate(prompt).with(control.clone()).search(search).n(4).max_new_tokens(most).run()?;
        found.completions.iter().for_each(|completion| beams.add(case, "beams", completion));
    }
    for (how, tally) in [("one by one", alone), ("in batches", batched), ("by beams", beams)] {
        let Tally { texts, valid, cut, longest } = tally;
        println!(
            "{}, {}, {how}: {texts} texts, {valid} valid, {cut} cut off, whitespace of {longest} at most",
            case.kind, case.name
        );
    }
    Ok(all)
}

/// The time of each mask, where texts are followed again.
fn masks(control: &GrammarControl, vocab: i64, all: &[Completion]) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    for completion in all {
        let mut least: Vec<Duration> = vec![Duration::MAX; completion.ids.len()];
        for _ in 0..3 {
            let mut state = control.start(&[vec![0]])?;
            for (&id, least) in completion.ids.iter().zip(&mut least) {
                let logits = Tensor::f_zeros([1, vocab], (Kind::Float, Device::Cpu))?;
                let begin = Instant::now();
                let _ = control.score(&mut state, logits)?;
                *least = begin.elapsed().min(*least);
                control.advance(&mut state, &[id])?;
            }
        }
        times.extend(least);
    }
    times.sort_unstable();
    Ok(times)
}

/// The time of a step of one row without a grammar.
fn step(model: &TextModel) -> Result<Duration> {
    const TOKENS: usize = 48;
    let mut times = Vec::new();
    for _ in 0..5 {
        let run = model.generate("A subscriber of the paper:\n").eos([]).max_new_tokens(TOKENS).run()?;
        times.push(run.decode.div_f64((TOKENS - 1) as f64));
    }
    times.sort_unstable();
    Ok(times[2])
}

fn jump_forward(model: &TextModel, pairs: usize) -> Result<()> {
    let grammar = Grammar::json_schema(&subscriber())?;
    let control = GrammarControl::new(&grammar, &model.vocabulary()?)?;
    let mut seed = 0;
    let mut texts = [Vec::new(), Vec::new()];
    let mut run = |jump: bool| {
        // Four runs, of two ways, of one text.
        let of = seed >> 2;
        seed += 1;
        let generate = model.generate("A subscriber of the paper, as JSON:\n").sample(of).max_new_tokens(200);
        let ran = generate.with(control.clone().jump_forward(jump)).run()?;
        texts[usize::from(jump)].push((of, ran.completions[0].ids.clone()));
        Ok(())
    };
    let (ratio, low, high) =
        estimate(&ratios(pairs, &mut run)?.iter().map(|r| r.recip()).collect::<Vec<_>>());
    let same = texts[0].iter().zip(&texts[1]).filter(|(one, other)| one == other).count();
    println!(
        "jump-forward on JSON, {pairs} times ABBA: {ratio:.2} times as fast, 95 % interval {low:.2} – {high:.2}; \
         {same} of {} texts the same, token by token (rounding of bf16 moves some)",
        texts[0].len()
    );
    Ok(())
}

fn run() -> Result<()> {
    let options = options()?;
    let directory =
        options.model.map(Into::into).or_else(|| models::smollm2().map(|folder| folder.join("hf")));
    let directory = directory
        .ok_or_else(|| Error::value("--model", "a directory, or `cargo xtask setup` before", "none"))?;
    let model = TextModel::open(&directory, Placement::new(Device::Cpu, kind(&options.dtype)?))?;
    let vocab = model.lm().spec().vocab;
    let vocabulary = model.vocabulary()?;
    let cases: Vec<Case> = cases()?
        .into_iter()
        .filter(|case| options.kind.as_deref().is_none_or(|kind| kind == case.kind))
        .collect();
    let mut out = match &options.texts {
        Some(path) => Some(std::fs::File::create(path).map_err(|source| Error::io(path, source))?),
        None => None,
    };
    let mut times = Vec::new();
    for case in &cases {
        let of_kind = cases.iter().filter(|other| other.kind == case.kind).count();
        let begin = Instant::now();
        let control = GrammarControl::new(&case.grammar, &vocabulary)?;
        let compiled = begin.elapsed();
        let all = draw(&model, case, &control, options.count.div_ceil(of_kind), options.most)?;
        let of_case = masks(&control, vocab, &all)?;
        if !of_case.is_empty() {
            println!("  compiled in {compiled:.1?}; {} masks: {}", of_case.len(), quantiles(&of_case));
        }
        times.extend(of_case);
        if let (Some(out), Some(path)) = (&mut out, &options.texts) {
            for completion in &all {
                let line = json!({"kind": case.kind, "source": case.source, "text": completion.text});
                writeln!(out, "{line}").map_err(|source| Error::io(path, source))?;
            }
        }
    }
    times.sort_unstable();
    if !times.is_empty() {
        let mean = times.iter().sum::<Duration>().div_f64(times.len() as f64);
        let step = step(&model)?;
        println!(
            "{} masks over {vocab} tokens: {}; mean {mean:.1?}, {:.2} % of a step of {step:.1?}",
            times.len(),
            quantiles(&times),
            100.0 * mean.as_secs_f64() / step.as_secs_f64()
        );
    }
    if options.pairs > 0 {
        jump_forward(&model, options.pairs)?;
    }
    Ok(())
}

/// Of sorted times.
fn quantiles(times: &[Duration]) -> String {
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    format!("p50 {:.1?}, p99 {:.1?}, at most {:.1?}", at(0.5), at(0.99), at(1.0))
}

fn main() -> ExitCode {
    benches::exit(run())
}
