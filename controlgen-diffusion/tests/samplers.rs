//! Samplers on a mixture of Gaussians, whose samples and trajectories are known; what they have in common; thresholds.
#![allow(clippy::unwrap_used, clippy::panic)]

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::{Noise, NoiseSource};
use controlgen_core::testing::{Component, Mixture, MixtureDenoiser, ks_test};
use controlgen_core::{Condition, Error, NoiseLevel, Parameterisation, Prediction, Result};
use controlgen_diffusion::{
    Ddim, Ddpm, DiffusionSchedule, DpmSolver, DpmSolverType, Euler, EulerAncestral, FlowMatchEuler, Heun,
    Lcm, Pndm, Sampler, SigmaSpacing, Spacing, Threshold, Thresholded, UniPc, UniPcType, Variance,
    flow_sigmas, from_strength, sample, steps, steps_at,
};
use tch::{Device, Kind, Tensor, kind::DOUBLE_CPU};

/// What must not be asked.
struct Never;
impl NoiseSource for Never {
    fn normal(&mut self, _: &[i64], _: Kind, _: Device) -> Result<Tensor> {
        panic!("no noise is needed")
    }
}

fn mixture() -> Mixture {
    let part =
        |x: f64, y: f64, deviation, weight, class| Component { mean: vec![x, y], deviation, weight, class };
    Mixture::new(
        [2, 1, 1],
        vec![part(-2.0, 1.0, 0.4, 0.5, 0), part(1.5, 0.0, 0.6, 0.3, 1), part(0.0, -2.0, 0.3, 0.2, 1)],
    )
    .unwrap()
}

