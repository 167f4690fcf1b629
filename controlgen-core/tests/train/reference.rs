//! Optimizers, schedules and averages against the reference (`benches/reference/train_fixtures.py`).

use controlgen_core::checkpoint::Safetensors;
use controlgen_core::train::{
    Adafactor, AdafactorConfig, AdamW, AdamWConfig, Ema, EmaConfig, EmaWarmup, Gradients, Group, Optimizer,
    Parameters, Schedule, Sgd, SgdConfig,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::common::{fixture, read};

const STEPS: i64 = 20;
const NAMES: [&str; 5] = ["matrix", "vector", "cube", "sometimes", "number"];

fn files() -> (Safetensors, Value) {
    let json = std::fs::read(fixture("train.json")).unwrap();
    (Safetensors::open(fixture("train.safetensors")).unwrap(), serde_json::from_slice(&json).unwrap())
}

fn optimizer(case: &Value, parameters: &Parameters) -> Box<dyn Optimizer> {
    let settings = &case["settings"];
    let number = |field: &str, default: f64| settings.get(field).map_or(default, |v| v.as_f64().unwrap());
    let truth = |field: &str, default: bool| settings.get(field).map_or(default, |v| v.as_bool().unwrap());
    match case["optimizer"].as_str().unwrap() {
        "AdamW" => {
            let beta =
                |i: usize, default: f64| settings.get("betas").map_or(default, |v| v[i].as_f64().unwrap());
            let config = AdamWConfig {
                beta1: beta(0, 0.9),
                beta2: beta(1, 0.999),
                epsilon: number("eps", 1e-8),
                weight_decay: number("weight_decay", 0.01),
            };
            Box::new(AdamW::new(parameters, config).unwrap())
        }
        "SGD" => {
            let config = SgdConfig {
                momentum: number("momentum", 0.0),
                dampening: number("dampening", 0.0),
                nesterov: truth("nesterov", false),
                weight_decay: number("weight_decay", 0.0),
            };
            Box::new(Sgd::new(parameters, config).unwrap())
        }
        "Adafactor" => {
            let config = AdafactorConfig {
                clip_threshold: number("clip_threshold", 1.0),
                decay_rate: number("decay_rate", -0.8),
                beta1: settings.get("beta1").map(|v| v.as_f64().unwrap()),
                weight_decay: number("weight_decay", 0.0),
                scale_parameter: truth("scale_parameter", true),
                relative_step: truth("relative_step", true),
                warmup_init: truth("warmup_init", false),
                ..AdafactorConfig::default()
            };
            Box::new(Adafactor::new(parameters, config).unwrap())
        }
        other => panic!("{other}"),
    }
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double))) / norm(b).max(1e-30)
}

/// How parameters lie in memory. LoRA's B lies as its transpose; what has holes is left to LibTorch's own calls.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Rows,
    Columns,
    Holes,
}

/// Parameters as they begin.
fn start(file: &Safetensors, layout: Layout, group: impl FnMut(&str, &Tensor) -> Group) -> Parameters {
    let named = NAMES.map(|name| {
        let value = read(file, &format!("start.{name}"), Kind::Float);
        let value = match layout {
            Layout::Columns if value.dim() == 2 => value.tr().contiguous().tr(),
            Layout::Holes if value.dim() > 0 => Tensor::stack(&[&value, &value], -1).select(-1, 1),
            _ => value,
        };
        (name.to_owned(), value.detach().set_requires_grad(true))
    });
    Parameters::grouped(named.into(), group).unwrap()
}

#[test]
fn twenty_steps_are_those_of_the_reference() {
    let (file, json) = files();
    let absent: Vec<i64> = json["absent"].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect();
    let (mut worst, mut worst_moved) = (0.0_f64, 0.0_f64);
    for case in json["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let rate = case["rate"].as_f64();
        // Without a learning rate there is none of a group's own either.
        let group = Group {
            rate: if rate.is_some() { json["vector"]["rate"].as_f64().unwrap() } else { 1.0 },
            weight_decay: json["vector"]["weight_decay"].as_f64(),
            ..Group::default()
        };
        for layout in [Layout::Rows, Layout::Columns, Layout::Holes] {
            let pick = |name: &str, _: &Tensor| if name == "vector" { group } else { Group::default() };
            let parameters = start(&file, layout, pick);
            let mut optimizer = optimizer(case, &parameters);
            let schedule = match case.get("schedule") {
                Some(_) => Schedule::linear(rate.unwrap(), STEPS as u64).unwrap().with_warmup(4).unwrap(),
                None => Schedule::constant(rate.unwrap_or(1.0)).unwrap(),
            };
            for step in 0..STEPS {
                let mut loss = Tensor::zeros([], tch::kind::FLOAT_CPU);
                for parameter in parameters.iter() {
                    if parameter.name == "sometimes" && absent.contains(&step) {
                        continue;
                    }
                    let gradient =
                        read(&file, &format!("gradients.{}", parameter.name), Kind::Float).get(step);
                    loss += (gradient * &parameter.value).sum(Kind::Float);
                }
                let mut gradients = parameters.gradients(&loss).unwrap();
                if let Some(most) = case.get("clip_value") {
                    gradients.clip_value(most.as_f64().unwrap()).unwrap();
                }
                if let Some(most) = case.get("clip_norm") {
                    gradients.clip_norm(most.as_f64().unwrap()).unwrap();
                }
                optimizer.step(&gradients, schedule.at(step as u64)).unwrap();
                for parameter in parameters.iter() {
                    let begun = read(&file, &format!("start.{}", parameter.name), Kind::Float);
                    let expected = read(&file, &format!("{name}.{}", parameter.name), Kind::Float).get(step);
                    let found = parameter.value.detach();
                    let error = relative(&found, &expected);
                    assert!(error <= 1e-5, "{name}, {layout:?}, step {step}, {}: {error:e}", parameter.name);
                    worst = worst.max(error);
                    // How far it has come, where that is more than rounding.
                    let (found, expected) = (found - &begun, expected - &begun);
                    if expected.norm().double_value(&[]) > 1e-2 * begun.norm().double_value(&[]) {
                        let error = relative(&found, &expected);
                        assert!(
                            error <= 1e-4,
                            "{name}, {layout:?}, step {step}, {}: moved {error:e}",
                            parameter.name
                        );
                        worst_moved = worst_moved.max(error);
                    }
                }
            }
        }
    }
    println!("worst relative error: {worst:e} of a parameter, {worst_moved:e} of how far it has come");
}

