//! Every control over the next token under every search, at batch 1 and 8: one table of cases.
//!
//! Of each pair it is asked that no token was chosen which the control bans (found by following each completion
//! alone, from its prompt), that what the control promises of texts holds, and that a prompt's completions are the same
//! whether it is alone or one of eight. A pair that does not go together stands in [`SKIPPED`], with its reason.
#![allow(clippy::unwrap_used, clippy::panic)]

mod controls;
mod searches;

use std::path::Path;

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, Result, Rows, TokenControl, TokenControls};
use controlgen_text::arithmetic::Term;
use controlgen_text::search::Finish;
use controlgen_text::tokenizer::{Special, Tokenizer};
use controlgen_text::{Completion, TextModel, TextTerms};
use searches::Way;
use tch::{Kind, Tensor};

/// Prompts of several lengths.
const PROMPTS: [&str; 8] = ["The sky", "a", "We", "In the", "one two", "Oh", "blue sea", "x"];

const NEW_TOKENS: usize = 8;

/// Pairs that do not go together: control, search, why. They are refused, or would not end.
const SKIPPED: [(&str, &str, &str); 0] = [];

/// A table over a tokenizer of 704 tokens: its texts are what they are by chance.
fn model() -> TextModel {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/byte_level");
    let tokenizer = Tokenizer::open(folder).unwrap();
    let vocab = tokenizer.vocab_size();
    TextModel::new(Box::new(table(vocab, 0)), tokenizer).unwrap()
}

fn table(vocab: i64, seed: u64) -> TableLm {
    let config =
        TableLmConfig { vocab, order: 1, eos: vec![EOS], scale: 2.5, seed, ..TableLmConfig::default() };
    TableLm::new(&config).unwrap()
}

/// An ordinary token of the tokenizer that ends sequences here.
const EOS: i64 = 300;

#[test]
fn every_control_under_every_search() {
    tch::set_num_threads(1);
    let model = model();
    let mut ran = 0;
    let mut skipped = 0;
    for case in controls::all(&model) {
        for Way { name: search, make, n } in searches::all() {
            if SKIPPED.iter().any(|&(c, s, _)| (c, s) == (case.name, search)) {
                skipped += 1;
                continue;
            }
            let told = |what: &str, error: &Error| panic!("{} under {search}, {what}: {error}", case.name);
            let run = |prompts: &[&str]| {
                let start = model.generate_batch(prompts.iter().copied());
                let start = start.with(case.stack.clone()).search(make(&model));
                start.n(n).max_new_tokens(NEW_TOKENS).eos([EOS]).run()
            };
            let batch = run(&PROMPTS).unwrap_or_else(|error| told("batch 8", &error)).completions;
            assert!(!batch.is_empty());
            for (i, prompt) in PROMPTS.iter().enumerate() {
                let alone = run(&[prompt]).unwrap_or_else(|error| told("batch 1", &error)).completions;
                let of_batch: Vec<&Completion> = batch.iter().filter(|c| c.prompt == i).collect();
                assert_eq!(alone.len(), of_batch.len(), "{} under {search}, prompt {i}", case.name);
                for (alone, of_batch) in alone.iter().zip(of_batch) {
                    let at = format!("{} under {search}, prompt {i}: {alone:?}", case.name);
                    assert_eq!(alone.ids, of_batch.ids, "{at}");
                    assert!(
                        (alone.score - of_batch.score).abs() <= 1e-4 * alone.score.abs().max(1.0),
                        "{at}"
                    );
                    follow(&model, &case.stack, prompt, alone)
                        .unwrap_or_else(|error| panic!("{at}: {error}"));
                    (case.holds)(prompt, alone).unwrap_or_else(|broken| panic!("{at}: {broken}"));
                }
            }
            ran += 1;
        }
    }
    assert_eq!(skipped, SKIPPED.len(), "a skipped pair is not in the table");
    assert!(ran > 50, "{ran} pairs");
}

/// An arithmetic of models of two calls, a term of which reads another prompt.
#[test]
fn an_arithmetic_under_every_search() {
    tch::set_num_threads(1);
    let model = model();
    let other = Term::new(Box::new(table(model.lm().spec().vocab, 1)));
    let sum = |m: &TextTerms<'_>| Ok(1.2 * m.prompt() - 0.4 * m.instead("no sea")? + 0.5 * &other);
    let sum = model.arithmetic(sum).unwrap();
    for Way { name, make, n } in searches::all() {
        let run = |model: &TextModel, prompts: &[&str]| {
            let start = model.generate_batch(prompts.iter().copied()).search(make(model));
            let done = start.n(n).max_new_tokens(NEW_TOKENS).eos([EOS]).run();
            done.unwrap_or_else(|error| panic!("{name}: {error}")).completions
        };
        let batch = run(&sum, &PROMPTS);
        let own = run(&model, &PROMPTS);
        let ids = |all: &[Completion]| all.iter().map(|c| c.ids.clone()).collect::<Vec<_>>();
        assert_ne!(ids(&batch), ids(&own), "{name}: it does something");
        for (i, prompt) in PROMPTS.iter().enumerate() {
            let alone = run(&sum, &[prompt]);
            let of_batch: Vec<&Completion> = batch.iter().filter(|c| c.prompt == i).collect();
            assert_eq!(alone.len(), of_batch.len(), "{name}, prompt {i}");
            for (alone, of_batch) in alone.iter().zip(of_batch) {
                assert_eq!(alone.ids, of_batch.ids, "{name}, prompt {i}");
                assert!((alone.score - of_batch.score).abs() <= 1e-4 * alone.score.abs().max(1.0), "{name}");
            }
        }
    }
}

/// Follows a completion from its prompt: a token that the control bans is an error.
fn follow(model: &TextModel, stack: &TokenControls, prompt: &str, completion: &Completion) -> Result<()> {
    let prompt = model.tokenizer().encode(prompt, Special::Add)?;
    let mut state = stack.start(std::slice::from_ref(&prompt))?;
    let mut read = prompt;
    let end = match completion.finish {
        Finish::Eos(token) => Some(token),
        _ => None,
    };
    for &token in completion.ids.iter().chain(&end) {
        let scores = stack.score(&mut state, logits(model, &read)?)?;
        let score = scores.f_double_value(&[0, token])?;
        if !score.is_finite() {
            let expected = format!("one that the control allows after {} tokens", read.len());
            return Err(Error::value("token", expected, format!("{token}, of score {score}")));
        }
        stack.advance(&mut state, &[token])?;
        state.reorder(&[0])?;
        read.push(token);
    }
    let log_weight = stack.finish(&state, 0)?;
    if log_weight == f64::NEG_INFINITY {
        return Err(Error::value("log-weight at the end", "more than -infinity", log_weight));
    }
    Ok(())
}

/// What the model says after these tokens, `[1, V]`.
fn logits(model: &TextModel, read: &[i64]) -> Result<Tensor> {
    use controlgen_core::{LmInput, Pass, Source};
    let mut state = model.lm().start(Source::Rows(1), &Pass::default())?;
    let ids = Tensor::from_slice(read).unsqueeze(0);
    let logits = model.lm().forward(LmInput::ids(&ids).last(), &mut state, &Pass::default())?.logits;
    Ok(logits.select(1, -1).to_kind(Kind::Float).contiguous())
}