fn guider(
    mixture: Mixture,
    form: Parameterisation,
    level: impl Fn(f64) -> Result<NoiseLevel> + Send + Sync + 'static,
) -> Guider {
    let model = MixtureDenoiser::new(mixture, form, level).unwrap();
    Guider::new(Box::new(model), vec![vec![Condition::Null]], None, 0).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

/// x at the first level, drawn from the mixture itself, and noise for the run.
fn begin(data: &Mixture, level: NoiseLevel, n: usize) -> (Tensor, Vec<controlgen_core::noise::Stream>) {
    let mut streams = Noise::seeded(77).streams(n);
    let x0 = data.sample(&mut streams).unwrap();
    let z = streams.normal(&x0.size(), Kind::Double, Device::Cpu).unwrap();
    (x0 * level.alpha() + z * level.sigma(), streams)
}

#[test]
fn samples_are_of_the_mixture() {
    let schedule = DiffusionSchedule::linear(1e-4, 0.02, 1000).unwrap();
    let data = mixture();
    let all = schedule.timesteps(500, Spacing::Trailing).unwrap();
    let few = schedule.timesteps(100, Spacing::Trailing).unwrap();
    let dpm = |order| DpmSolver::new(order).unwrap();
    let samplers: Vec<(&str, Box<dyn Sampler>, &[f64])> = vec![
        ("DDPM, small", Box::new(Ddpm::new(Variance::FixedSmall)), &all),
        ("DDPM, large", Box::new(Ddpm::new(Variance::FixedLarge)), &all),
        ("DDIM", Box::new(Ddim::new(0.0).unwrap()), &all),
        ("DDIM, eta 1", Box::new(Ddim::new(1.0).unwrap()), &all),
        ("Euler", Box::new(Euler), &all),
        ("Euler ancestral", Box::new(EulerAncestral::default()), &all),
        ("Heun", Box::new(Heun), &few),
        ("DPM-Solver++ 2M", Box::new(dpm(2)), &few),
        ("DPM-Solver++ 3M", Box::new(dpm(3)), &few),
        ("SDE-DPM-Solver++ 2M", Box::new(dpm(2).stochastic().unwrap()), &few),
        ("PNDM", Box::new(Pndm::default()), &few),
        ("UniPC-2", Box::new(UniPc::new(2).unwrap()), &few),
        ("UniPC-3, bh1", Box::new(UniPc::new(3).unwrap().with_type(UniPcType::Bh1)), &few),
    ];
    for (name, sampler, timesteps) in samplers {
        let level = schedule.clone();
        let guider = guider(mixture(), Parameterisation::V, move |t| level.level(t));
        let steps = schedule.steps(timesteps).unwrap();
        let (x, mut noise) = begin(&data, steps[0].level, 2000);
        is_of(name, &data, &sample(&*sampler, &guider, x, &steps, &mut noise).unwrap());
    }
    let guider = guider(mixture(), Parameterisation::Velocity, |t| NoiseLevel::from_flow(t / 1000.0));
    let times: Vec<f64> = flow_sigmas(250, 1000, 1.0).unwrap().iter().map(|sigma| sigma * 1000.0).collect();
    let steps = steps(&times, |t| NoiseLevel::from_flow(t / 1000.0), NoiseLevel::CLEAN).unwrap();
    let (x, mut noise) = begin(&data, steps[0].level, 2000);
    is_of("flow", &data, &sample(&FlowMatchEuler::default(), &guider, x, &steps, &mut noise).unwrap());
}

/// Moments within 4 deviations of themselves, and Kolmogorov-Smirnov at 1 %, along three directions.
fn is_of(name: &str, data: &Mixture, x: &Tensor) {
    for direction in [[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]] {
        let found = data.project(&direction, x).unwrap();
        let parts: Vec<(f64, f64, f64)> = (data.components().iter().zip(data.weights()))
            .map(|(c, w)| (w, c.mean[0] * direction[0] + c.mean[1] * direction[1], c.deviation))
            .collect();
        let mean: f64 = parts.iter().map(|(w, m, _)| w * m).sum();
        let moment = |d: f64, s: f64, k: i32| {
            if k == 2 { d * d + s * s } else { d.powi(4) + 6.0 * d * d * s * s + 3.0 * s.powi(4) }
        };
        let central = |k| parts.iter().map(|(w, m, s)| w * moment(m - mean, *s, k)).sum::<f64>();
        let (variance, fourth, n) = (central(2), central(4), found.len() as f64);
        let of_mean = found.iter().sum::<f64>() / n;
        let of_variance = found.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        assert!((of_mean - mean).abs() < 4.0 * (variance / n).sqrt(), "{name}: mean {of_mean}, {mean}");
        let error = ((fourth - variance * variance) / n).sqrt();
        assert!((of_variance - variance).abs() < 4.0 * error, "{name}: variance {of_variance}, {variance}");
        let p = ks_test(&found, data.cdf(&direction, NoiseLevel::CLEAN).unwrap()).unwrap();
        assert!(p > 0.01, "{name}, {direction:?}: p = {p}");
    }
}

#[test]
fn lcm_has_the_moments_of_its_recursion() {
    // Of one Gaussian N(μ, s²) x̂₀ is affine in x, so that mean and variance follow from step to step.
    let (mean, deviation) = (1.5, 0.7);
    let data =
        Mixture::new([1, 1, 1], vec![Component { mean: vec![mean], deviation, weight: 1.0, class: 0 }])
            .unwrap();
    let schedule = DiffusionSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap();
    let level = schedule.clone();
    let guider = guider(data.clone(), Parameterisation::Epsilon, move |t| level.level(t));
    // Scaled so little that x itself has a part in the result.
    let steps = schedule.steps(&[999.0, 499.0, 200.0]).unwrap();
    let (x, mut noise) = begin(&data, steps[0].level, 20_000);
    let found = sample(&Lcm::new(0.001).unwrap(), &guider, x, &steps, &mut noise).unwrap();
    let (a, s) = (steps[0].level.alpha(), steps[0].level.sigma());
    let (mut m, mut v) = (a * mean, a * a * deviation * deviation + s * s);
    for (i, step) in steps.iter().enumerate() {
        let (a, s) = (step.level.alpha(), step.level.sigma());
        let t = step.timestep * 0.001;
        let (skip, out) = (0.25 / (t * t + 0.25), t / (t * t + 0.25f64).sqrt());
        let gain = a * deviation * deviation / (a * a * deviation * deviation + s * s);
        m = out * (mean + gain * (m - a * mean)) + skip * m;
        v *= (out * gain + skip).powi(2);
        if i + 1 < steps.len() {
            (m, v) = (step.next.alpha() * m, step.next.alpha().powi(2) * v + step.next.sigma().powi(2));
        }
    }
    let (of_mean, of_variance) =
        (found.mean(Kind::Double).double_value(&[]), found.var(true).double_value(&[]));
    assert!((of_mean - m).abs() < 4.0 * (v / 20_000.0).sqrt(), "{of_mean} {m}");
    assert!((of_variance / v - 1.0).abs() < 4.0 * (2.0f64 / 20_000.0).sqrt(), "{of_variance} {v}");
}

#[test]
fn solvers_are_of_their_order() {
    // Of one Gaussian the probability-flow equation keeps (x − α μ) / √(α² s² + σ²). Steps end before the noise does:
    // the last step to none is of first order for all.
    type Level = fn(f64) -> Result<NoiseLevel>;
    let diffusion: Level = |t| NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2));
    let (mean, deviation) = (1.5, 0.7);
    let dpm = |order| DpmSolver::new(order).unwrap();
    let unipc = |order| UniPc::new(order).unwrap().with_lower_order_final(false);
    let cases: Vec<(&str, Box<dyn Sampler>, Level, f64)> = vec![
        ("Euler", Box::new(Euler), diffusion, 1.0),
        ("DDIM", Box::new(Ddim::new(0.0).unwrap()), diffusion, 1.0),
        ("flow", Box::new(FlowMatchEuler::default()), NoiseLevel::from_flow, 1.0),
        ("DPM-Solver++ 1", Box::new(dpm(1)), diffusion, 1.0),
        ("Heun", Box::new(Heun), diffusion, 2.0),
        ("DPM-Solver++ 2M", Box::new(dpm(2)), diffusion, 2.0),
        ("DPM-Solver++ 2M, Heun", Box::new(dpm(2).with_type(DpmSolverType::Heun)), diffusion, 2.0),
        // Its first step, of first order, leaves an error of second order that is soon the greater one.
        ("DPM-Solver++ 3M", Box::new(dpm(3)), diffusion, 2.6),
        ("DPM-Solver++ 2M, flow", Box::new(dpm(2)), NoiseLevel::from_flow, 2.0),
        ("PNDM", Box::new(Pndm::default()), diffusion, 2.0),
        ("PNDM, means of v", Box::new(Pndm::default().with_means_of_v()), diffusion, 1.0),
        ("UniPC-1", Box::new(unipc(1)), diffusion, 2.0),
        ("UniPC-2", Box::new(unipc(2)), diffusion, 3.0),
        ("UniPC-2, bh1", Box::new(unipc(2).with_type(UniPcType::Bh1)), diffusion, 3.0),
    ];
    for (name, sampler, level, order) in cases {
        let data =
            Mixture::new([1, 1, 1], vec![Component { mean: vec![mean], deviation, weight: 1.0, class: 0 }])
                .unwrap();
        let guider = guider(data, Parameterisation::V, level);
        let (from, to) = (0.9, 0.1);
        let x = Tensor::arange(7, DOUBLE_CPU).sin().view([7, 1, 1, 1]);
        let (first, last) = (level(from).unwrap(), level(to).unwrap());
        let width = |l: NoiseLevel| (l.alpha().powi(2) * deviation * deviation + l.sigma().powi(2)).sqrt();
        let exact = (&x - first.alpha() * mean) * (width(last) / width(first)) + last.alpha() * mean;
        let error = |n: usize| {
            let times: Vec<f64> = (0..n).map(|i| from + (to - from) * i as f64 / n as f64).collect();
            let steps = steps(&times, level, last).unwrap();
            distance(&sample(&*sampler, &guider, x.shallow_clone(), &steps, &mut Never).unwrap(), &exact)
        };
        let (coarse, fine) = (error(80), error(160));
        let found = (coarse / fine).log2();
        println!("{name}: order {found:.2}, error {fine:.1e} in 160 steps");
        assert!((found - order).abs() < 0.25, "{name}: order {found}, errors {coarse:.1e} {fine:.1e}");
    }
}

