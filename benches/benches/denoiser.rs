//! Steps of small UNets of every family, as small as those of the tests: what a step costs beside its products.
//!
//! `benches/reference/unet_side_by_side.py` measures UNets of millions of parameters, beside diffusers.

use std::path::Path;
use std::process::ExitCode;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::testing::bench::bench_denoiser;
use controlgen_core::{Condition, Placement, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::open_denoiser;
use criterion::Criterion;

/// Fixtures, and the features of their conditions.
const MODELS: [(&str, &[&str]); 4] = [
    ("unet_ddpm", &[]),
    ("unet_sd1", &["encoder_hidden_states"]),
    ("unet_sdxl", &["encoder_hidden_states", "text_embeds", "time_ids"]),
    ("unet_if1", &["encoder_hidden_states"]),
];

fn run() -> Result<()> {
    let mut c = Criterion::default().sample_size(20).configure_from_args();
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../controlgen-diffusion/tests/fixtures"));
    for (name, features) in MODELS {
        let folder = fixtures.join(name);
        let predicts = Predicts { learned_variance: name == "unet_if1", ..Predicts::EPSILON };
        let model = open_denoiser(&folder, predicts, Placement::CPU)?;
        let cases = Safetensors::open(folder.join("cases.safetensors"))?;
        let condition = |row: i64| -> Result<Condition> {
            let mut found = Vec::new();
            for name in features {
                if let Some(value) = cases.load(name)? {
                    found.push(((*name).to_owned(), value.f_get(row)?));
                }
            }
            Ok(if found.is_empty() { Condition::Null } else { Condition::Features(found) })
        };
        bench_denoiser(&mut c, name, &*model, &[condition(0)?, condition(1)?])?;
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
