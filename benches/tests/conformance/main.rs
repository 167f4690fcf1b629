//! The binary `conformance` as its users meet it: against transformers' figures on the fixtures of controlgen-text
//! (`benches/reference/text_fixtures.py`), and against what nobody should give it.
//!
//! Files are written and read with the `safetensors` crate, not with our own reader and writer.

#![allow(clippy::unwrap_used, clippy::panic)]

mod clip;
mod forward;
mod generate;
mod latent;
mod refusals;
mod schedule;
mod support;
mod text_to_image;
