//! A cascade against diffusers, and what it refuses.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use controlgen_core::progress::CancelToken;
use controlgen_core::{Error, Placement, Result};
use controlgen_diffusion::pipelines::{Cascade, Prompts, Run, Seeds, Upscaler};
use controlgen_diffusion::{EncodedPrompt, PromptEncoder};
use tch::Tensor;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cascade").join(name)
}

fn case(name: &str) -> Tensor {
    let all = Tensor::read_safetensors(fixture("cases.safetensors")).unwrap();
    all.into_iter().find(|(key, _)| key == name).unwrap().1
}

/// Knows four prompts: `0`, `1`, and `no 0`, `no 1`.
struct Given;
impl PromptEncoder for Given {
    fn handle(&self) -> Box<dyn PromptEncoder> {
        Box::new(Self)
    }
    fn encode(&self, prompts: &[&str]) -> Result<Vec<EncodedPrompt>> {
        let one = |prompt: &&str| {
            let states = case(if prompt.starts_with("no") { "negative" } else { "embeds" });
            let row = i64::from(prompt.ends_with('1'));
            let features = vec![("encoder_hidden_states".to_owned(), states.get(row))];
            EncodedPrompt { features, truncated: None }
        };
        Ok(prompts.iter().map(one).collect())
    }
}

fn first() -> Cascade {
    Cascade::open(fixture("first"), Box::new(Given), Placement::CPU).unwrap()
}

fn second() -> Upscaler {
    Upscaler::open(fixture("second"), Placement::CPU).unwrap().with_steps(5)
}

fn prompts() -> Prompts {
    Prompts::new(["0", "1"]).negatives(["no 0", "no 1"])
}

fn run<'a>() -> Run<'a> {
    Run::new().steps(6).seeds(Seeds::Torch(37))
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn two_stages_are_diffusers() {
    let small = first().run(prompts(), run()).unwrap();
    let d = far(&small.latents, &case("small"));
    assert!(d < 1e-3, "the first stage: {d}");
    let cascade = first().with_upscaler(second()).unwrap();
    let large = cascade.share().run(prompts(), run()).unwrap();
    let d = far(&large.latents, &case("large"));
    assert!(d < 1e-3, "both stages: {d}");
    println!("first {:.1e}, both {d:.1e}", far(&small.latents, &case("small")));
    assert_eq!((large.finished, large.pixels.unwrap().size()), (2, vec![2, 3, 16, 16]));
    assert_eq!(large.parameters[1].width, Some(16));
    let other = first().with_upscaler(second().with_level(100).unwrap()).unwrap();
    let other = other.run(prompts(), run()).unwrap();
    assert!(far(&other.latents, &case("large")) > 1e-2, "the level of noise makes a difference");
}

#[test]
fn images_do_not_depend_on_the_batch() {
    let cascade = first().with_upscaler(second()).unwrap();
    let all = cascade.run(prompts(), Run::new().seed(5).steps(4)).unwrap();
    let each = cascade.run(prompts(), Run::new().seed(5).steps(4).batch(1)).unwrap();
    assert!(far(&all.latents, &each.latents) < 1e-4);
}

#[test]
fn a_stopped_cascade_has_images_of_the_last_size() {
    let token = CancelToken::new();
    token.cancel();
    let cascade = first().with_upscaler(second()).unwrap();
    let images = cascade.run(prompts(), run().cancel(&token)).unwrap();
    assert_eq!(images.latents.size(), [2, 3, 16, 16]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    assert!(matches!(second().with_level(1000), Err(Error::Value { .. })));
    let cascade = first().with_upscaler(second()).unwrap();
    let none = cascade.run(prompts(), run().guidance_scale(1.0));
    assert!(matches!(none, Err(Error::Unsupported { .. })));
    let alone = first().with_upscaler(second().with_guidance_scale(1.0)).unwrap();
    alone.run(prompts(), run().guidance_scale(1.0)).unwrap();
    let found = Cascade::open(fixture("second"), Box::new(Given), Placement::CPU);
    assert!(matches!(found, Err(Error::Unsupported { .. })));
    assert!(matches!(Upscaler::open(fixture("first"), Placement::CPU), Err(Error::Unsupported { .. })));
}

#[cfg(feature = "text")]
#[test]
fn prompts_by_t5_are_diffusers() {
    use controlgen_diffusion::prompt::T5Prompt;

    let prompts = T5Prompt::open(fixture("t5"), Placement::CPU).unwrap();
    let cases = Tensor::read_safetensors(fixture("t5/cases.safetensors")).unwrap();
    let expected = &cases.iter().find(|(key, _)| key == "embeds").unwrap().1;
    let long = "a castle on the hill ".repeat(40);
    for prompts in [prompts.handle(), Box::new(prompts)] {
        let found = prompts.encode(&["A Photo of a Cat ", "", &long]).unwrap();
        for (row, one) in (0i64..).zip(&found) {
            assert_eq!(one.features[0].1.size(), [77, 12]);
            let d = far(&one.features[0].1.slice(0, 0, None, 4), &expected.get(row));
            assert!(d < 5e-5, "prompt {row}: {d}");
            assert_eq!(one.truncated.is_some(), row == 2);
        }
        assert!(found[2].truncated.as_ref().is_some_and(|rest| rest.ends_with("on the hill")));
        assert!(matches!(prompts.encode(&[]), Err(Error::Value { .. })));
    }
    let short = T5Prompt::open(fixture("t5"), Placement::CPU).unwrap();
    assert!(short.with_length(0).is_err());
}
