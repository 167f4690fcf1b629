//! UNets: against diffusers, by the contract, and what they refuse.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod contract;
mod parity;
mod support;
mod text_once;