/// A run with predictions that are an odd function of x, and noise of a seed.
fn run(
    sampler: &dyn Sampler,
    steps: &[Step],
    shift: impl Fn(&Tensor, &Step) -> (Option<Tensor>, f64),
) -> Result<Tensor> {
    let x = Tensor::arange(12, DOUBLE_CPU).sin().view([2, 2, 3, 1]);
    let mut predict = |x: &Tensor, step: &Step| {
        let (shift, by_hand) = shift(x, step);
        let epsilon = x.cos() * 0.8 + x * 0.2 - (x * 3.0).cos() * (by_hand * step.level.sigma());
        let prediction = Prediction::new(epsilon, Parameterisation::Epsilon);
        Ok(Guided { x: x.shallow_clone(), prediction, shift })
    };
    sampler.sample(&mut predict, x, steps, &mut Noise::seeded(3).streams(2))
}

fn ten_steps() -> Vec<Step> {
    let schedule = DiffusionSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap();
    schedule.steps(&schedule.timesteps(10, Spacing::Trailing).unwrap()).unwrap()
}

#[test]
fn samplers_that_are_one_agree() {
    let steps = ten_steps();
    let plain = |sampler: &dyn Sampler, steps: &[Step]| run(sampler, steps, |_, _| (None, 0.0)).unwrap();
    let ddim = plain(&Ddim::new(0.0).unwrap(), &steps);
    assert!(distance(&plain(&Euler, &steps), &ddim) < 1e-12);
    assert!(distance(&plain(&EulerAncestral::new(0.0).unwrap(), &steps), &ddim) < 1e-12);
    // DPM-Solver++ of first order is DDIM (Lu et al. 2022, section 4.1); UniPC without a corrector is, too.
    assert!(distance(&plain(&DpmSolver::new(1).unwrap(), &steps), &ddim) < 1e-12);
    let predictor = UniPc::new(1).unwrap().with_disabled_corrector((0..10).collect());
    assert!(distance(&plain(&predictor, &steps), &ddim) < 1e-12);
    assert!(distance(&plain(&UniPc::new(1).unwrap(), &steps), &ddim) > 1e-3);
    // DDPM with the small variance is DDIM with eta 1 (Song et al. 2020, section 4.1), and so are the noises of
    // Euler ancestral and of the stochastic solver of first order.
    let ancestral = plain(&Ddim::new(1.0).unwrap(), &steps);
    assert!(distance(&ancestral, &ddim) > 0.1);
    assert!(distance(&plain(&Ddpm::new(Variance::FixedSmall), &steps), &ancestral) < 1e-12);
    assert!(distance(&plain(&EulerAncestral::default(), &steps), &ancestral) < 1e-12);
    assert!(distance(&plain(&DpmSolver::new(1).unwrap().stochastic().unwrap(), &steps), &ancestral) < 1e-12);
    // Flow: x of rectified flow is x of diffusion, scaled.
    let levels: Vec<NoiseLevel> = [0.9, 0.6, 0.2].map(|t| NoiseLevel::from_flow(t).unwrap()).to_vec();
    let flow = steps_at(&[900.0, 600.0, 200.0], &levels, NoiseLevel::CLEAN).unwrap();
    assert!(distance(&plain(&FlowMatchEuler::default(), &flow), &plain(&Euler, &flow)) < 1e-12);
}

