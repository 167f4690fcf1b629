//! # controlgen-text
//!
//! Controllable generation of text: language models, tokenizers, decoding and controls over the next token.
//!
//! ```no_run
//! use controlgen_core::{Placement, Result};
//! use controlgen_text::TextModel;
//! use controlgen_text::controls::{NoRepeatNgram, Temperature, TopP};
//!
//! fn main() -> Result<()> {
//!     let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
//!     let generation = model
//!         .generate("Once upon a time")
//!         .with(NoRepeatNgram::new(3)?)
//!         .with(Temperature::new(0.8)?)
//!         .with(TopP::new(0.95)?)
//!         .sample(42)
//!         .max_new_tokens(64)
//!         .on_text(|piece| print!("{}", piece.text))
//!         .run()?;
//!     println!("\n{:.1} tokens a second", generation.tokens_per_second());
//!     Ok(())
//! }
//! ```

pub mod arithmetic;
pub mod chat;
pub mod classifiers;
pub mod controls;
pub mod energies;
pub mod evaluation;
mod generate;
#[cfg(feature = "gguf")]
pub mod gguf;
pub mod grammar;
#[cfg(feature = "hub")]
pub mod hub;
pub mod lexical;
pub mod models;
pub mod pplm;
pub mod sample;
mod score;
pub mod search;
mod sentence;
pub mod tokenizer;
pub mod words;

pub use generate::{
    Completion, Generate, Generation, GenerationConfig, Method, OneOrMany, Piece, TextModel, TextTerms,
    WatermarkConfig, WordFeature,
};
pub use score::{Scored, score_completions, score_text};
pub use sentence::{Pooling, SentenceEncoder};
