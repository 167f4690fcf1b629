//! Every scheduler against diffusers in f64, and every refusal of its configuration.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use controlgen_core::guidance::{Guided, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Prediction, Result};
use controlgen_diffusion::Scheduler;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The noise of the call under way.
struct Recorded(Tensor, Arc<AtomicUsize>);
impl NoiseSource for Recorded {
    fn normal(&mut self, shape: &[i64], kind: Kind, _: Device) -> Result<Tensor> {
        let z = self.0.get(self.1.load(Relaxed) as i64 - 1);
        assert_eq!(z.size(), shape);
        Ok(z.to_kind(kind))
    }
}

/// Timesteps and samples after each call of a model with these outputs, in diffusers' coordinates.
fn run(
    scheduler: &Scheduler,
    steps: &[Step],
    inputs: &HashMap<String, Tensor>,
    kind: Kind,
) -> Result<(Vec<f64>, Tensor)> {
    let scale = |step: &Step| if scheduler.scales_samples() { step.level.alpha() } else { 1.0 };
    let calls = Arc::new(AtomicUsize::new(0));
    let (mut timesteps, mut samples) = (Vec::new(), Vec::new());
    let mut predict = |x: &Tensor, step: &Step| {
        let k = calls.fetch_add(1, Relaxed);
        if k > 0 {
            samples.push(x / scale(step));
        }
        timesteps.push(step.timestep);
        let output = inputs["model_outputs"].get(k as i64).to_kind(kind);
        let prediction = Prediction::with_variance(&output, 2, scheduler.parameterisation())?;
        Ok(Guided { x: x.shallow_clone(), prediction, shift: None })
    };
    let mut noise = Recorded(inputs["noise"].shallow_clone(), Arc::clone(&calls));
    let x = inputs["sample"].to_kind(kind) * scale(&steps[0]);
    let last = scheduler.sampler().sample(&mut predict, x, steps, &mut noise)?;
    let end = if scheduler.scales_samples() { steps[steps.len() - 1].next.alpha() } else { 1.0 };
    samples.push(last / end);
    Ok((timesteps, Tensor::stack(&samples, 0)))
}

#[test]
fn every_scheduler_is_diffusers() {
    let tensors: HashMap<String, Tensor> =
        Tensor::read_safetensors(fixture("schedulers.safetensors")).unwrap().into_iter().collect();
    let cases: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("schedulers.json")).unwrap()).unwrap();
    let mut classes = Vec::new();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let mut scheduler = Scheduler::parse(name, &case["config"].to_string()).unwrap();
        if let Some(eta) = case["eta"].as_f64().filter(|eta| *eta > 0.0) {
            scheduler = scheduler.with_eta(eta).unwrap();
        }
        let steps = scheduler.steps(10).unwrap();
        let expected = &tensors[&format!("{name}.samples")];
        let times: Vec<f64> = Vec::try_from(&tensors[&format!("{name}.timesteps")]).unwrap();
        for (kind, limit) in [(Kind::Double, 1e-9), (Kind::Float, 1e-4)] {
            let (timesteps, samples) = run(&scheduler, &steps, &tensors, kind).unwrap();
            let far = timesteps.iter().zip(&times).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(timesteps.len() == times.len() && far < 1e-6, "{name}: {timesteps:?}, {times:?}");
            assert_eq!(samples.size(), expected.size(), "{name}");
            let error = ((samples.to_kind(Kind::Double) - expected).abs() / (expected.abs() + 1.0)).max();
            let error = error.double_value(&[]);
            assert!(error <= limit, "{name}: {error:.1e} in {kind:?}, {}", case["config"]);
        }
        classes.push(scheduler.class());
    }
    classes.dedup();
    assert_eq!(classes, Scheduler::CLASSES);
}

fn parse(config: &Value) -> Result<Scheduler> {
    Scheduler::parse("scheduler_config.json", &config.to_string())
}

