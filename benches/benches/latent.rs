//! A step of diffusion transformers, encoding and decoding by autoencoders, as small as those of the tests: what they cost
//! beside their products. `vae-tiles` measures an autoencoder of full size.

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::testing::bench::bench_denoiser;
use controlgen_core::{Condition, Error, Placement, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::{open_autoencoder, open_denoiser};
use criterion::Criterion;
use tch::Tensor;

fn run() -> Result<()> {
    let mut c = Criterion::default().sample_size(20).configure_from_args();
    let _no_gradients = tch::no_grad_guard();
    let fixtures = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../controlgen-diffusion/tests/fixtures"));
    for name in ["dit", "dit_old"] {
        let model = open_denoiser(&fixtures.join(name), Predicts::EPSILON, Placement::CPU)?;
        bench_denoiser(&mut c, name, &*model, &[Condition::Class(1), Condition::Null])?;
    }
    for name in ["vae", "vae_flux"] {
        let model = open_autoencoder(&fixtures.join(name), Placement::CPU)?;
        let cases = Safetensors::open(fixtures.join(name).join("cases.safetensors"))?;
        let load = |what: &str| -> Result<Tensor> {
            cases.load(what)?.ok_or_else(|| Error::value("cases", format!("`{what}`"), "none of this name"))
        };
        let (latents, images) = (load("latents")?, load("images")?);
        drop(model.decode(&latents)?);
        drop(model.encode(&images)?);
        let mut group = c.benchmark_group(name);
        group.bench_function("decode", |b| b.iter(|| black_box(model.decode(&latents))));
        group.bench_function("encode", |b| b.iter(|| black_box(model.encode(&images))));
        group.finish();
    }
    c.final_summary();
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
