//! What every denoiser keeps: gradients at x, rows one by one, handles, refusals, sites.

use controlgen_core::testing::contract;
use controlgen_core::{Condition, Placement};

use crate::support::{Case, MODELS, open};

/// Conditions as they are for the size that the model was made for: 8 × 8.
fn fitted(condition: Condition) -> Condition {
    match condition {
        Condition::Features(features) => {
            let fit = |(name, value): (String, tch::Tensor)| match name.as_str() {
                "concat" => (name, value.narrow(2, 0, 8)),
                _ => (name, value),
            };
            Condition::Features(features.into_iter().map(fit).collect())
        }
        other => other,
    }
}

#[test]
fn unets_keep_the_contract() {
    // The contract wants conditions that differ, of which DDPM's network knows none.
    for (name, learned) in MODELS.into_iter().filter(|model| model.0 != "unet_ddpm") {
        let model = open(name, learned, Placement::CPU);
        let conditions: Vec<Condition> =
            Case::of(name, &*model).conditions().into_iter().map(fitted).collect();
        if let Err(violation) = contract::denoiser(&*model, &conditions, &[7.0, 803.0]) {
            panic!("{name}: {violation}");
        }
    }
}
