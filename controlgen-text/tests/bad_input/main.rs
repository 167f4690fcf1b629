//! Language models under bad input: a typed error that says what was expected and found, never a panic, never an
//! allocation that the input does not call for.
#![allow(clippy::unwrap_used, clippy::panic)]

mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod generation;
mod pass;
mod support;
