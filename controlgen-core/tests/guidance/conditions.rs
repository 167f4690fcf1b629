//! Conditions: one for all samples or one a sample, and the controls they were prepared under.

use controlgen_core::energy::Noised;
use controlgen_core::guidance::{Branch, Guided, Guider, Memory, Needs, Outputs, Step};
use controlgen_core::{
    At, Binding, Condition, Control, Controls, Denoiser, Error, Guidance, Lane, Parameterisation, Pass,
    Result, SiteKind, SiteMap,
};
use tch::{Kind, Tensor};

use crate::stages::{ClassifierFree, Tilt};
use crate::{assert_close, clean, diffusion, epsilon, model, null_and, plain, predict, step, weighted, x};

#[test]
fn conditions_may_differ_by_sample() {
    let at = step(0.5, diffusion);
    let model = model(Parameterisation::Epsilon);
    let classes = || [2, 0, 1].map(Condition::Class).into_iter().collect::<Vec<_>>();
    let guider = Guider::new(model.handle(), vec![vec![Condition::Null], classes()], None, 1).unwrap();
    let mut run = guider.start(&[at]).unwrap();
    // Twice: the second time from the rows that the run has kept.
    for _ in 0..2 {
        let guided = guider.predict(&x(3), &at, &mut run).unwrap();
        for (i, class) in [2, 0, 1].into_iter().enumerate() {
            let row = x(3).narrow(0, i as i64, 1);
            let expected = epsilon(&row, Some(class), at.level);
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
    let model = model(Parameterisation::Epsilon);
    let conditions = [0, 1, 2].map(|class| vec![Condition::Class(class)]);
    let guider = Guider::new(model.handle(), conditions.into(), None, 2).unwrap().with(Turns);
    let steps = [0, 1, 2, 3].map(|index| Step { index, ..step(0.5, diffusion) });
    let mut run = guider.start(&steps).unwrap();
    for (step, class) in steps.iter().zip([0, 1, 0, 1]) {
        let guided = guider.predict(&x(2), step, &mut run).unwrap();
        let expected = epsilon(&x(2), Some(class), step.level);
        assert_close(&guided.prediction.value, &expected, 1e-12);
    }
}

#[test]
fn controls_on_conditions_act_or_are_refused() {
    let model = model(Parameterisation::Epsilon);
    let controls = Controls::bind(model.sites(), vec![Box::new(Tilt)]).unwrap();
    let at = step(0.5, diffusion);
    let guider = Guider::new(model.handle(), null_and(3), Some(controls.handle()), 1).unwrap();
    let tilted = weighted([1.0, 1.0, 1.0, Tilt::FACTOR, 1.0]).of_class(3).unwrap();
    let expected = tilted.epsilon(&Noised { x: x(2), level: at.level }).unwrap();
    assert!((&expected - epsilon(&x(2), Some(3), at.level)).abs().max().double_value(&[]) > 0.1);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &expected, 1e-12);
    // Prepared without them, they would have no effect: refused.
    let pass = Pass::with_controls(&controls);
    let prepared = model.prepare(&[Condition::Class(3)], &Pass::default()).unwrap();
    let t = Tensor::from_slice(&[0.5]);
    assert!(matches!(model.predict(&x(1), &t, &prepared, &pass), Err(Error::ForeignState { .. })));
    assert!(model.predict(&x(1), &t, &prepared, &Pass::default()).is_ok());
    let other = plain(Parameterisation::Epsilon).0;
    assert!(matches!(Guider::new(other.handle(), null_and(3), Some(controls), 1), Err(Error::ForeignSites)));
}

#[test]
fn the_sample_is_checked_against_the_model() {
    let (model, guider) = plain(Parameterisation::Epsilon);
    let at = step(0.5, diffusion);
    for bad in [x(2).view([2, 2]), x(2).view([1, 4, 1, 1]), x(2).narrow(0, 0, 0)] {
        assert!(predict(&guider, &bad, &at).is_err());
    }
    assert!(matches!(predict(&guider, &x(2).to_kind(Kind::Int64), &at), Err(Error::Kind { .. })));
    assert_eq!(model.counts().0, 0);
    let prepared = model.prepare(&[Condition::Null, Condition::Null], &Pass::default()).unwrap();
    let predict = |t: Tensor| model.predict(&x(2), &t, &prepared, &Pass::default());
    assert!(matches!(predict(Tensor::from_slice(&[0.5])), Err(Error::Shape { .. })));
    assert!(matches!(predict(Tensor::from_slice(&[1i64, 1])), Err(Error::Kind { .. })));
}

#[test]
fn rows_may_be_of_several_roles() {
    /// Leaves what the lanes are, as numbers, in place of the prediction.
    struct Number;
    impl Control for Number {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.select(SiteKind::Hidden, "responsibilities")?.into_iter().for_each(|site| to.at(site, 0));
            Ok(())
        }
        fn hidden(&self, at: At<'_>, h: Tensor, _: &Tensor) -> Result<Tensor> {
            let number = |lane: &Lane| f64::from(lane.condition * 10 + lane.sample);
            let numbers: Vec<f64> = at.pass.lanes.unwrap().rows().iter().map(number).collect();
            Ok(h.zeros_like() + Tensor::from_slice(&numbers).view([-1, 1, 1]))
        }
    }
    let model = model(Parameterisation::Sample);
    let at = step(0.5, diffusion);
    let [source, edit, other] = [0, 1, 2].map(Condition::Class);
    let conditions = |entries: Vec<Condition>| vec![vec![Condition::Null], entries];
    let guider = |entries, controls| Guider::new(model.handle(), conditions(entries), controls, 1).unwrap();
    // Rows: source of samples 0, 1, edit of samples 0, 1; an entry a role.
    let two = guider(vec![source, edit], None).with_roles(2).unwrap();
    let found = predict(&two, &x(4), &at).unwrap().prediction.value;
    for (row, class) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        let x = x(4).narrow(0, row, 1);
        assert_close(&found.narrow(0, row, 1), &clean(&x, Some(class), at.level), 1e-12);
    }
    // What the lanes were: the responsibilities were all one number, and x̂₀ is linear in them.
    let controls = Controls::bind(model.sites(), vec![Box::new(Number)]).unwrap();
    let numbered = guider(vec![Condition::Class(0)], Some(controls)).with_roles(2).unwrap();
    let same = Tensor::ones([4, 2, 1, 1], tch::kind::DOUBLE_CPU);
    let found = predict(&numbered.with(ClassifierFree(1.0)), &same, &at).unwrap().prediction.value;
    let numbers = found.select(1, 0).view(-1) / found.double_value(&[0, 0, 0, 0]) * 20.0;
    assert_close(&numbers, &Tensor::from_slice(&[20.0, 21.0, 30.0, 31.0]), 1e-9);
    assert!(matches!(predict(&two, &x(3), &at), Err(Error::Value { .. })), "three rows of two roles");
    let error =
        predict(&guider((0..3).map(|_| other.handle()).collect(), None).with_roles(2).unwrap(), &x(4), &at)
            .map(drop)
            .unwrap_err();
    assert!(error.to_string().contains("expected 1, 2 or 4, found 3"), "{error}");
    assert!(matches!(guider(vec![Condition::Null], None).with_roles(0).map(drop), Err(Error::Value { .. })));
}
