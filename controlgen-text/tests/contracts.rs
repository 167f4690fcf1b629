//! The contracts of `controlgen_core::testing` on everything of this crate that implements a trait.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{MODELS, folder};
use controlgen_core::Placement;
use controlgen_core::testing::contract;
use controlgen_text::models;

#[test]
fn language_models() {
    for name in MODELS {
        let lm = models::open(&folder(name), Placement::CPU).unwrap();
        contract::language_model(&*lm).unwrap_or_else(|violation| panic!("{name}: {violation}"));
    }
}
