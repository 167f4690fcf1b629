//! Branches: how predictions are combined, and in how many calls they are made.

use controlgen_core::energy::Noised;
use controlgen_core::guidance::{Branch, Guided, Guider, Memory, Needs, Outputs, Step};
use controlgen_core::testing::Mixture;
use controlgen_core::{Controls, Denoiser, Energy, Error, Guidance, Parameterisation, Prediction, Result};
use tch::Kind;

use crate::stages::{ClassifierFree, Downhill, Forget, Perturbed};
use crate::{FORMS, assert_close, data, diffusion, epsilon, model, null_and, plain, predict, step, x};

#[test]
fn without_stages_it_is_the_denoiser() {
    for form in FORMS {
        let (model, guider) = plain(form);
        let guided = predict(&guider, &x(3), &step(0.6, diffusion)).unwrap();
        let expected = epsilon(&x(3), Some(0), diffusion(0.6));
        assert_close(&guided.epsilon(diffusion(0.6)).unwrap(), &expected, 1e-12);
        assert!(guided.shift.is_none());
        assert_eq!(model.counts(), (1, 3));
    }
}

#[test]
fn classifier_free_guidance_is_its_formula_whatever_is_predicted() {
    let level = diffusion(0.6);
    let (u, c) = (epsilon(&x(3), None, level), epsilon(&x(3), Some(0), level));
    for form in FORMS {
        for scale in [0.0, 0.7, 1.0, 7.5] {
            let (model, guider) = plain(form);
            let guider = guider.with(ClassifierFree(scale));
            let guided = predict(&guider, &x(3), &step(0.6, diffusion)).unwrap();
            assert_close(&guided.epsilon(level).unwrap(), &(&u + (&c - &u) * scale), 1e-11);
            assert_eq!(model.counts(), (1, 6), "two branches, one call");
        }
        // At scale 1 it is the conditional prediction to the bit.
        let (_, guider) = plain(form);
        let conditional = predict(&guider, &x(3), &step(0.6, diffusion)).unwrap().prediction.value;
        let guided = predict(&guider.with(ClassifierFree(1.0)), &x(3), &step(0.6, diffusion)).unwrap();
        assert!(guided.prediction.value.equal(&conditional));
    }
}

#[test]
fn branches_of_a_graph_are_one_call() {
    let model = model(Parameterisation::Epsilon);
    let bind = |by_lane| Controls::bind(model.sites(), vec![Box::new(Forget { by_lane })]).unwrap();
    let at = step(0.5, diffusion);
    let (u, c) = (epsilon(&x(4), None, at.level), epsilon(&x(4), Some(3), at.level));
    // Both components of the class count alike, wherever x is.
    let alone = |k: usize| {
        let one = Mixture::new([2, 1, 1], vec![data(Some(3)).components()[k].clone()]).unwrap();
        one.epsilon(&Noised { x: x(4), level: at.level }).unwrap()
    };
    let p = (alone(0) + alone(1)) * 0.5;
    assert!((&c - &p).abs().max().double_value(&[]) > 0.1, "forgetting shows");
    let expected = &u + (&c - &u) * 3.0 + (&c - &p) * 0.5;
    let square = Energy::from_fn(|x: &Noised| {
        Ok(x.x.f_square()?.f_sum_dim_intlist(&[1i64, 2, 3][..], false, None::<Kind>)?)
    });

    // By lanes: three branches and a gradient in one call of 3 B rows.
    let lane = Branch::of(1).variant(1);
    let guider = Guider::new(model.handle(), null_and(3), Some(bind(true)), 1).unwrap();
    let guider = guider.with(ClassifierFree(3.0)).with(Perturbed(lane, 0.5)).with(Downhill::AtX(square));
    let guided = predict(&guider, &x(4), &at).unwrap();
    assert_eq!(model.counts(), (1, 12));
    model.reset_counts();
    assert_close(&guided.prediction.value, &expected, 1e-12);
    assert_close(guided.shift.as_ref().unwrap(), &(x(4) * -2.0), 1e-12);

    // A control that does not go by lanes is another graph: two calls, the same prediction.
    let graph = Branch::of(1).graph(1);
    let guider =
        Guider::new(model.handle(), null_and(3), None, 1).unwrap().with_graph(Some(bind(false))).unwrap();
    let guider = guider.with(ClassifierFree(3.0)).with(Perturbed(graph, 0.5));
    let guided = predict(&guider, &x(4), &at).unwrap();
    assert_eq!(model.counts(), (2, 12));
    assert_close(&guided.prediction.value, &expected, 1e-12);
}

#[test]
fn undeclared_and_impossible_branches_are_refused() {
    struct Asks {
        declared: Vec<Branch>,
        asked: Branch,
        late: bool,
    }
    impl Guidance for Asks {
        fn handle(&self) -> Box<dyn Guidance> {
            Box::new(Self { declared: self.declared.clone(), ..*self })
        }
        fn name(&self) -> &'static str {
            "asks"
        }
        fn needs(&self, _step: &Step) -> Needs {
            Needs::branches(self.declared.clone())
        }
        fn guide(&self, _: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
            let prediction = if self.late { out.extra(self.asked)? } else { out.get(self.asked)?.handle() };
            Ok(Guided { prediction, ..so_far })
        }
    }
    let at = step(0.5, diffusion);
    let asks = |declared: &[Branch], asked, late| {
        let (model, guider) = plain(Parameterisation::Epsilon);
        (model, guider.with(Asks { declared: declared.to_vec(), asked, late }))
    };
    let unconditional = epsilon(&x(2), None, at.level);

    let (_, guider) = asks(&[], Branch::of(0), false);
    let error = predict(&guider, &x(2), &at).map(drop).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(
        error.to_string().contains("condition 0") && error.to_string().contains("not declared"),
        "{error}"
    );
    let (model, guider) = asks(&[Branch::of(0)], Branch::of(0), false);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &unconditional, 1e-12);
    assert_eq!(model.counts().0, 1);
    let (model, guider) = asks(&[], Branch::of(0), true);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &unconditional, 1e-12);
    assert_eq!(model.counts().0, 2, "decided late, a call of its own");

    // What cannot be given is refused before the run, by the name of the stage.
    for branch in [Branch::of(2), Branch::of(1).graph(1), Branch::of(1).variant(1)] {
        let (model, guider) = asks(&[branch], branch, false);
        let error = guider.start(&[at]).map(drop).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. }) && error.to_string().contains("asks: the branch"),
            "{error}"
        );
        let late = predict(&asks(&[], branch, true).1, &x(2), &at);
        assert!(matches!(late, Err(Error::Unsupported { .. })));
        assert_eq!(model.counts().0, 0);
    }
    let alone = Outputs::new(x(1), vec![]);
    assert!(matches!(alone.base(), Err(Error::Unsupported { .. })));
    let of = |scale: f64| Prediction::new(x(1) * scale, Parameterisation::Epsilon);
    let both = Outputs::new(x(1), vec![(Branch::of(1), of(2.0)), (Branch::of(0), of(3.0))]);
    assert_close(&both.base().unwrap().value, &(x(1) * 2.0), 0.0);
    assert!(matches!(alone.extra(Branch::of(0)), Err(Error::Unsupported { .. })));
}
