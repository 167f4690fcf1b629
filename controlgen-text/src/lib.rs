//! Controllable generation of text: language models, tokenizers, decoding and controls over the next token.

pub mod chat;
#[cfg(feature = "hub")]
pub mod hub;
pub mod tokenizer;
