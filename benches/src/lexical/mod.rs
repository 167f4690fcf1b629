//! The lexical table: how many of the words wanted of a text each method makes a model say, and at what cost to the text.

mod methods;
mod options;
mod record;
mod report;
mod sets;

use std::time::Instant;

use controlgen_core::{Error, Placement, Result, kind};
use controlgen_text::evaluation::{Concept, Judge};
use controlgen_text::{Completion, TextModel};

pub use methods::{Job, METHODS, Method};
use options::Options;
use record::{Record, Settings};
use sets::ConceptSets;

use crate::table::{Chart, Point, Records, model_name, progress};

/// What the command takes.
pub use options::USAGE;

/// Runs what the file of records lacks, and prints the table of what it has.
///
/// # Errors
/// What is wrong with the arguments, the model, the sets or the file; what a method refuses.
pub fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let options = Options::parse(arguments)?;
    let sets = ConceptSets::open(&options.concepts)?;
    let sets = sets.first(options.sets)?;
    let settings = Settings {
        prompt: options.prompt.clone(),
        max_new_tokens: options.tokens,
        model: model_name(&options.model),
        beams: options.beams,
        seed: options.seed,
        dtype: options.dtype.clone(),
    };
    let mut records = Records::<Record>::open(&options.out, &settings)?;
    let wanted: Vec<(&Method, usize)> = options
        .methods
        .iter()
        .flat_map(|method| (0..sets.len()).map(move |set| (*method, set)))
        .filter(|(method, set)| records.find(&record::key(method.name, &sets[*set])).is_none())
        .collect();
    if !wanted.is_empty() {
        let placement = Placement::CPU.with_kind(kind(&options.dtype)?);
        let model = TextModel::open(&options.model, placement)?;
        let trie = model.token_trie()?;
        let judge = match placement {
            Placement::CPU => Judge::new(&model),
            _ => Judge::new(&TextModel::open(&options.model, Placement::CPU)?),
        };
        let bar = progress(wanted.len());
        for (method, set) in wanted {
            bar.set_message(method.name);
            let again = records.iter().find(|record| method.blind && record.method == method.name);
            let record = match again {
                Some(made) => Record { concepts: sets::plain(&sets[set]), ..made.clone() },
                None => {
                    let seed = options.seed.wrapping_add(set as u64);
                    let (tokens, beams) = (options.tokens, options.beams);
                    let concepts = &sets[set];
                    let job = Job { model: &model, trie: &trie, concepts, tokens, beams, seed };
                    complete(&options.prompt, &judge, method, &job)?
                }
            };
            records.append(record)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
    }
    let rows = report::rows(&options.methods, &sets, &records)?;
    let table = report::markdown(&rows, &settings);
    println!("{table}");
    if let Some(path) = &options.markdown {
        std::fs::write(path, &table).map_err(|source| Error::io(path, source))?;
    }
    let Some(path) = &options.plot else { return Ok(()) };
    let points: Vec<Point> = rows
        .iter()
        .map(|row| Point {
            name: row.method.into(),
            perplexity: row.perplexity,
            percent: row.coverage.percent,
        })
        .collect();
    // What is asked for: 97 % at 1.5 times the reference's perplexity.
    let reference = rows.iter().find(|row| row.method == methods::REFERENCE);
    let goal = reference.map(|row| (97.0, 1.5 * row.perplexity));
    Chart { caption: "Words said, and fluency", percent: "texts that say all words, %", goal }
        .draw(path, &points)
}

/// One text, judged. The time is the text's alone.
fn complete(prompt: &str, judge: &Judge, method: &Method, job: &Job<'_>) -> Result<Record> {
    let begin = Instant::now();
    let generate = job.model.generate(prompt).max_new_tokens(job.tokens);
    let generation = (method.make)(job, generate)?.run()?;
    let seconds = begin.elapsed().as_secs_f64();
    let text = best(&generation.completions, job.concepts)?;
    let likelihood = judge.likelihoods(prompt, &[&text])?;
    let likelihood = likelihood.first().copied();
    let (log_prob, tokens) = likelihood.map_or((0.0, 0), |found| (found.log_prob, found.tokens));
    let concepts = sets::plain(job.concepts);
    Ok(Record { method: method.name.into(), concepts, text, log_prob, tokens, seconds })
}

/// Of several completions the one that says most of the words, and of those the likeliest by the token.
fn best(completions: &[Completion], concepts: &[Vec<String>]) -> Result<String> {
    let concepts = concepts.iter().map(Concept::new).collect::<Result<Vec<_>>>()?;
    let rank = |completion: &&Completion| {
        let said = concepts.iter().filter(|concept| concept.is_in(&completion.text)).count();
        let mean = completion.logprobs.iter().sum::<f64>() / completion.logprobs.len().max(1) as f64;
        (said, mean)
    };
    let best = completions.iter().max_by(|a, b| {
        let ((said, mean), (other, than)) = (rank(a), rank(b));
        said.cmp(&other).then(mean.total_cmp(&than))
    });
    Ok(best.map_or_else(String::new, |completion| completion.text.clone()))
}
