//! Images with PyTorch's generator are those of diffusers: `benches/reference/pipeline_fixtures.py`.

use std::path::Path;

use controlgen_core::Placement;
use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_diffusion::pipelines::{
    ClassConditional, DdpmPipeline, ImageToImage, Images, Inpainting, Prompts, Run, Seeds, TextToImage,
};
use serde_json::Value;
use tch::Tensor;

use super::{directory, distance, fixtures};

/// The most that a number of a latent or a pixel may be apart.
const TOLERANCE: f64 = 1e-3;

fn integers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()
}

/// A string, or several.
fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::Array(texts) => texts.iter().map(|text| text.as_str().unwrap()).collect(),
        text => vec![text.as_str().unwrap()],
    }
}

fn run(case: &Value) -> Run<'static> {
    let seeds = match (&case["seed"], &case["seeds"]) {
        (Value::Null, seeds) => Seeds::TorchEach(integers(seeds).iter().map(|&seed| seed as u64).collect()),
        (seed, _) => Seeds::Torch(seed.as_u64().unwrap()),
    };
    let mut run = Run::new().seeds(seeds).steps(case["steps"].as_u64().unwrap() as usize);
    if let Some(scale) = case["scale"].as_f64() {
        run = run.guidance_scale(scale);
    }
    if let Some(eta) = case["eta"].as_f64() {
        run = run.eta(eta);
    }
    if !case["size"].is_null() {
        let size = integers(&case["size"]);
        run = run.size(size[0], size[1]);
    }
    run
}

fn prompts(case: &Value) -> Prompts {
    let mut prompts =
        Prompts::new(texts(&case["prompt"])).images(case["images"].as_u64().unwrap_or(1) as usize);
    match &case["negative"] {
        Value::Null => {}
        Value::String(text) => prompts = prompts.negative(text),
        several => prompts = prompts.negatives(texts(several)),
    }
    if !case["original_size"].is_null() {
        let (size, crop) = (integers(&case["original_size"]), integers(&case["crop"]));
        prompts = prompts.original_size(size[0], size[1]).crop(crop[0], crop[1]);
    }
    prompts
}

/// Every case of a pipeline; `make` runs one of the directory that it is given.
fn check(name: &str, make: impl Fn(&Value, &Path, &dyn Fn(&str) -> Tensor) -> Images) {
    let cases: Value =
        serde_json::from_str(&std::fs::read_to_string(fixtures(name).join("cases.json")).unwrap()).unwrap();
    let truth = Safetensors::open(fixtures(name).join("cases.safetensors")).unwrap();
    let load = |tensor: &str| truth.load(tensor).unwrap().unwrap();
    for (case, request) in cases.as_object().unwrap() {
        let folder = directory(name);
        if let Some(scheduler) = request["scheduler"].as_str() {
            let schedulers = folder.path().join("scheduler");
            let own = schedulers.join("scheduler_config.json");
            std::fs::copy(schedulers.join(format!("{scheduler}.json")), own).unwrap();
        }
        let images = make(request, folder.path(), &load);
        assert_eq!(images.finished as i64, images.latents.size()[0]);
        let mut compared = 0;
        for (what, found) in [("latents", &images.latents), ("pixels", images.pixels.as_ref().unwrap())] {
            if let Some(expected) = truth.load(&format!("{case}.{what}")).unwrap() {
                let d = distance(found, &expected);
                println!(
                    "{name}.{case}: {what} {d:.1e} apart, of {:.1}",
                    expected.abs().max().double_value(&[])
                );
                assert!(d <= TOLERANCE, "{name}.{case}: {what} are {d} apart");
                compared += 1;
            }
        }
        assert!(compared > 0, "{name}.{case}");
    }
}

fn check_text_to_image(name: &str) {
    check(name, |case, folder, load| {
        let pipeline = TextToImage::open(folder, Placement::CPU).unwrap();
        let strength = case["strength"].as_f64().unwrap_or(1.0);
        match case["how"].as_str().unwrap() {
            "text" => pipeline.run(prompts(case), run(case)),
            "image" => {
                let from = ImageToImage { image: load("image"), strength };
                pipeline.image_to_image(prompts(case), &from, run(case))
            }
            _ => {
                let from = Inpainting { image: load("image"), mask: load("mask"), strength };
                pipeline.inpaint(prompts(case), &from, run(case))
            }
        }
        .unwrap()
    });
}

#[test]
fn stable_diffusion_is_that_of_diffusers() {
    check_text_to_image("stable_diffusion");
}

#[test]
fn a_denoiser_of_inpainting_is_that_of_diffusers() {
    check_text_to_image("inpainting");
}

#[test]
fn stable_diffusion_xl_is_that_of_diffusers() {
    check_text_to_image("xl");
}

#[test]
fn ddpm_is_that_of_diffusers() {
    check("ddpm", |case, folder, _| {
        let pipeline = DdpmPipeline::open(folder, Placement::CPU).unwrap();
        pipeline.run(case["images"].as_u64().unwrap() as usize, run(case)).unwrap()
    });
}

#[test]
fn dit_is_that_of_diffusers() {
    check("dit", |case, folder, _| {
        let pipeline = ClassConditional::open(folder, Placement::CPU).unwrap();
        assert_eq!((pipeline.class("Tinca tinca").unwrap(), pipeline.class("cock").unwrap()), (3, 7));
        pipeline.run(&integers(&case["classes"]), run(case)).unwrap()
    });
}
