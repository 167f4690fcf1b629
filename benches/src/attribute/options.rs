//! The command line.

use std::path::{Path, PathBuf};

use controlgen_core::{Error, Result};

use super::{METHODS, Method};
use crate::number;
use crate::sentiment::heads_folder;
use crate::table::chosen;

/// What the command takes.
pub const USAGE: &str = "\
attribute-table [--methods NAME,NAME… | all] [--rounds N] [--out RECORDS.jsonl] [--markdown TABLE.md] [--plot PLOT.svg]
                [--tokens N] [--seed S] [--model DIRECTORY] [--prompts PROMPTS.txt] [--heads FOLDER]
    In each round a positive and a negative text of each prompt by each method; then the table of how many of them the judge
    finds to be so, of perplexity and so on. Every text is appended to RECORDS.jsonl as it comes: what is there is not made
    again, so a run that was ended goes on, and methods and rounds can be added. Other settings need another file.";

pub struct Options {
    pub methods: Vec<&'static Method>,
    pub rounds: usize,
    pub out: PathBuf,
    pub markdown: Option<PathBuf>,
    pub plot: Option<PathBuf>,
    pub tokens: usize,
    pub seed: u64,
    pub model: PathBuf,
    pub prompts: PathBuf,
    pub heads: PathBuf,
}

impl Options {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let mut options = Self {
            methods: METHODS.iter().collect(),
            rounds: 7,
            out: "attribute-table.jsonl".into(),
            markdown: None,
            plot: None,
            tokens: 20,
            seed: 0,
            model: here.join("../.controlgen/models/smollm2-135m-instruct/hf"),
            prompts: here.join("data/neutral_prompts.txt"),
            heads: heads_folder(),
        };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))
            };
            match argument.as_str() {
                "--methods" => options.methods = chosen(&value()?, METHODS, |method| method.name)?,
                "--rounds" => options.rounds = number(&argument, &value()?)?,
                "--out" => options.out = value()?.into(),
                "--markdown" => options.markdown = Some(value()?.into()),
                "--plot" => options.plot = Some(value()?.into()),
                "--tokens" => options.tokens = number(&argument, &value()?)?,
                "--seed" => options.seed = number(&argument, &value()?)?,
                "--model" => options.model = value()?.into(),
                "--prompts" => options.prompts = value()?.into(),
                "--heads" => options.heads = value()?.into(),
                other => return Err(Error::value("argument", format!("one of\n{USAGE}"), other)),
            }
        }
        Ok(options)
    }
}

/// The prompts of a file, one a line.
pub fn prompts(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let prompts: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if prompts.is_empty() {
        return Err(Error::format(path, "expected a prompt a line, found none"));
    }
    Ok(prompts)
}