#[test]
fn gradients_shift_each_sampler_in_its_way() {
    let steps = ten_steps();
    let order = |order| DpmSolver::new(order).unwrap();
    let solvers: Vec<Box<dyn Sampler>> = vec![
        Box::new(Euler),
        Box::new(EulerAncestral::default()),
        Box::new(Heun),
        Box::new(order(2)),
        Box::new(order(3)),
        Box::new(order(2).stochastic().unwrap()),
        Box::new(UniPc::new(3).unwrap()),
        Box::new(Pndm::default()),
        Box::new(Lcm::default()),
        Box::new(Ddim::new(0.3).unwrap()),
    ];
    for (i, solver) in solvers.iter().enumerate() {
        // ε' = ε − σ · shift
        let shifted = run(&**solver, &steps, |x, _| (Some((x * 3.0).cos()), 0.0)).unwrap();
        let by_hand = run(&**solver, &steps, |_, _| (None, 1.0)).unwrap();
        assert!(
            distance(&shifted, &by_hand) < 1e-9
                && distance(&shifted, &run(&**solver, &steps, |_, _| (None, 0.0)).unwrap()) > 0.01,
            "{i}"
        );
    }
    // DDPM: μ + Σ · shift, with Σ of the step.
    let one = &steps[4..5];
    let (level, next) = (one[0].level, one[0].next);
    let beta = 1.0 - (level.alpha() / next.alpha()).powi(2);
    for (variance, sigma) in
        [(Variance::FixedSmall, beta * (next.sigma() / level.sigma()).powi(2)), (Variance::FixedLarge, beta)]
    {
        let ddpm = Ddpm::new(variance);
        let moved = run(&ddpm, one, |x, _| (Some(x.ones_like()), 0.0)).unwrap()
            - run(&ddpm, one, |_, _| (None, 0.0)).unwrap();
        assert!(distance(&moved, &(moved.ones_like() * sigma)) < 1e-12, "{variance:?}");
    }
    assert!(
        run(&Ddpm::new(Variance::LearnedRange), one, |_, _| (None, 0.0)).is_err(),
        "no variance was learned"
    );
}

