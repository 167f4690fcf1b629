//! An adapter that peft wrote for a UNet of diffusers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Condition, Controls, Pass, Placement};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::open_denoiser;
use controlgen_peft::open;

#[test]
fn predictions_under_it_are_pefts() {
    let _no_gradients = tch::no_grad_guard();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let base = tests.join("../../controlgen-diffusion/tests/fixtures/unet_sd1");
    let model = open_denoiser(&base, Predicts::EPSILON, Placement::CPU).unwrap();
    let folder = tests.join("fixtures/lora_unet");
    let adapter = open(&folder, model.sites()).unwrap();
    // Two attentions of each of three transformers and of the middle's, four products each, two factors.
    assert_eq!(adapter.parameters().len(), 4 * 2 * 4 * 2);
    let controls = Controls::bind(model.sites(), vec![adapter.handle()]).unwrap();

    let cases = Safetensors::open(base.join("cases.safetensors")).unwrap();
    let get = |name: &str| cases.load(name).unwrap().unwrap();
    let text = get("encoder_hidden_states");
    let told = |row| Condition::Features(vec![("encoder_hidden_states".into(), text.get(row))]);
    let predict = |pass: &Pass<'_>| {
        let prepared = model.prepare(&[told(0), told(1)], pass).unwrap();
        model.predict(&get("sample"), &get("timestep"), &prepared, pass).unwrap().value
    };
    let expected =
        Safetensors::open(folder.join("cases.safetensors")).unwrap().load("output").unwrap().unwrap();
    let distance = |found: tch::Tensor| (found - &expected).abs().max().double_value(&[]);
    let under = distance(predict(&Pass::with_controls(&controls)));
    assert!(under <= 2e-5, "{under}");
    assert!(distance(predict(&Pass::default())) > 0.1, "without it, it is another model");
}
