//! Schedulers against diffusers' figures (`benches/reference/scheduler_fixtures.py`), and refusals.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::support::{fail, succeed, tool};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-diffusion/tests/fixtures").join(name)
}

fn numbers(tensors: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = tensors.tensor(name).unwrap();
    match tensor.dtype() {
        Dtype::F64 => tensor.data().chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::F32 => {
            tensor.data().chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// The fixture's inputs in a file of their own, with as many names as are asked for.
fn inputs(folder: &Path, names: &[&str]) -> PathBuf {
    let bytes = fs::read(fixture("schedulers.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let path = folder.join("in.safetensors");
    let some = names.iter().map(|name| (*name, all.tensor(name).unwrap()));
    safetensors::serialize_to_file(some, None, &path).unwrap();
    path
}

#[test]
fn samples_are_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let input = inputs(folder.path(), &["sample", "model_outputs", "noise"]);
    let (config, output) =
        (folder.path().join("scheduler_config.json"), folder.path().join("out.safetensors"));
    let cases: Vec<Value> =
        serde_json::from_str(&fs::read_to_string(fixture("schedulers.json")).unwrap()).unwrap();
    let expected = fs::read(fixture("schedulers.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    for wanted in ["DDPM.", "EulerDiscrete.", "HeunDiscrete.", "UniPCMultistep.", "DDIM.4"] {
        let case = cases.iter().rfind(|case| case["name"].as_str().unwrap().starts_with(wanted)).unwrap();
        fs::write(&config, case["config"].to_string()).unwrap();
        let mut command = tool();
        command.arg("schedule").args([&config, &input, &output]).args(["--steps", "10"]);
        if case["eta"].as_f64() != Some(0.0) {
            command.args(["--eta", &case["eta"].to_string()]);
        }
        assert_eq!(succeed(&mut command), "");
        let bytes = fs::read(&output).unwrap();
        let found = SafeTensors::deserialize(&bytes).unwrap();
        let name = case["name"].as_str().unwrap();
        assert_eq!(
            found.tensor("samples").unwrap().shape(),
            expected.tensor(&format!("{name}.samples")).unwrap().shape()
        );
        for what in ["samples", "timesteps"] {
            let reference = numbers(&expected, &format!("{name}.{what}"));
            for (found, reference) in numbers(&found, what).iter().zip(reference) {
                let error = (found - reference).abs() / (reference.abs() + 1.0);
                assert!(error < 1e-4, "{name}, {what}: {found} {reference}");
            }
        }
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = inputs(folder.path(), &["sample", "model_outputs"]);
    let (config, output) =
        (folder.path().join("scheduler_config.json"), folder.path().join("out.safetensors"));
    let refused = |json: Value, steps: &str, said: &[&str]| {
        fs::write(&config, json.to_string()).unwrap();
        let message = fail(tool().arg("schedule").args([&config, &input, &output]).args(["--steps", steps]));
        for part in said {
            assert!(message.contains(part), "expected `{part}` in\n{message}");
        }
    };
    let euler = json!({ "_class_name": "EulerDiscreteScheduler" });
    refused(json!({ "_class_name": "LMSScheduler" }), "5", &["LMSScheduler", "EulerDiscreteScheduler"]);
    refused(euler.clone(), "0", &["number of steps", "1 ..= 1000"]);
    refused(euler.clone(), "1001", &["number of steps", "1 ..= 1000"]);
    refused(euler, "50", &["entries of model_outputs"]);
    refused(json!({ "_class_name": "DDPMScheduler" }), "5", &["`noise`", "draws noise"]);
}
