//! Beam search against transformers, diverse beam search against the paper, and both against enumeration.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod batch;
mod exact;
mod reference;
mod texts;
#[path = "../common/told.rs"]
mod told;

use std::path::{Path, PathBuf};

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, LanguageModel, Pass, TokenControls};
use controlgen_text::search::{self, BeamSearch, DiverseBeamSearch, Finish, Hypothesis, Listener, Task};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The token that ends what table models say.
const EOS: i64 = 1;

/// A table model of `vocab` tokens.
fn table(vocab: i64, seed: u64) -> TableLm {
    TableLm::new(&TableLmConfig { vocab, seed, scale: 1.3, ..TableLmConfig::default() }).unwrap()
}

/// A task of one completion, four tokens at most.
fn task<'a>(lm: &'a dyn LanguageModel, prompts: &'a [Vec<i64>], controls: &'a TokenControls) -> Task<'a> {
    Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: 4, eos: &[EOS], n: 1 }
}

/// The whole continuation, the token that ended it included.
fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// A search, whichever it is.
#[derive(Clone, Copy, Debug)]
enum Search {
    Beam(BeamSearch),
    Diverse(DiverseBeamSearch),
}

impl Search {
    fn beams(num_beams: usize) -> Self {
        Self::Beam(BeamSearch::new(num_beams).unwrap())
    }

    fn groups(num_beams: usize, groups: usize, diversity_penalty: f64) -> Self {
        let search = BeamSearch::new(num_beams).unwrap();
        Self::Diverse(DiverseBeamSearch::new(search, groups, diversity_penalty).unwrap())
    }

    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>, Error> {
        match self {
            Self::Beam(search) => search::Search::run(search, task, listener),
            Self::Diverse(search) => search::Search::run(search, task, listener),
        }
    }
}
