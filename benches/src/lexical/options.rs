//! The command line.

use std::path::PathBuf;

use controlgen_core::{Error, Result};

use super::{METHODS, Method};
use crate::number;
use crate::table::chosen;

/// What the command takes.
pub const USAGE: &str = "\
lexical-table [--methods NAME,NAME… | all] [--sets N] [--out RECORDS.jsonl] [--markdown TABLE.md] [--plot PLOT.svg]
              [--prompt TEXT] [--tokens N] [--beams N] [--seed S] [--dtype f32|bf16] [--model DIRECTORY] [--concepts SETS.json]
    One text a concept set by each method, all after one prompt that does not hold the words; then the table of count,
    percent, perplexity and so on. Every text is appended to RECORDS.jsonl as it comes: what is there is not made again,
    so a run that was ended goes on, and methods can be added. Other settings need another file. The judge is the same model
    in f32, whatever the texts are made in.";

/// What any words may follow, in connected text.
const PROMPT: &str = "Once upon a time,";

pub struct Options {
    pub methods: Vec<&'static Method>,
    pub sets: Option<usize>,
    pub out: PathBuf,
    pub markdown: Option<PathBuf>,
    pub plot: Option<PathBuf>,
    pub prompt: String,
    pub tokens: usize,
    pub beams: usize,
    pub seed: u64,
    pub dtype: String,
    pub model: PathBuf,
    pub concepts: PathBuf,
}

impl Options {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let mut options = Self {
            methods: METHODS.iter().collect(),
            sets: None,
            out: "lexical-table.jsonl".into(),
            markdown: None,
            plot: None,
            prompt: PROMPT.into(),
            tokens: 32,
            beams: 20,
            seed: 0,
            dtype: "f32".into(),
            model: here.join("../.controlgen/models/smollm2-135m-instruct/hf"),
            concepts: here.join("data/concept_sets.json"),
        };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))
            };
            match argument.as_str() {
                "--methods" => options.methods = chosen(&value()?, METHODS, |method| method.name)?,
                "--sets" => options.sets = Some(number(&argument, &value()?)?),
                "--out" => options.out = value()?.into(),
                "--markdown" => options.markdown = Some(value()?.into()),
                "--plot" => options.plot = Some(value()?.into()),
                "--prompt" => options.prompt = value()?.replace("\\n", "\n"),
                "--tokens" => options.tokens = number(&argument, &value()?)?,
                "--beams" => options.beams = number(&argument, &value()?)?,
                "--seed" => options.seed = number(&argument, &value()?)?,
                "--dtype" => options.dtype = value()?,
                "--model" => options.model = value()?.into(),
                "--concepts" => options.concepts = value()?.into(),
                other => return Err(Error::value("argument", format!("one of\n{USAGE}"), other)),
            }
        }
        Ok(options)
    }
}
