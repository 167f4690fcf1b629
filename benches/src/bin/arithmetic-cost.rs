//! What an arithmetic of three terms over one model costs: forward calls a step, and time against three runs.
//!
//! `cargo run --release -p benches --bin arithmetic-cost -- [FOURS [TOKENS]]`: `a - 0.6 * b + c` on SmolLM2, b the model after an
//! instruction and c another text in the prompt's place, 32 greedy tokens and the prompts; against the same model run on
//! the three texts, one after the other. Times are taken side by side (`paired`).

use std::process::ExitCode;

use benches::{models, paired};
use controlgen_core::testing::CountingLm;
use controlgen_core::{Error, LanguageModel, Pass, Result, TokenControls};
use controlgen_text::arithmetic::{ModelArithmetic, Term};
use controlgen_text::search::{Choice, Search, Task};
use controlgen_text::tokenizer::{Special, Tokenizer};

const PROMPT: &str = "The film begins with a long drive along the coast, and";
const INSTRUCTION: &str = "A dull and careless review of a film.\n\n";
const INSTEAD: &str = "A warm and thoughtful review of a film.\n\nThe film";

fn run(lm: &dyn LanguageModel, prompt: &[i64], max_new_tokens: usize) -> Result<()> {
    let (prompts, controls, pass) = ([prompt.to_vec()], TokenControls::new(), Pass::default());
    let task = Task { lm, prompts: &prompts, controls: &controls, pass, max_new_tokens, eos: &[], n: 1 };
    Choice::Greedy.run(&task, &mut ()).map(drop)
}

fn measure() -> Result<()> {
    let number = |at: usize, unsaid: usize| match std::env::args().nth(at) {
        None => Ok(unsaid),
        Some(word) => word.parse().map_err(|_| Error::value("FOURS and TOKENS", "numbers", word)),
    };
    let (fours, tokens) = (number(1, 12)?, number(2, 32)?);
    let Some(folder) = models::smollm2() else {
        return Err(Error::unsupported("arithmetic-cost without SmolLM2", "after `cargo xtask setup`"));
    };
    let tokenizer = Tokenizer::open(folder.join("hf"))?;
    let encode = |text: &str| tokenizer.encode(text, Special::Add);
    let (prompt, instruction, instead) = (encode(PROMPT)?, encode(INSTRUCTION)?, encode(INSTEAD)?);
    let texts = [prompt.clone(), [&instruction[..], &prompt].concat(), instead.clone()];
    for dtype in ["f32", "bf16"] {
        let lm = models::open(&folder.join("hf"), dtype)?;
        let counting = CountingLm::new(lm.handle());
        let sum = |lm: Box<dyn LanguageModel>| {
            let a = Term::new(lm);
            ModelArithmetic::new(&a - 0.6 * a.after(&instruction[..]) + a.instead(&instead[..]))
        };
        run(&sum(counting.handle())?, &prompt, tokens)?;
        let calls = counting.calls().len();
        println!("{dtype}: {calls} forward calls for a prompt and {} steps", tokens.saturating_sub(1));
        let sum = sum(lm.handle())?;
        let ratios = paired::ratios(fours, |second| {
            if second {
                run(&sum, &prompt, tokens)
            } else {
                texts.iter().try_for_each(|text| run(&*lm, text, tokens))
            }
        })?;
        let (median, low, high) = paired::estimate(&ratios);
        println!("{dtype}: the arithmetic over three runs: {median:.3} ({low:.3} to {high:.3})");
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(measure())
}
