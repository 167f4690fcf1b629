//! Structured output: texts of a grammar, under every search; the same with and without jump-forward; what is refused.
//!
//! The model is a table, so that texts are what they are by chance: whatever it says must be a text of the grammar.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod extract;
mod json;
mod tokens;

use std::path::Path;

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_text::TextModel;
use controlgen_text::grammar::{Grammar, GrammarControl};
use controlgen_text::tokenizer::Tokenizer;

/// An ordinary token that ends sequences here, beside the tokenizer's own.
const EOS: i64 = 300;

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer").join(name))
        .unwrap()
}

/// A table over a tokenizer, with more logits than it has tokens.
fn model_of(name: &str) -> TextModel {
    let tokenizer = tokenizer(name);
    let vocab = tokenizer.vocab_size() + 7;
    let config = TableLmConfig {
        vocab,
        order: 1,
        eos: vec![EOS],
        scale: 2.5,
        context: 4096,
        ..TableLmConfig::default()
    };
    TextModel::new(Box::new(TableLm::new(&config).unwrap()), tokenizer).unwrap()
}

fn model() -> TextModel {
    model_of("byte_level")
}

fn compiled(model: &TextModel, grammar: &Grammar) -> GrammarControl {
    GrammarControl::new(grammar, &model.vocabulary().unwrap()).unwrap()
}
