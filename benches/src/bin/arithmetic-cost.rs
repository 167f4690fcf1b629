//! What an arithmetic of three terms over one model costs: forward calls a step, and time against three runs.
//!
//! `cargo run --release -p benches --bin arithmetic-cost -- [FOURS [TOKENS]]`: `a - 0.6 * b + c` on SmolLM2, b the model after an
//! instruction and c another text in the prompt's place, 32 greedy tokens and the prompts; against the same model run on
//! the three texts, one after the other. Times are taken side by side (`paired`).

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use benches::{models, paired};
use controlgen_core::{
    Error, LanguageModel, LmInput, LmOutput, LmSpec, Pass, Result, SiteMap, Source, State, TokenControls,
    WeightMap,
};
use controlgen_text::arithmetic::{ModelArithmetic, Term};
use controlgen_text::search::{Choice, Search, Task};
use controlgen_text::tokenizer::{Special, Tokenizer};
use tch::Tensor;

const PROMPT: &str = "The film begins with a long drive along the coast, and";
const INSTRUCTION: &str = "A dull and careless review of a film.\n\n";
const INSTEAD: &str = "A warm and thoughtful review of a film.\n\nThe film";

/// Counts the calls of a model and of its handles.
struct Counting {
    lm: Box<dyn LanguageModel>,
    calls: Arc<AtomicUsize>,
}

impl LanguageModel for Counting {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(Self { lm: self.lm.handle(), calls: Arc::clone(&self.calls) })
    }
    fn spec(&self) -> &LmSpec {
        self.lm.spec()
    }
    fn sites(&self) -> &SiteMap {
        self.lm.sites()
    }
    fn embeddings(&self) -> &Tensor {
        self.lm.embeddings()
    }
    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        self.lm.start(source, pass)
    }
    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.lm.forward(input, state, pass)
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        self.lm.map_weights(f)
    }
}

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
        let counting = Counting { lm: lm.handle(), calls: Arc::default() };
        let calls = Arc::clone(&counting.calls);
        let sum = |lm: Box<dyn LanguageModel>| {
            let a = Term::new(lm);
            ModelArithmetic::new(&a - 0.6 * a.after(&instruction[..]) + a.instead(&instead[..]))
        };
        run(&sum(Box::new(counting))?, &prompt, tokens)?;
        let calls = calls.load(Ordering::Relaxed);
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
