//! Schedules and DDIM against diffusers, its closed form, and every refusal.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::path::Path;

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::{Noise, NoiseSource, TorchGenerator};
use controlgen_core::testing::{Component, Mixture, MixtureDenoiser};
use controlgen_core::{Condition, Error, NoiseLevel, Parameterisation, Prediction, Result};
use controlgen_diffusion::{Ddim, DiffusionSchedule, Sampler, Spacing, sample, steps};
use tch::{Device, Kind, Tensor, kind::DOUBLE_CPU};

fn fixtures() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ddim.safetensors");
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn schedule(name: &str) -> DiffusionSchedule {
    match name {
        "linear" => DiffusionSchedule::linear(1e-4, 0.02, 1000),
        "scaled_linear" => DiffusionSchedule::scaled_linear(0.00085, 0.012, 1000),
        _ => DiffusionSchedule::cosine(1000),
    }
    .unwrap()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size());
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{difference}");
}

/// Noise that was recorded.
struct Recorded(Vec<Tensor>);
impl NoiseSource for Recorded {
    fn normal(&mut self, shape: &[i64], _: Kind, _: Device) -> Result<Tensor> {
        let noise = self.0.remove(0);
        assert_eq!(noise.size(), shape);
        Ok(noise)
    }
}

/// What must not be asked.
struct Never;
impl NoiseSource for Never {
    fn normal(&mut self, _: &[i64], _: Kind, _: Device) -> Result<Tensor> {
        panic!("no noise is needed")
    }
}

#[test]
fn tables_and_timesteps_are_diffusers() {
    let fixtures = fixtures();
    for name in ["linear", "scaled_linear", "cosine"] {
        // diffusers' tables are f32.
        let found: Vec<f64> = schedule(name).alphas_cumprod().iter().copied().step_by(37).collect();
        let expected = numbers(&fixtures[&format!("{name}.alphas_cumprod")]);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-6 + 2e-4 * expected.min(1e-2),
                "{name}: {found} {expected}"
            );
        }
    }
    let spacings = [
        ("leading", Spacing::Leading { offset: 1 }),
        ("linspace", Spacing::Linspace),
        ("trailing", Spacing::Trailing),
    ];
    let mut compared = 0;
    for (name, spacing) in spacings {
        for n in [1, 7, 50] {
            let Some(expected) = fixtures.get(&format!("{name}.timesteps.{n}")) else { continue };
            assert_eq!(schedule("linear").timesteps(n, spacing).unwrap(), numbers(expected), "{name} {n}");
            compared += 1;
        }
    }
    assert_eq!(compared, 8);
}

#[test]
fn trajectories_are_diffusers() {
    use Parameterisation::{Epsilon, Sample, V};
    let leading = Spacing::Leading { offset: 1 };
    let cases = [
        ("epsilon", "scaled_linear", leading, Epsilon, 0.0),
        ("epsilon_eta", "linear", Spacing::Trailing, Epsilon, 0.6),
        ("v", "cosine", Spacing::Trailing, V, 0.0),
        ("v_eta", "scaled_linear", Spacing::Trailing, V, 1.0),
        ("sample_eta", "linear", leading, Sample, 1.0),
    ];
    let fixtures = fixtures();
    for (name, table, spacing, form, eta) in cases {
        let schedule = schedule(table);
        let steps = schedule.steps(&schedule.timesteps(5, spacing).unwrap()).unwrap();
        let part = |what: &str| fixtures[&format!("{name}.{what}")].unbind(0);
        let (xs, outputs) = (part("x"), part("outputs"));
        let mut noise: Box<dyn NoiseSource> =
            if eta > 0.0 { Box::new(Recorded(part("noise"))) } else { Box::new(Never) };
        let mut predict = |x: &Tensor, step: &Step| {
            let scale = xs[step.index].abs().max().double_value(&[]);
            assert_close(x, &xs[step.index], 1e-9 * scale);
            let prediction = Prediction::new(outputs[step.index].shallow_clone(), form);
            Ok(Guided { x: x.shallow_clone(), prediction, shift: None })
        };
        let x = xs[0].shallow_clone();
        let found = Ddim::new(eta).unwrap().sample(&mut predict, x, &steps, &mut *noise).unwrap();
        assert_close(&found, &xs[5], 1e-9 * xs[5].abs().max().double_value(&[]));
    }
}

