//! What pipelines refuse, and how they say it.

use std::path::Path;

use controlgen_core::{Error, Placement};
use controlgen_diffusion::pipelines::{
    ClassConditional, DdpmPipeline, ImageToImage, Inpainting, Prompts, Run, Seeds, TextToImage,
};
use controlgen_diffusion::{Ddim, Scheduler};
use tch::{Kind, Tensor, kind::FLOAT_CPU};
use tempfile::TempDir;

use super::directory;

fn open(folder: &TempDir) -> Result<TextToImage, Error> {
    TextToImage::open(folder.path(), Placement::CPU)
}

fn stable_diffusion() -> TextToImage {
    open(&directory("stable_diffusion")).unwrap()
}

fn rewrite(file: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(file, text.replace(from, to)).unwrap();
}

fn message<T>(result: Result<T, Error>) -> String {
    result.err().unwrap().to_string()
}

#[test]
fn unknown_pipelines_name_those_known() {
    let folder = directory("stable_diffusion");
    rewrite(&folder.path().join("model_index.json"), "\"StableDiffusionPipeline\"", "\"FluxPipeline\"");
    let text = message(open(&folder));
    assert!(text.contains("FluxPipeline") && text.contains("StableDiffusionXLPipeline"), "{text}");
    let text = message(DdpmPipeline::open(directory("dit").path(), Placement::CPU));
    assert!(text.contains("DiTPipeline") && text.contains("DDPMPipeline"), "{text}");
    let text = message(ClassConditional::open(directory("ddpm").path(), Placement::CPU));
    assert!(text.contains("`DDPMPipeline`") && text.contains("DiTPipeline"), "{text}");
}

#[test]
fn unknown_schedulers_and_models_name_those_known() {
    let folder = directory("stable_diffusion");
    let file = folder.path().join("scheduler/scheduler_config.json");
    rewrite(&file, "PNDMScheduler", "TimeTravelScheduler");
    let text = message(open(&folder));
    assert!(text.contains("TimeTravelScheduler") && text.contains("DDIMScheduler"), "{text}");
    let folder = directory("stable_diffusion");
    rewrite(&folder.path().join("unet/config.json"), "\"UNet2DConditionModel\"", "\"UNet9DModel\"");
    let text = message(open(&folder));
    assert!(text.contains("UNet9DModel") && text.contains("UNet2DConditionModel"), "{text}");
    let folder = directory("stable_diffusion");
    rewrite(&folder.path().join("vae/config.json"), "\"AutoencoderKL\"", "\"AutoencoderQ\"");
    let text = message(open(&folder));
    assert!(text.contains("AutoencoderQ") && text.contains("AutoencoderKL"), "{text}");
}

#[test]
fn all_missing_components_are_named() {
    let folder = directory("xl");
    std::fs::remove_dir_all(folder.path().join("vae")).unwrap();
    std::fs::remove_dir_all(folder.path().join("text_encoder")).unwrap();
    let Err(Error::Keys { missing, .. }) = open(&folder) else { panic!("missing") };
    assert_eq!(missing, ["vae", "text_encoder"]);
    // A component that the index says is none.
    let folder = directory("stable_diffusion");
    rewrite(&folder.path().join("model_index.json"), "\"UNet2DConditionModel\"", "null");
    let Err(Error::Keys { missing, .. }) = open(&folder) else { panic!("missing") };
    assert_eq!(missing, ["unet"]);
    // But for an autoencoder: without one, the samples are the pixels.
    let folder = directory("stable_diffusion");
    std::fs::remove_dir_all(folder.path().join("vae")).unwrap();
    rewrite(&folder.path().join("model_index.json"), "\"AutoencoderKL\"", "null");
    let Err(Error::Keys { missing, .. }) = open(&folder) else { panic!("missing") };
    assert_eq!(missing, ["vae"]);
    rewrite(&folder.path().join("model_index.json"), "\"vae\": [\n    \"diffusers\"", "\"vae\": [\n    null");
    assert!(open(&folder).unwrap().autoencoder().is_none());
    let nowhere = TextToImage::open("/nowhere", Placement::CPU);
    assert!(matches!(nowhere, Err(Error::Io { .. })));
}