#[test]
fn numbers_that_are_none_are_found_in_their_step() {
    let steps = ten_steps();
    let samplers: Vec<Box<dyn Sampler>> = vec![
        Box::new(Ddim::new(0.0).unwrap()),
        Box::new(Ddpm::new(Variance::FixedSmall)),
        Box::new(Euler),
        Box::new(EulerAncestral::default()),
        Box::new(Heun),
        Box::new(DpmSolver::new(2).unwrap()),
        Box::new(UniPc::new(2).unwrap()),
        Box::new(Pndm::default()),
        Box::new(Lcm::default()),
    ];
    for sampler in samplers {
        for (bad, found) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "infinity")] {
            let mut predict = |x: &Tensor, step: &Step| {
                let value = x * 0.1;
                if step.index == 3 {
                    let _ = value.get(1).view(-1).get(2).fill_(bad);
                }
                let prediction = Prediction::new(value, Parameterisation::Epsilon);
                Ok(Guided { x: x.shallow_clone(), prediction, shift: None })
            };
            let x = Tensor::ones([2, 1, 2, 2], DOUBLE_CPU);
            let error =
                sampler.sample(&mut predict, x, &steps, &mut Noise::seeded(1).streams(2)).unwrap_err();
            assert_eq!(error.to_string(), format!("the prediction: {found} at row 1, step 3 of 10"));
        }
    }
    let mut never = |_: &Tensor, _: &Step| panic!("not asked");
    let x = Tensor::ones([1, 1, 2, 2], DOUBLE_CPU) * f64::NAN;
    let error = Euler.sample(&mut never, x, &steps, &mut Never).unwrap_err();
    assert!(matches!(&error, Error::NotFinite { at, .. } if at == "row 0, step 0 of 10"), "{error}");
}

