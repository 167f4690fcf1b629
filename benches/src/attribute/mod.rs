//! The attribute table: how often each method makes texts positive, or negative, and at what cost to the text.

mod methods;
mod options;
mod record;
mod report;
mod words;

use std::time::Instant;

use controlgen_core::{Placement, Result};
use controlgen_text::TextModel;
use controlgen_text::classifiers::PrefixDiscriminator;
use controlgen_text::evaluation::Judge;
use tch::{Device, Kind};

pub use methods::{Job, METHODS, Method};
use options::Options;
use record::{Record, Settings, key};

use crate::sentiment::SentimentJudge;
use crate::sentiment::texts::CLASSES;
use crate::table::{Chart, Point, Records, model_name, progress};

/// What the command takes.
pub use options::USAGE;

/// Runs what the file of records lacks, and prints the table of what it has.
///
/// # Errors
/// What is wrong with the arguments, the model, the heads or the file; what a method refuses.
pub fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let options = Options::parse(arguments)?;
    let prompts = options::prompts(&options.prompts)?;
    let settings = Settings {
        max_new_tokens: options.tokens,
        model: model_name(&options.model),
        seed: options.seed,
        prompts: prompts.clone(),
    };
    let mut records = Records::<Record>::open(&options.out, &settings)?;
    // Round by round, so that a run that is ended has texts of every method.
    let mut wanted: Vec<(usize, &Method, &'static str)> = Vec::new();
    for round in 0..options.rounds {
        for &method in &options.methods {
            wanted.extend(CLASSES.map(|target| (round, method, target)));
        }
    }
    wanted.retain(|(round, method, target)| {
        prompts.iter().any(|prompt| records.find(&key(method.name, target, *round, prompt)).is_none())
    });
    if !wanted.is_empty() {
        let model = TextModel::open(&options.model, Placement::new(Device::Cpu, Kind::BFloat16))?;
        let guide = PrefixDiscriminator::open(options.heads.join("guide-prefixes"), model.lm())?;
        let exact = TextModel::open(&options.model, Placement::CPU)?;
        let (fluency, sentiment) = (Judge::new(&exact), SentimentJudge::open(&options.heads, &exact)?);
        let bar = progress(wanted.len() * prompts.len());
        for (round, method, target) in wanted {
            bar.set_message(format!("{} {target}", method.name));
            let seed = options.seed.wrapping_add(2 * round as u64 + u64::from(target == CLASSES[1]));
            let (prompts, tokens) = (&prompts, options.tokens);
            let job = Job { model: &model, guide: &guide, prompts, target, tokens, seed };
            let begin = Instant::now();
            let texts = (method.make)(&job)?;
            let seconds = begin.elapsed().as_secs_f64() / prompts.len() as f64;
            let wholes: Vec<String> =
                prompts.iter().zip(&texts).map(|(p, t)| [p.as_str(), t].concat()).collect();
            let verdicts = sentiment.verdicts(&wholes)?;
            for ((prompt, text), verdict) in prompts.iter().zip(texts).zip(verdicts) {
                let found = fluency.likelihoods(prompt, &[&text])?;
                let (log_prob, tokens) =
                    found.first().map_or((0.0, 0), |found| (found.log_prob, found.tokens));
                let of_target = |p: f64| if target == CLASSES[1] { p } else { 1.0 - p };
                records.append(Record {
                    method: method.name.into(),
                    target: target.into(),
                    round,
                    prompt: prompt.clone(),
                    text,
                    log_prob,
                    tokens,
                    satisfied: of_target(verdict.positive),
                    halves: verdict.halves.map(of_target),
                    seconds,
                })?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
    }
    let rows = report::rows(&options.methods, options.rounds, &records)?;
    let table = report::markdown(&rows, &settings);
    println!("{table}");
    if let Some(path) = &options.markdown {
        std::fs::write(path, &table).map_err(|source| controlgen_core::Error::io(path, source))?;
    }
    let Some(path) = &options.plot else { return Ok(()) };
    let points: Vec<Point> = rows
        .iter()
        .map(|row| Point { name: row.method.into(), perplexity: row.perplexity, percent: row.satisfied })
        .collect();
    // What is asked for: 90 % at 1.5 times the reference's perplexity.
    let reference = rows.iter().find(|row| row.method == methods::REFERENCE);
    let goal = reference.map(|row| (90.0, 1.5 * row.perplexity));
    Chart { caption: "Sentiment as wanted, and fluency", percent: "texts as wanted, %", goal }
        .draw(path, &points)
}
