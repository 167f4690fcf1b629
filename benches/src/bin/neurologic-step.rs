//! What a step of NeuroLogic decoding costs: with ten clauses against one, and against plain beams.
//!
//! `cargo run --release -p benches --bin neurologic-step -- [FOURS]`: with 20 beams, on SmolLM2 in f32. Times are taken
//! side by side (`paired`); a run is a prompt of four tokens and six steps.

use std::process::ExitCode;
use std::time::Instant;

use benches::{models, paired};
use controlgen_core::{Error, LanguageModel, Pass, Result, TokenControls};
use controlgen_text::lexical::{Clause, Clauses};
use controlgen_text::search::{BeamSearch, EarlyStopping, NeuroLogic, Search, Task};
use controlgen_text::tokenizer::Tokenizer;
use controlgen_text::words::TokenTrie;

const BEAMS: usize = 20;
const TOKENS: usize = 6;

/// Ten everyday words with their inflections.
const WORDS: [&[&str]; 10] = [
    &["dog", "dogs"],
    &["frisbee", "frisbees"],
    &["catch", "catches", "caught", "catching"],
    &["throw", "throws", "threw", "thrown", "throwing"],
    &["window", "windows"],
    &["bicycle", "bicycles"],
    &["sing", "sings", "sang", "sung", "singing"],
    &["mountain", "mountains"],
    &["apple", "apples"],
    &["doctor", "doctors"],
];

fn run(lm: &dyn LanguageModel, search: &dyn Search, max_new_tokens: usize) -> Result<()> {
    let prompts = [(100..104).collect::<Vec<i64>>()];
    let (pass, controls) = (Pass::default(), TokenControls::new());
    let task = Task { lm, prompts: &prompts, controls: &controls, pass, max_new_tokens, eos: &[], n: 1 };
    search.run(&task, &mut ()).map(drop)
}

fn measure() -> Result<()> {
    let fours = match std::env::args().nth(1) {
        None => 20,
        Some(word) => word.parse().map_err(|_| Error::value("FOURS", "a number", word))?,
    };
    let Some(folder) = models::smollm2() else {
        return Err(Error::unsupported("neurologic-step without SmolLM2", "after `cargo xtask setup`"));
    };
    let lm = models::open(&folder.join("hf"), "f32")?;
    let trie = TokenTrie::new(&Tokenizer::open(folder.join("hf"))?)?;
    let beams = BeamSearch::new(BEAMS)?.early_stopping(EarlyStopping::Exhausted);
    let neurologic = |count: usize| -> Result<NeuroLogic> {
        let clauses = WORDS[..count].iter().map(|word| Clause::any(*word));
        Ok(NeuroLogic::new(beams, Clauses::new(&trie, clauses)?))
    };
    let (one, ten) = (neurologic(1)?, neurologic(10)?);
    let searches: [(&str, &dyn Search); 3] =
        [("plain beams", &beams), ("1 clause", &one), ("10 clauses", &ten)];
    for (name, search) in searches {
        run(&*lm, search, TOKENS)?;
        let begin = Instant::now();
        run(&*lm, search, TOKENS)?;
        println!("{name}: {:.1} ms a run of {TOKENS} tokens", begin.elapsed().as_secs_f64() * 1e3);
    }
    for (name, one, other) in [
        ("10 clauses over 1", searches[1].1, searches[2].1),
        ("10 clauses over plain beams", searches[0].1, searches[2].1),
    ] {
        let ratios = paired::ratios(fours, |second| run(&*lm, if second { other } else { one }, TOKENS))?;
        let (median, low, high) = paired::estimate(&ratios);
        println!("{name}: {median:.3} ({low:.3} to {high:.3})");
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(measure())
}