#[test]
fn thresholds_are_as_defined() {
    let x0 = Tensor::from_slice(&[-3.0, -1.0, 0.5, 2.0, 0.1, 0.2, -0.3, 0.4]).view([2, 1, 2, 2]);
    let clip = Threshold::clip(1.5).unwrap().apply(&x0).unwrap();
    assert!(distance(&clip, &x0.clamp(-1.5, 1.5)) == 0.0);
    // |x̂₀| sorted: 0.5, 1, 2, 3: the quantile ½ is 1.5; the second sample stays below 1.
    let dynamic = Threshold::dynamic(0.5, f64::INFINITY).unwrap().apply(&x0).unwrap();
    let expected =
        Tensor::from_slice(&[-1.0, -1.0 / 1.5, 0.5 / 1.5, 1.0, 0.1, 0.2, -0.3, 0.4]).view([2, 1, 2, 2]);
    assert!(distance(&dynamic, &expected) < 1e-15);
    // At most 1 is clipping, which is diffusers' default.
    assert!(
        distance(&Threshold::dynamic(0.5, 1.0).unwrap().apply(&x0).unwrap(), &x0.clamp(-1.0, 1.0)) < 1e-15
    );
    assert_eq!(
        Threshold::dynamic(0.9, 2.0).unwrap().apply(&x0.to_kind(Kind::BFloat16)).unwrap().kind(),
        Kind::BFloat16
    );
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Threshold::clip(bad).is_err());
    }
    assert!(Threshold::dynamic(1.1, 2.0).is_err() && Threshold::dynamic(0.5, 0.9).is_err());
    // A sampler under it sees both x̂₀ and ε̂ of the clipped one; DDIM's own clips x̂₀ alone.
    let steps = &ten_steps()[..1];
    let within = |sampler: &dyn Sampler| run(sampler, steps, |_, _| (None, 0.0)).unwrap();
    let ddim = || Ddim::new(0.0).unwrap();
    let clip = Threshold::clip(0.1).unwrap();
    let x = Tensor::arange(12, DOUBLE_CPU).sin().view([2, 2, 3, 1]);
    let epsilon = x.cos() * 0.8 + &x * 0.2;
    let (level, next) = (steps[0].level, steps[0].next);
    let x0 = ((&x - &epsilon * level.sigma()) / level.alpha()).clamp(-0.1, 0.1);
    let anew = (&x - &x0 * level.alpha()) / level.sigma();
    assert!(
        distance(&within(&Thresholded::new(ddim(), clip)), &(&x0 * next.alpha() + anew * next.sigma()))
            < 1e-12
    );
    assert!(
        distance(&within(&ddim().with_threshold(clip)), &(&x0 * next.alpha() + epsilon * next.sigma()))
            < 1e-12
    );
}