#[test]
fn components_that_do_not_fit_are_refused() {
    let folder = directory("dit");
    let scheduler = || Scheduler::open(folder.path().join("scheduler/scheduler_config.json")).unwrap();
    let ddpm = DdpmPipeline::open(directory("ddpm").path(), Placement::CPU).unwrap();
    let vae = stable_diffusion().autoencoder().unwrap().handle();
    let pipeline = ClassConditional::new(ddpm.denoiser().handle(), scheduler(), Some(vae));
    let text = message(pipeline);
    assert!(text.contains("latent channels") && text.contains('3') && text.contains('4'), "{text}");
}

#[test]
fn sizes_are_multiples() {
    let pipeline = stable_diffusion();
    for (size, what) in [([17, 16], "height"), ([16, 0], "width"), ([16, -4], "width")] {
        let text = message(pipeline.run("a cat", Run::new().size(size[0], size[1])));
        assert!(text.contains(what) && text.contains("multiple of 2"), "{text}");
    }
}

#[test]
fn steps_are_within_training() {
    for steps in [0, 1001] {
        let run = stable_diffusion().run("a cat", Run::new().steps(steps));
        assert!(matches!(run, Err(Error::Value { .. })), "{steps}");
    }
}

#[test]
fn options_that_say_nothing_are_refused() {
    let pipeline = stable_diffusion();
    let text = message(pipeline.run("a cat", Run::new().eta(0.5)));
    assert!(text.contains("eta of PNDMScheduler"), "{text}");
    let run = Run::new().sampler(Ddim::new(0.0).unwrap()).eta(0.5);
    assert!(matches!(pipeline.run("a cat", run), Err(Error::Unsupported { .. })));
    let run = pipeline.run("a cat", Run::new().guidance_scale(f64::NAN));
    assert!(matches!(run, Err(Error::Value { .. })));
    let ddpm = DdpmPipeline::open(directory("ddpm").path(), Placement::CPU).unwrap();
    assert!(matches!(ddpm.run(1, Run::new().guidance_scale(3.0)), Err(Error::Unsupported { .. })));
    assert!(matches!(ddpm.run(0, Run::new()), Err(Error::Value { .. })));
    assert!(matches!(ddpm.run(1, Run::new().batch(0)), Err(Error::Value { .. })));
}

#[test]
fn prompts_and_seeds_are_counted() {
    let pipeline = stable_diffusion();
    let run = || Run::new().steps(2).without_decoding();
    assert!(matches!(pipeline.run(Prompts::new(Vec::<String>::new()), run()), Err(Error::Value { .. })));
    assert!(matches!(pipeline.run(Prompts::new(["a"]).images(0), run()), Err(Error::Value { .. })));
    let uneven = Prompts::new(["a", "b", "c"]).negatives(["x", "y"]);
    assert!(matches!(pipeline.run(uneven, run()), Err(Error::Value { .. })));
    let text = message(pipeline.run("a", run().seeds(Seeds::Each(vec![1, 2]))));
    assert!(text.contains("one an image"), "{text}");
    // One PyTorch generator draws for all images at once.
    let torch = run().seeds(Seeds::Torch(1)).batch(1);
    assert!(matches!(pipeline.run(Prompts::new(["a", "b"]), torch), Err(Error::Unsupported { .. })));
    // The empty prompt is a prompt.
    assert!(pipeline.run("", run()).is_ok());
}

