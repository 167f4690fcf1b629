//! Conditions: one for all samples or one a sample, and the controls they were prepared under.

use std::sync::atomic::Ordering::Relaxed;

use controlgen_core::guidance::{Branch, Guided, Guider, Memory, Needs, Outputs, Step};
use controlgen_core::{Condition, Controls, Denoiser, Error, Guidance, Parameterisation, Pass, Result};
use tch::{Kind, Tensor};

use crate::gaussian::{Gaussian, diffusion};
use crate::stages::Double;
use crate::{assert_close, null_and, plain, predict, step, x};

#[test]
fn conditions_may_differ_by_sample() {
    let at = step(0.5, diffusion);
    let model = Gaussian::new(Parameterisation::Epsilon, diffusion);
    let classes = || [2, 0, 1].map(Condition::Class).into_iter().collect::<Vec<_>>();
    let guider = Guider::new(model.handle(), vec![vec![Condition::Null], classes()], None, 1).unwrap();
    let mut run = guider.start(&[at]).unwrap();
    // Twice: the second time from the rows that the run has kept.
    for _ in 0..2 {
        let guided = guider.predict(&x(3), &at, &mut run).unwrap();
        for (i, class) in [2, 0, 1].into_iter().enumerate() {
            let row = x(3).narrow(0, i as i64, 1);
            let expected = Gaussian::epsilon(&row, Gaussian::mean(class), at.level);
            assert_close(&guided.prediction.value.narrow(0, i as i64, 1), &expected, 1e-12);
        }
    }
    assert!(matches!(guider.predict(&x(2), &at, &mut run), Err(Error::Value { .. })));
    assert!(matches!(Guider::new(model.handle(), vec![], None, 0), Err(Error::Value { .. })));
    assert!(matches!(Guider::new(model.handle(), null_and(0), None, 2), Err(Error::Value { .. })));
    assert!(matches!(Guider::new(model.handle(), vec![vec![]], None, 0), Err(Error::Value { .. })));
    let unknown = Guider::new(model.handle(), null_and(9), None, 1);
    assert!(matches!(unknown, Err(Error::Unsupported { .. })));
}

#[test]
fn a_plan_may_change_from_step_to_step() {
    /// Another condition alone, by turns.
    struct Turns;
    impl Guidance for Turns {
        fn handle(&self) -> Box<dyn Guidance> {
            Box::new(Self)
        }
        fn name(&self) -> &'static str {
            "turns"
        }
        fn needs(&self, step: &Step) -> Needs {
            Needs::branches([Branch::of(step.index as u32 % 2)])
        }
        fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
            let prediction = out.get(Branch::of(step.index as u32 % 2))?.handle();
            Ok(Guided { prediction, ..so_far })
        }
    }
    let model = Gaussian::new(Parameterisation::Epsilon, diffusion);
    let conditions = [0, 1, 2].map(|class| vec![Condition::Class(class)]);
    let guider = Guider::new(model.handle(), conditions.into(), None, 2).unwrap().with(Turns);
    let steps = [0, 1, 2, 3].map(|index| Step { index, ..step(0.5, diffusion) });
    let mut run = guider.start(&steps).unwrap();
    for (step, class) in steps.iter().zip([0, 1, 0, 1]) {
        let guided = guider.predict(&x(2), step, &mut run).unwrap();
        let expected = Gaussian::epsilon(&x(2), Gaussian::mean(class), step.level);
        assert_close(&guided.prediction.value, &expected, 1e-12);
    }
}

#[test]
fn controls_on_conditions_act_or_are_refused() {
    let model = Gaussian::new(Parameterisation::Epsilon, diffusion);
    let controls = Controls::bind(model.sites(), vec![Box::new(Double)]).unwrap();
    let at = step(0.5, diffusion);
    let guider = Guider::new(model.handle(), null_and(0), Some(controls.handle()), 1).unwrap();
    let mean = Gaussian::mean(0).map(|mu| mu * 2.0);
    let expected = Gaussian::epsilon(&x(2), mean, at.level);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &expected, 1e-12);
    // Prepared without them, they would have no effect: refused.
    let pass = Pass::with_controls(&controls);
    let prepared = model.prepare(&[Condition::Class(0)], &Pass::default()).unwrap();
    let t = Tensor::from_slice(&[0.5]);
    assert!(matches!(model.predict(&x(1), &t, &prepared, &pass), Err(Error::ForeignState { .. })));
    assert!(model.predict(&x(1), &t, &prepared, &Pass::default()).is_ok());
    let other = Gaussian::new(Parameterisation::Epsilon, diffusion);
    assert!(matches!(Guider::new(other.handle(), null_and(0), Some(controls), 1), Err(Error::ForeignSites)));
}

#[test]
fn the_sample_is_checked_against_the_model() {
    let (model, guider) = plain(Parameterisation::Epsilon);
    let at = step(0.5, diffusion);
    for bad in [x(2).view([2, 2]), x(2).view([1, 4, 1, 1]), x(2).narrow(0, 0, 0)] {
        assert!(predict(&guider, &bad, &at).is_err());
    }
    assert!(matches!(predict(&guider, &x(2).to_kind(Kind::Int64), &at), Err(Error::Kind { .. })));
    assert_eq!(model.calls.load(Relaxed), 0);
    let prepared = model.prepare(&[Condition::Null, Condition::Null], &Pass::default()).unwrap();
    let predict = |t: Tensor| model.predict(&x(2), &t, &prepared, &Pass::default());
    assert!(matches!(predict(Tensor::from_slice(&[0.5])), Err(Error::Shape { .. })));
    assert!(matches!(predict(Tensor::from_slice(&[1i64, 1])), Err(Error::Kind { .. })));
}