#[test]
fn what_is_no_setting_or_no_way_is_refused() {
    fn value<T>(result: &Result<T>) -> bool {
        matches!(result, Err(Error::Value { .. }))
    }
    assert!(
        value(&DpmSolver::new(0))
            && value(&DpmSolver::new(4))
            && value(&UniPc::new(0))
            && value(&UniPc::new(4))
    );
    assert!(matches!(DpmSolver::new(3).unwrap().stochastic(), Err(Error::Unsupported { .. })));
    assert!(value(&EulerAncestral::new(-0.1)) && value(&EulerAncestral::new(f64::NAN)));
    assert!(value(&Lcm::new(0.0)) && value(&Lcm::new(f64::INFINITY)));
    let karras = SigmaSpacing::Karras { rho: 7.0 };
    assert!(
        value(&karras.sigmas(1.0, 2.0, 5))
            && value(&karras.sigmas(1.0, 0.0, 5))
            && value(&karras.sigmas(2.0, 1.0, 0))
    );
    assert!(value(&SigmaSpacing::Karras { rho: 0.0 }.sigmas(2.0, 1.0, 5)));
    assert!(
        value(&flow_sigmas(0, 1000, 1.0))
            && value(&flow_sigmas(5, 1000, 0.0))
            && value(&flow_sigmas(5, 0, 1.0))
    );
    let steps = ten_steps();
    assert!(
        value(&from_strength(&steps, 1.1))
            && value(&from_strength(&steps, 0.05))
            && value(&from_strength(&steps, f64::NAN))
    );
    assert_eq!(from_strength(&steps, 0.35).unwrap(), &steps[7..]);
    assert_eq!(from_strength(&steps, 1.0).unwrap(), &steps[..]);
    assert!(value(&steps_at(&[1.0], &[], NoiseLevel::CLEAN)));
    let ran = |sampler: &dyn Sampler, steps: &[Step]| run(sampler, steps, |_, _| (None, 0.0));
    assert!(value(&ran(&FlowMatchEuler::default(), &steps)), "levels that are not of flow");
    // Pure noise, where ε does not say what x₀ is and ln(α / σ) is no number.
    let pure = NoiseLevel::from_flow(1.0).unwrap();
    let first = steps_at(&[999.0, 500.0], &[pure, steps[5].level], NoiseLevel::CLEAN).unwrap();
    for sampler in [&Euler as &dyn Sampler, &Heun, &DpmSolver::new(2).unwrap(), &UniPc::new(2).unwrap()] {
        assert!(value(&ran(sampler, &first)));
    }
    // Noise that grows.
    let up = steps_at(&[100.0, 500.0], &[steps[8].level, steps[5].level], steps[1].level).unwrap();
    for sampler in [
        &DpmSolver::new(2).unwrap() as &dyn Sampler,
        &UniPc::new(2).unwrap(),
        &EulerAncestral::default(),
        &Ddpm::new(Variance::FixedSmall),
    ] {
        assert!(value(&ran(sampler, &up)));
    }
    assert!(ran(&Euler, &up).is_ok(), "inversion");
    for sampler in [&Ddpm::new(Variance::FixedLarge) as &dyn Sampler, &Euler, &Heun, &Lcm::default()] {
        assert!(value(&ran(sampler, &[])) && value(&ran(sampler, &[steps[0], steps[2]])));
    }
}

#[test]
fn schedules_are_as_defined() {
    let linear = DiffusionSchedule::linear(1e-4, 0.02, 1000).unwrap();
    let zero = linear.zero_terminal_snr().unwrap();
    assert_eq!(zero.alphas_cumprod()[999], 0.0);
    assert!((zero.alphas_cumprod()[0] - linear.alphas_cumprod()[0]).abs() < 1e-15);
    // Between whole timesteps, there and back.
    for t in [0.0, 0.25, 17.0, 500.75, 999.0] {
        let level = linear.level_between(t).unwrap();
        assert!((level.alpha().powi(2) + level.sigma().powi(2) - 1.0).abs() < 1e-12);
        assert!((linear.timestep_of(level.sigma() / level.alpha()) - t).abs() < 0.05, "{t}");
    }
    assert_eq!((linear.timestep_of(1e9), linear.timestep_of(0.0)), (999.0, 0.0));
    assert!(
        linear.level_between(999.5).is_err()
            && linear.level_between(-0.1).is_err()
            && linear.level_between(f64::NAN).is_err()
    );
    let karras = SigmaSpacing::Karras { rho: 7.0 }.sigmas(80.0, 0.002, 3).unwrap();
    let middle = (0.5 * (80f64.powf(1.0 / 7.0) + 0.002f64.powf(1.0 / 7.0))).powi(7);
    assert!(
        (karras[0] - 80.0).abs() < 1e-10
            && (karras[1] - middle).abs() < 1e-12
            && (karras[2] - 0.002).abs() < 1e-15
    );
    let exponential = SigmaSpacing::Exponential.sigmas(100.0, 0.01, 3).unwrap();
    assert!((exponential[1] - 1.0).abs() < 1e-12);
    assert_eq!(flow_sigmas(2, 1000, 1.0).unwrap(), [1.0, 0.001]);
    // Solvers leave the least noise out, and the timesteps that are left reach the last.
    let solver = linear.solver_timesteps(4, Spacing::Linspace).unwrap();
    assert_eq!(solver, [999.0, 749.0, 500.0, 250.0]);
    assert!(linear.solver_timesteps(1000, Spacing::Linspace).is_err());
}
