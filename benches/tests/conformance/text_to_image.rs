//! `conformance text-to-image` of a small Stable Diffusion, against diffusers.

use std::path::{Path, PathBuf};

use controlgen_diffusion::image::{load_image, load_parameters};

use crate::support::read;

fn pipeline() -> PathBuf {
    let fixtures = "../controlgen-diffusion/tests/fixtures/pipelines/stable_diffusion";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(fixtures)
}

fn run(arguments: &[&str]) -> controlgen_core::Result<()> {
    let path = pipeline();
    let arguments = [&["text-to-image", path.to_str().unwrap()], arguments].concat();
    benches::conformance::run(&arguments.iter().map(|&argument| argument.to_owned()).collect::<Vec<_>>())
}

#[test]
fn an_image_is_that_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let (png, latents) = (folder.path().join("cat.png"), folder.path().join("latents.safetensors"));
    let asked = ["--prompt", "a photo of a cat", "--steps", "6", "--guidance-scale", "7.5", "--seed", "42"];
    let files = ["--torch-seed", "--out", png.to_str().unwrap(), "--latents", latents.to_str().unwrap()];
    run(&[&asked[..], &files[..]].concat()).unwrap();
    let cases = read(&pipeline().join("cases.safetensors"));
    let (found, expected) = (&read(&latents)["latents"], &cases["plain.latents"]);
    assert_eq!(found.shape, expected.shape);
    let far =
        found.floats().into_iter().zip(expected.floats()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far <= 1e-3, "{far}");
    let pixels: Vec<f32> = Vec::try_from(load_image(&png, None).unwrap().flatten(0, -1)).unwrap();
    let expected = cases["plain.pixels"].floats();
    assert_eq!(pixels.len(), expected.len());
    let far = pixels.iter().zip(expected).map(|(a, b)| (a - b.clamp(-1.0, 1.0)).abs()).fold(0.0, f32::max);
    assert!(far <= 1.0 / 127.0, "a level at most: {far}");
    let parameters = load_parameters(&png).unwrap().unwrap();
    assert_eq!((parameters.prompt.as_deref(), parameters.seed), (Some("a photo of a cat"), Some(42)));
}

#[test]
fn what_cannot_be_made_is_refused() {
    let (out, prompt) = (["--out", "/absent/cat.png"], ["--prompt", "a cat", "--steps", "1"]);
    let said = |arguments: &[&str]| run(arguments).unwrap_err().to_string();
    assert!(said(&prompt).contains("--out"));
    assert!(said(&out).contains("prompt"));
    let message = said(&[&prompt[..], &out[..]].concat());
    assert!(message.contains("/absent"), "{message}");
    let message = said(&[&prompt[..], &out[..], &["--size", "17x16"]].concat());
    assert!(message.contains("17"), "{message}");
    let message = said(&[&prompt[..], &out[..], &["--sampler", "x"]].concat());
    assert!(message.contains("--sampler"), "{message}");
}
