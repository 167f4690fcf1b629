//! UNets against diffusers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod parity;
mod support;
