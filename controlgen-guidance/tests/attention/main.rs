//! Controls of attention against explicit maps, on a toy model.
#![allow(clippy::unwrap_used, clippy::panic)]

mod edits;
mod identity;
mod run;
mod toy;