#[test]
fn schedules_are_those_of_transformers() {
    let (file, _) = files();
    let cases = [
        ("constant", Schedule::constant(0.4).unwrap().with_warmup(7)),
        ("linear", Schedule::linear(0.4, 100).unwrap().with_warmup(13)),
        ("linear_unwarmed", Schedule::linear(0.4, 100)),
        ("cosine", Schedule::cosine(0.4, 100).unwrap().with_warmup(10)),
        ("cosine_waves", Schedule::cosine_waves(0.4, 100, 1.75).unwrap().with_warmup(5)),
    ];
    for (name, schedule) in cases {
        let expected: Vec<f64> =
            Vec::try_from(read(&file, &format!("schedule.{name}"), Kind::Double)).unwrap();
        for (step, expected) in expected.into_iter().enumerate() {
            let found = schedule.as_ref().unwrap().at(step as u64);
            assert!((found - expected).abs() <= 1e-12, "{name}, step {step}: {found} for {expected}");
        }
    }
}

#[test]
fn averages_are_those_of_diffusers() {
    let (file, _) = files();
    let power = EmaWarmup::Power { inverse_gamma: 2.0, power: 0.75 };
    let usual = EmaConfig::default();
    let cases = [
        ("ema_ramp", EmaConfig { decay: 0.7, min_decay: 0.2, ..usual }),
        ("ema_power", EmaConfig { decay: 0.8, warmup: power, ..usual }),
        ("ema_after", EmaConfig { decay: 0.9, update_after_step: 6, ..usual }),
    ];
    for (name, config) in cases {
        let value = read(&file, "start.matrix", Kind::Float).set_requires_grad(true);
        let parameters = Parameters::new(vec![("matrix".into(), value.shallow_clone())]).unwrap();
        let mut ema = Ema::new(&parameters, config).unwrap();
        let (values, expected) = (read(&file, "adamw.matrix", Kind::Float), read(&file, name, Kind::Float));
        for step in 0..STEPS {
            tch::no_grad(|| value.shallow_clone().copy_(&values.get(step)));
            ema.update().unwrap();
            let error = relative(&ema.averages()[0].1, &expected.get(step));
            assert!(error <= 1e-6, "{name}, step {step}: {error:e}");
        }
        ema.swap().unwrap();
        assert!(relative(&value, &expected.get(STEPS - 1)) <= 1e-6);
        ema.swap().unwrap();
        assert!(value.equal(&values.get(STEPS - 1)));
    }
}

#[test]
fn a_state_that_is_saved_and_loaded_goes_on_to_the_bit() {
    let (file, json) = files();
    for case in json["cases"].as_array().unwrap() {
        let step = |parameters: &Parameters, optimizer: &mut dyn Optimizer, step: i64| {
            let mut gradients = Gradients::none(parameters);
            for parameter in parameters.iter().filter(|p| p.name != "sometimes" || step % 3 == 1) {
                let gradient = read(&file, &format!("gradients.{}", parameter.name), Kind::Float).get(step);
                gradients.add(&(gradient * &parameter.value).sum(Kind::Float), parameters).unwrap();
            }
            optimizer.step(&gradients, 1e-2).unwrap();
        };
        let whole = start(&file, Layout::Columns, |_, _| Group::default());
        let mut other = optimizer(case, &whole);
        // Until `sometimes` has had no gradient yet, and a few steps more.
        for cut in [1, 4] {
            let parts = start(&file, Layout::Columns, |_, _| Group::default());
            let mut first = optimizer(case, &parts);
            (0..cut).for_each(|i| step(&parts, first.as_mut(), i));
            let mut second = optimizer(case, &parts);
            second.load_state(first.state().unwrap()).unwrap();
            drop(first);
            (cut..8).for_each(|i| step(&parts, second.as_mut(), i));
            if cut == 1 {
                (0..8).for_each(|i| step(&whole, other.as_mut(), i));
            }
            for (a, b) in whole.iter().zip(parts.iter()) {
                assert!(a.value.equal(&b.value), "{}, cut at {cut}: {}", case["name"], a.name);
            }
        }
    }
}
