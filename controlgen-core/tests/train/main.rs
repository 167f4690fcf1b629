//! Training: against PyTorch, transformers and diffusers; and interrupted at every point.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod interrupted;
mod parameters;
mod reference;
mod toy;
mod trainer;