#[test]
fn latents_are_numbers_of_the_right_shape() {
    let pipeline = stable_diffusion();
    let run = |latents: Tensor| pipeline.run("a cat", Run::new().steps(3).latents(latents));
    let text = message(run(Tensor::zeros([2, 4, 8, 8], FLOAT_CPU)));
    assert!(text.contains("[1, 4, 8, 8]") && text.contains("[2, 4, 8, 8]"), "{text}");
    let integers = Tensor::zeros([1, 4, 8, 8], (Kind::Int64, tch::Device::Cpu));
    assert!(matches!(run(integers), Err(Error::Kind { .. })));
    let Err(Error::NotFinite { at, found, .. }) = run(Tensor::full([1, 4, 8, 8], f64::NAN, FLOAT_CPU)) else {
        panic!("a number")
    };
    assert_eq!((at.as_str(), found.as_str()), ("row 0, step 0 of 3", "NaN"));
}

fn image(channels: i64, height: i64) -> Tensor {
    Tensor::zeros([1, channels, height, 16], FLOAT_CPU)
}

#[test]
fn images_and_masks_are_of_the_right_modes_and_sizes() {
    let pipeline = stable_diffusion();
    let run = || Run::new().steps(4).without_decoding();
    let from = |image: Tensor, strength| ImageToImage { image, strength };
    let change = |from: &ImageToImage, run| pipeline.image_to_image("a cat", from, run);
    assert!(matches!(change(&from(image(1, 16), 0.5), run()), Err(Error::Shape { .. })), "gray");
    assert!(matches!(change(&from(image(4, 16), 0.5), run()), Err(Error::Shape { .. })), "with alpha");
    assert!(
        matches!(change(&from(image(3, 16).squeeze(), 0.5), run()), Err(Error::Shape { .. })),
        "no batch"
    );
    assert!(matches!(change(&from(image(3, 17), 0.5), run()), Err(Error::Value { .. })), "no multiple");
    let text = message(change(&from(image(3, 16), 0.5), run().size(16, 32)));
    assert!(text.contains("16 by 16, as the image"), "{text}");
    let levels = image(3, 16).to_kind(Kind::Uint8);
    assert!(matches!(change(&from(levels, 0.5), run()), Err(Error::Kind { .. })));
    assert!(matches!(change(&from(image(3, 16) / 0.0, 0.5), run()), Err(Error::NotFinite { .. })));
    for strength in [0.0, 0.2, 1.1, f64::NAN] {
        let changed = change(&from(image(3, 16), strength), run());
        assert!(matches!(changed, Err(Error::Value { .. })), "{strength}");
    }
    let paint =
        |mask| pipeline.inpaint("a cat", &Inpainting { image: image(3, 16), mask, strength: 1.0 }, run());
    let text = message(paint(image(1, 32)));
    assert!(text.contains("mask") && text.contains("[1, 1, 16, 16]"), "{text}");
    assert!(matches!(paint(image(3, 16)), Err(Error::Shape { .. })), "three channels");
}

#[test]
fn a_denoiser_of_inpainting_needs_a_mask() {
    let pipeline = open(&directory("inpainting")).unwrap();
    let text = message(pipeline.run("a cat", Run::new().steps(2)));
    assert!(text.contains("5 more channels"), "{text}");
    let from = ImageToImage { image: image(3, 16), strength: 0.5 };
    assert!(matches!(
        pipeline.image_to_image("a", &from, Run::new().steps(4)),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn unknown_classes_are_refused() {
    let pipeline = ClassConditional::open(directory("dit").path(), Placement::CPU).unwrap();
    assert!(matches!(pipeline.class("unicorn"), Err(Error::Value { .. })));
    assert!(pipeline.run(&[1001], Run::new().steps(2)).is_err());
    assert!(matches!(pipeline.run(&[], Run::new().steps(2)), Err(Error::Value { .. })));
}

#[test]
fn files_that_cannot_be_written_are_named() {
    let images = stable_diffusion().run("a cat", Run::new().steps(2)).unwrap();
    let text = message(images.save(&["/nowhere/a.png"]));
    assert!(text.contains("/nowhere/"), "{text}");
    assert!(matches!(images.save(&["a.png", "b.png"]), Err(Error::Value { .. })));
    let raw = stable_diffusion().run("a cat", Run::new().steps(2).without_decoding()).unwrap();
    assert!(matches!(raw.save(&["a.png"]), Err(Error::Value { .. })));
}