#[test]
fn a_shift_is_one_of_epsilon() {
    // ε' = ε − σ · shift, with x̂₀ made of it anew (Dhariwal & Nichol 2021, algorithm 2), to the end of the step.
    let schedule = schedule("linear");
    let steps = schedule.steps(&[500.0, 200.0]).unwrap();
    let x = Tensor::arange(8, DOUBLE_CPU).sin().view([2, 1, 2, 2]);
    let run = |shifted: bool, by_hand: bool| {
        let mut predict = |x: &Tensor, step: &Step| {
            let shift = (x * 3.0).cos();
            let epsilon = if by_hand { x.cos() - &shift * step.level.sigma() } else { x.cos() };
            let prediction = Prediction::new(epsilon, Parameterisation::Epsilon);
            Ok(Guided { x: x.shallow_clone(), prediction, shift: shifted.then_some(shift) })
        };
        let ddim = Ddim::new(0.5).unwrap();
        ddim.sample(&mut predict, x.shallow_clone(), &steps, &mut Noise::seeded(1).streams(2)).unwrap()
    };
    let plain = run(false, false);
    assert_close(&run(true, false), &run(false, true), 1e-9);
    assert!((run(true, false) - plain).abs().max().double_value(&[]) > 0.1);
}

fn line() -> Mixture {
    let part = |x: f64, class| Component { mean: vec![x, -x / 2.0], deviation: 0.5, weight: 1.0, class };
    Mixture::new([2, 1, 1], vec![part(-2.0, 0), part(2.0, 1)]).unwrap()
}

type Level = fn(f64) -> Result<NoiseLevel>;

#[test]
fn without_eta_it_solves_the_probability_flow() {
    // For one Gaussian the solution keeps (x − α μ) / √(α² s² + σ²); of first order: half the step, half the error.
    let vp: Level = |t| NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2));
    let ve: Level = |t| NoiseLevel::from_sigma(20.0 * t * t);
    for (level, form, from) in [
        (vp, Parameterisation::Epsilon, 0.98),
        (NoiseLevel::from_flow as Level, Parameterisation::Velocity, 1.0),
        (ve, Parameterisation::Sample, 1.0),
    ] {
        let model = MixtureDenoiser::new(line(), form, level).unwrap();
        let guider = Guider::new(Box::new(model), vec![vec![Condition::Class(1)]], None, 0).unwrap();
        let first = level(from).unwrap();
        let x = Tensor::arange(6, DOUBLE_CPU).sin().view([3, 2, 1, 1]) * first.sigma();
        let mean = Tensor::from_slice(&[2.0, -1.0]).view([1, 2, 1, 1]);
        let (a, s) = (first.alpha(), first.sigma());
        let exact = &mean + (&x - &mean * a) * (0.5 / (a * a * 0.25 + s * s).sqrt());
        let error = |n: usize| {
            let times: Vec<f64> = (0..n).map(|i| from * (1.0 - i as f64 / n as f64)).collect();
            let steps = steps(&times, level, NoiseLevel::CLEAN).unwrap();
            let found = sample(&Ddim::new(0.0).unwrap(), &guider, x.shallow_clone(), &steps, &mut Never);
            (found.unwrap() - &exact).abs().max().double_value(&[])
        };
        let (coarse, fine) = (error(200), error(400));
        assert!(fine < 0.02 && (1.8..2.2).contains(&(coarse / fine)), "{}: {coarse} {fine}", form.name());
    }
}

