//! Controllable generation of text: language models, tokenizers, decoding and controls over the next token.

pub mod chat;
pub mod models;
mod score;
pub mod tokenizer;

pub use score::{Scored, score_completions, score_text};
