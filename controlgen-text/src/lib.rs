//! Controllable generation of text: language models, tokenizers, decoding and controls over the next token.

pub mod models;
mod score;

pub use score::{Scored, score_completions, score_text};