#[test]
fn what_is_no_scheduler_is_refused() {
    let error = |config: Value| match parse(&config) {
        Ok(_) => panic!("{config} was taken"),
        Err(error) => error.to_string(),
    };
    let unknown = error(json!({"_class_name": "KarrasVeScheduler"}));
    assert!(
        unknown.contains("KarrasVeScheduler") && unknown.contains("UniPCMultistepScheduler"),
        "{unknown}"
    );
    assert!(error(json!({})).contains("DDPMScheduler"), "no class at all");
    for (class, field, value, says) in [
        ("DDPMScheduler", "variance_type", json!("fixed_large_log"), "fixed_small, fixed_small_log"),
        ("DDPMScheduler", "beta_schedule", json!("cubic"), "squaredcos_cap_v2"),
        ("DDPMScheduler", "beta_start", json!("low"), "a number"),
        ("DDPMScheduler", "num_train_timesteps", json!(0), "1 ..= 1000000"),
        ("DDIMScheduler", "prediction_type", json!("flow_prediction"), "epsilon, sample, v_prediction"),
        ("DDIMScheduler", "steps_offset", json!(-1), "0 ..= 1000000"),
        ("DDIMScheduler", "clip_sample", json!("yes"), "true or false"),
        ("EulerDiscreteScheduler", "use_beta_sigmas", json!(true), "use_karras_sigmas"),
        ("EulerDiscreteScheduler", "trained_betas", json!([0.1, "b"]), "a list of numbers"),
        ("DPMSolverMultistepScheduler", "algorithm_type", json!("sde-dpmsolver"), "dpmsolver++"),
        ("DPMSolverMultistepScheduler", "solver_order", json!(4), "1 ..= 3"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", json!(true), "use_karras_sigmas"),
        ("UniPCMultistepScheduler", "predict_x0", json!(false), "predict_x0: true"),
        ("PNDMScheduler", "skip_prk_steps", json!(false), "skip_prk_steps: true"),
        ("LCMScheduler", "original_inference_steps", json!(2000), "1 ..= 1000"),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", json!(true), "a fixed shift"),
        ("FlowMatchEulerDiscreteScheduler", "shift", json!("big"), "a number"),
    ] {
        let text = error(json!({"_class_name": class, field: value}));
        assert!(text.contains(field) && text.contains(says), "{class} {field}: {text}");
    }
    let both = json!({"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": true, "use_exponential_sigmas": true});
    assert!(error(both).contains("use_exponential_sigmas"));
    let third = json!({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3});
    assert!(error(third).contains("orders 1 and 2"));
    assert!(matches!(Scheduler::parse("x.json", "[1]"), Err(Error::Format { .. })));
    assert!(matches!(Scheduler::open("nowhere/scheduler_config.json"), Err(Error::Io { .. })));
    let euler = parse(&json!({"_class_name": "EulerDiscreteScheduler"})).unwrap();
    assert!(matches!(euler.with_eta(0.5), Err(Error::Unsupported { .. })));
}

#[test]
fn steps_beyond_training_are_refused() {
    for class in Scheduler::CLASSES {
        let scheduler = parse(&json!({"_class_name": class, "skip_prk_steps": true})).unwrap();
        for n in [0, 1001] {
            let error = scheduler.steps(n).unwrap_err();
            assert!(matches!(error, Error::Value { .. }), "{class}: {error}");
        }
        let most = if class == "LCMScheduler" {
            50
        } else if class.contains("Multistep") {
            999
        } else {
            1000
        };
        assert_eq!(scheduler.steps(most).unwrap().len(), most, "{class}");
    }
    let beyond = json!({"_class_name": "DDPMScheduler", "steps_offset": 1});
    let error = parse(&beyond).unwrap().steps(1000).unwrap_err();
    assert!(error.to_string().contains("found 1000"), "{error}");
}

#[test]
fn a_run_begins_with_noise_of_the_right_size() {
    // init_noise_sigma / √(1 + σ²), in the coordinates of the model.
    let of = |config: Value| {
        let scheduler = parse(&config).unwrap();
        let steps = scheduler.steps(10).unwrap();
        (scheduler.initial_deviation(&steps), steps[0].level.sigma())
    };
    let (trailing, sigma) =
        of(json!({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}));
    assert!(trailing == sigma && sigma < 1.0);
    assert_eq!(of(json!({"_class_name": "HeunDiscreteScheduler", "timestep_spacing": "leading"})).0, 1.0);
    assert_eq!(of(json!({"_class_name": "UniPCMultistepScheduler"})).0, 1.0);
}