#[test]
fn inversion_is_the_way_back() {
    let schedule = schedule("scaled_linear");
    let model_schedule = schedule.clone();
    let model = MixtureDenoiser::new(line(), Parameterisation::V, move |t| model_schedule.level(t)).unwrap();
    let guider = Guider::new(Box::new(model), vec![vec![Condition::Null]], None, 0).unwrap();
    let ddim = Ddim::new(0.0).unwrap();
    let times: Vec<f64> = (0..1000).rev().map(f64::from).collect();
    let last = schedule.level(0.0).unwrap();
    let down = steps(&times[..999], |t| schedule.level(t), last).unwrap();
    let up: Vec<f64> = times.iter().rev().copied().collect();
    let up = steps(&up[..999], |t| schedule.level(t), schedule.level(999.0).unwrap()).unwrap();
    let x = line().sample(&mut Noise::seeded(5).streams(4)).unwrap();
    let noised = sample(&ddim, &guider, x.shallow_clone(), &up, &mut Never).unwrap();
    let back = sample(&ddim, &guider, noised.shallow_clone(), &down, &mut Never).unwrap();
    assert_close(&back, &x, 0.02);
    assert!((noised - &x).abs().max().double_value(&[]) > 0.5);
    let eta = sample(&Ddim::new(0.1).unwrap(), &guider, x, &up, &mut Never);
    assert!(matches!(eta, Err(Error::Value { .. })), "noise that grows leaves no room for new noise");
}

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let schedule = schedule("linear");
    let steps = schedule.steps(&schedule.timesteps(20, Spacing::Trailing).unwrap()).unwrap();
    let model = MixtureDenoiser::new(line(), Parameterisation::Epsilon, move |t| schedule.level(t)).unwrap();
    let guider = Guider::new(Box::new(model), vec![vec![Condition::Null]], None, 0).unwrap();
    let run = |mut streams: Vec<_>| {
        let x = streams.normal(&[streams.len() as i64, 2, 1, 1], Kind::Double, Device::Cpu).unwrap();
        sample(&Ddim::new(1.0).unwrap(), &guider, x, &steps, &mut streams).unwrap()
    };
    let batch = run(Noise::seeded(8).streams(5));
    let alone = run(vec![Noise::seeded(8).stream(3)]);
    assert_close(&alone.get(0), &batch.get(3), 1e-12);
    assert!((batch.get(1) - batch.get(3)).abs().max().double_value(&[]) > 1e-3);
}

#[test]
fn what_is_no_schedule_no_way_or_no_eta_is_refused() {
    fn value<T>(result: &Result<T>) -> bool {
        matches!(result, Err(Error::Value { .. }))
    }
    for bad in [
        vec![],
        vec![0.5, 0.5],
        vec![0.5, 0.6],
        vec![1.0],
        vec![0.5, 0.0, 0.0],
        vec![f64::NAN],
        vec![0.5, -0.1],
    ] {
        assert!(value(&DiffusionSchedule::new(bad.clone())), "{bad:?}");
    }
    assert!(DiffusionSchedule::new(vec![0.5, 0.0]).is_ok(), "it may end in pure noise");
    assert!(
        value(&DiffusionSchedule::linear(0.0, 0.02, 10)) && value(&DiffusionSchedule::linear(0.1, 1.1, 10))
    );
    assert!(value(&DiffusionSchedule::cosine(0)) && value(&DiffusionSchedule::linear(0.1, 0.2, 0)));
    assert!(
        value(&DiffusionSchedule::cosine(usize::MAX)) && value(&DiffusionSchedule::linear(0.1, 0.2, 1 << 60))
    );
    let schedule = schedule("linear");
    for bad in [-1.0, 1000.0, 0.5, f64::NAN] {
        assert!(value(&schedule.level(bad)), "{bad}");
        assert!(value(&schedule.steps(&[bad])));
    }
    assert!(value(&schedule.steps(&[])));
    assert!(
        value(&schedule.timesteps(0, Spacing::Trailing))
            && value(&schedule.timesteps(1001, Spacing::Linspace))
    );
    assert!(value(&schedule.timesteps(1000, Spacing::Leading { offset: 1 })));
    for eta in [-0.1, 1.1, f64::NAN] {
        assert!(value(&Ddim::new(eta)));
    }
    let mut predict = |x: &Tensor, _: &Step| {
        let prediction = Prediction::new(x.shallow_clone(), Parameterisation::Epsilon);
        Ok(Guided { x: x.shallow_clone(), prediction, shift: None })
    };
    let x = Tensor::ones([2, 1, 1, 1], DOUBLE_CPU);
    let mut run = |steps: &[Step], noise: &mut dyn NoiseSource| {
        Ddim::new(1.0).unwrap().sample(&mut predict, x.shallow_clone(), steps, noise).map(drop)
    };
    let steps = schedule.steps(&[900.0, 500.0, 100.0]).unwrap();
    assert!(run(&steps, &mut Noise::seeded(1).streams(2)).is_ok());
    assert!(run(&steps, &mut TorchGenerator::new(1)).is_ok());
    assert!(value(&run(&[], &mut Never)));
    let gap = run(&[steps[0], steps[2]], &mut Never).unwrap_err();
    assert!(gap.to_string().starts_with("the level of step 2"), "{gap}");
    assert!(matches!(run(&steps, &mut Noise::seeded(1).streams(3)), Err(Error::Shape { .. })));
}
