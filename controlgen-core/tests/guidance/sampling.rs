//! Whole runs: memory, blending, a sampler, threads.

use controlgen_core::guidance::{Guided, Guider, GuiderRun, Memory, Needs, Outputs, Step};
use controlgen_core::{Denoiser, Error, Guidance, Parameterisation, Result};
use tch::Tensor;

use crate::stages::ClassifierFree;
use crate::{
    COMPONENTS, S, Schedule, assert_close, diffusion, epsilon, flow, null_and, plain, predict, scheduled,
    step, x,
};

#[test]
fn a_stage_may_replace_x() {
    struct Blend(f64);
    impl Guidance for Blend {
        fn handle(&self) -> Box<dyn Guidance> {
            Box::new(Self(self.0))
        }
        fn name(&self) -> &'static str {
            "blend"
        }
        fn needs(&self, _step: &Step) -> Needs {
            Needs::default()
        }
        fn before(&self, _step: &Step, x: Tensor) -> Result<Tensor> {
            Ok(if self.0.is_nan() { x.f_narrow(0, 0, 1)? } else { x.f_add_scalar(self.0)? })
        }
        fn guide(&self, _: &Step, _: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
            Ok(so_far)
        }
    }
    let at = step(0.5, diffusion);
    let (_, guider) = plain(Parameterisation::V);
    let guided = predict(&guider.with(Blend(0.3)), &x(2), &at).unwrap();
    assert_close(&guided.x, &(x(2) + 0.3), 1e-12);
    let expected = epsilon(&(x(2) + 0.3), Some(0), at.level);
    assert_close(&guided.epsilon(at.level).unwrap(), &expected, 1e-11);
    let (_, guider) = plain(Parameterisation::V);
    assert!(matches!(predict(&guider.with(Blend(f64::NAN)), &x(2), &at), Err(Error::Shape { .. })));
}

#[test]
fn memory_belongs_to_the_run() {
    struct Counts;
    impl Guidance for Counts {
        fn handle(&self) -> Box<dyn Guidance> {
            Box::new(Self)
        }
        fn name(&self) -> &'static str {
            "counts"
        }
        fn needs(&self, _step: &Step) -> Needs {
            Needs::default()
        }
        fn guide(&self, _: &Step, out: &Outputs<'_>, so_far: Guided, memory: &mut Memory) -> Result<Guided> {
            let seen: &mut f64 = memory.get_or(|| Ok(0.0))?;
            *seen += 1.0;
            assert!(memory.get::<u8>().is_none());
            let seen = *memory.get::<f64>().unwrap();
            so_far.shifted(Tensor::f_full_like(out.x(), seen)?)
        }
    }
    let at = step(0.5, diffusion);
    let (_, guider) = plain(Parameterisation::Epsilon);
    let guider = guider.with(Counts);
    let (mut first, mut second) = (guider.start(&[at]).unwrap(), guider.start(&[at]).unwrap());
    let seen = |run: &mut GuiderRun| {
        guider.predict(&x(1), &at, run).unwrap().shift.unwrap().double_value(&[0, 0, 0, 0])
    };
    assert_eq!(
        [seen(&mut first), seen(&mut first), seen(&mut second), seen(&mut first)],
        [1.0, 2.0, 1.0, 3.0]
    );
    assert!(matches!(guider.predict(&x(1), &at, &mut GuiderRun::default()), Err(Error::ForeignState { .. })));
    let mut memory = Memory::default();
    memory.get_or(|| Ok(1u8)).unwrap();
    assert!(matches!(memory.get_or(|| Ok(1.0)), Err(Error::ForeignState { .. })));
}

/// DDIM (Song et al. 2021), which knows nothing of guidance.
fn ddim(mut x: Tensor, steps: &[Step], mut predict: impl FnMut(&Tensor, &Step) -> Guided) -> Tensor {
    for step in steps {
        let guided = predict(&x, step);
        let (epsilon, x0) = (guided.epsilon(step.level).unwrap(), guided.x0(step.level).unwrap());
        x = x0 * step.next.alpha() + epsilon * step.next.sigma();
    }
    x
}

#[test]
fn a_sampler_reaches_the_closed_form() {
    // For a Gaussian the probability-flow equation is solved by keeping (x − α μ) / √(α² S² + σ²).
    let mean = Tensor::from_slice(&COMPONENTS[0].0).view([1, 2, 1, 1]);
    let forms = [(diffusion as Schedule, 0.98), (flow, 1.0)];
    for ((schedule, from), form) in
        forms.into_iter().zip([Parameterisation::Epsilon, Parameterisation::Velocity])
    {
        let n = 400;
        let time = |i: usize| from * (1.0 - i as f64 / n as f64);
        let steps: Vec<Step> = (0..n)
            .map(|i| {
                let (level, next) = (schedule(time(i)), schedule(time(i + 1)));
                Step { index: i, of: n, timestep: time(i), level, next }
            })
            .collect();
        let model = scheduled(form, schedule);
        let guider = Guider::new(model.handle(), null_and(0), None, 1).unwrap().with(ClassifierFree(1.0));
        let mut run = guider.start(&steps).unwrap();
        let found = ddim(x(3), &steps, |x, step| guider.predict(x, step, &mut run).unwrap());
        let (a, s) = (steps[0].level.alpha(), steps[0].level.sigma());
        let expected = &mean + (x(3) - &mean * a) * (S / (a * a * S * S + s * s).sqrt());
        assert_close(&found, &expected, 2e-2);
        assert_eq!(model.counts().0, n as u64);
    }
}

#[test]
fn handles_cross_threads() {
    let (_, guider) = plain(Parameterisation::Epsilon);
    let guider = guider.with(ClassifierFree(2.0));
    let at = step(0.5, diffusion);
    let expected: Vec<f64> =
        predict(&guider, &x(2), &at).unwrap().prediction.value.view(-1).try_into().unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let guider = guider.handle().unwrap();
            std::thread::spawn(move || -> Vec<f64> {
                predict(&guider, &x(2), &at).unwrap().prediction.value.view(-1).try_into().unwrap()
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), expected);
    }
}
