//! Sentence embeddings of 200 texts by all-MiniLM-L6-v2 beside those of transformers: the least cosine.
//!
//! `sentence-parity [MODEL_DIR]`; `cargo xtask setup --models` fetches the model, and
//! `benches/reference/sentence_truth.py` made the truth. Below 0.9999 it fails.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Error, Placement, Result};
use controlgen_text::SentenceEncoder;
use serde::Deserialize;
use tch::{Kind, Tensor};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.controlgen/models/all-minilm-l6-v2");
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data");
const LEAST: f64 = 0.9999;

#[derive(Deserialize)]
struct ConceptSets {
    /// Words, each in its forms.
    sets: Vec<Vec<Vec<String>>>,
}

/// Text i lists the sets i, i + 1, …, 1 + (7 i mod 60) of them.
fn texts() -> Result<Vec<String>> {
    let path = Path::new(DATA).join("concept_sets.json");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
    let ConceptSets { sets } = serde_json::from_str(&text).map_err(|error| Error::format(&path, error))?;
    let plain = |set: &Vec<Vec<String>>| -> String {
        let words: Vec<&str> = set.iter().filter_map(|forms| forms.first()).map(String::as_str).collect();
        words.join(", ")
    };
    let listed: Vec<String> = sets.iter().map(plain).collect();
    let text = |i: usize| {
        let sets = listed.iter().cycle().skip(i).take(1 + 7 * i % 60).map(String::as_str);
        sets.collect::<Vec<_>>().join(". ")
    };
    Ok((0..listed.len()).map(text).collect())
}

/// The committed vectors, f64 `[200, D]`.
fn truth() -> Result<Tensor> {
    let file = Safetensors::open(Path::new(DATA).join("sentence_embeddings.safetensors"))?;
    let found = file.load("embeddings")?.ok_or_else(|| Error::value("truth", "embeddings", "nothing"))?;
    Ok(found.f_to_kind(Kind::Double)?)
}

fn run(arguments: &[String]) -> Result<()> {
    let model = match arguments {
        [] => PathBuf::from(MODEL),
        [directory] => PathBuf::from(directory),
        _ => return Err(Error::value("arguments", "[MODEL_DIR]", arguments.join(" "))),
    };
    let encoder = SentenceEncoder::open(model, Placement::CPU)?;
    let texts = texts()?;
    let started = Instant::now();
    let found = encoder.embed(&texts)?.f_to_kind(Kind::Double)?;
    let seconds = started.elapsed().as_secs_f64();
    let cosines = Tensor::f_cosine_similarity(&found, &truth()?, 1, 1e-12)?;
    let (least, mean) =
        (cosines.f_min()?.f_double_value(&[])?, cosines.f_mean(None::<Kind>)?.f_double_value(&[])?);
    println!("{} texts in {seconds:.1} s: least cosine {least:.7}, mean {mean:.7}", texts.len());
    if least < LEAST {
        return Err(Error::value("least cosine", format!("at least {LEAST}"), least));
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    benches::exit(run(&arguments))
}
