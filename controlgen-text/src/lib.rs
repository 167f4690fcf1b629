//! Controllable generation of text: language models, tokenizers, decoding and controls over the next token.

pub mod controls;
pub mod sample;
