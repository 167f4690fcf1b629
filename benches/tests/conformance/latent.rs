//! `conformance forward` of transformers over latents and of autoencoders.

use std::path::{Path, PathBuf};

use crate::support::{Array, Arrays, read, write};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-diffusion/tests/fixtures").join(name)
}

fn forward(model: &Path, inputs: &[(&str, &Array)]) -> controlgen_core::Result<Arrays> {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    write(&from, inputs);
    let paths = [model, &from, &to].map(|path| path.to_str().unwrap().to_owned());
    benches::conformance::run(&[&["forward".to_owned()], &paths[..]].concat())?;
    Ok(read(&to))
}

fn close(what: &str, found: &Array, expected: &Array) {
    assert_eq!(found.shape, expected.shape, "{what}");
    let pairs = found.floats().into_iter().zip(expected.floats());
    let distance = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(distance <= 2e-4, "{what}: {distance}");
}

#[test]
fn transformers_predict_what_those_of_diffusers_do() {
    for name in ["dit", "dit_old"] {
        let cases = read(&fixture(name).join("cases.safetensors"));
        for case in ["own", "none", "larger", "wide"] {
            let get = |field: &str| &cases[&format!("{case}.{field}")];
            for sample in ["sample", "hidden_states"] {
                let labels = ("class_labels", get("class_labels"));
                let inputs = [(sample, get("sample")), ("timestep", get("timestep")), labels];
                let outputs = forward(&fixture(name), &inputs).unwrap();
                assert_eq!(outputs.keys().collect::<Vec<_>>(), ["sample"]);
                close(&format!("{name}, {case}"), &outputs["sample"], get("output"));
            }
        }
    }
}

#[test]
fn autoencoders_code_what_those_of_diffusers_do() {
    for name in ["vae", "vae_flux"] {
        let cases = read(&fixture(name).join("cases.safetensors"));
        let inputs = [("latents", &cases["latents"]), ("sample", &cases["images"])];
        let outputs = forward(&fixture(name), &inputs).unwrap();
        assert_eq!(outputs.keys().collect::<Vec<_>>(), ["latent_mean", "sample"]);
        close(name, &outputs["sample"], &cases["sample"]);
        close(name, &outputs["latent_mean"], &cases["latent_mean"]);
        let one = forward(&fixture(name), &inputs[..1]).unwrap();
        assert_eq!(one.keys().collect::<Vec<_>>(), ["sample"]);
        let error = forward(&fixture(name), &[]).err().unwrap().to_string();
        assert!(error.contains("`latents`, `sample` or both"), "{error}");
    }
}
