//! `conformance forward` of CLIP's encoders and unCLIP's prior, against transformers and diffusers.

use std::path::Path;

use crate::support::{Array, read, write};

/// Runs the tool over the inputs of a case, and holds its outputs to those of the case.
fn check(model: &str, case: &str, inputs: &[&str], outputs: &[&str]) {
    let model =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-diffusion/tests/fixtures").join(model);
    let cases = read(&model.join("cases.safetensors"));
    let get = |name: &str| &cases[&format!("{case}.{name}")];
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let given: Vec<(&str, &Array)> = inputs.iter().map(|name| (*name, get(name))).collect();
    write(&from, &given);
    let paths = [&model, &from, &to].map(|path| path.to_str().unwrap().to_owned());
    benches::conformance::run(&[&["forward".to_owned()], &paths[..]].concat()).unwrap();
    let found = read(&to);
    assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), outputs, "{}", model.display());
    for name in outputs {
        let (found, expected) = (&found[*name], get(name));
        assert_eq!(found.shape, expected.shape);
        let far =
            found.floats().iter().zip(expected.floats()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-4, "{} {name}: {far}", model.display());
    }
}

#[test]
fn clip_and_the_prior_are_served() {
    check("clip/text_legacy", "plain", &["input_ids"], &["last_hidden_state", "pooler_output"]);
    check("clip/text_projection", "plain", &["input_ids"], &["last_hidden_state", "text_embeds"]);
    check("clip/vision", "plain", &["pixel_values"], &["last_hidden_state", "pooler_output"]);
    check("clip/vision_projection", "plain", &["pixel_values"], &["image_embeds", "last_hidden_state"]);
    let inputs = ["hidden_states", "timestep", "proj_embedding", "encoder_hidden_states", "attention_mask"];
    check("prior", "masked", &inputs, &["predicted_image_embedding"]);
    check("prior_norms", "plain", &inputs[..4], &["predicted_image_embedding"]);
}
