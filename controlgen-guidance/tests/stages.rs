//! Stages by their formulas, in how many calls they are, and what they refuse.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{data, level, x};
use controlgen_core::energy::{Image, Noised, gradient};
use controlgen_core::guidance::{Branch, Guided, Guider, Needs, Step};
use controlgen_core::noise::Noise;
use controlgen_core::testing::{Mixture, MixtureDenoiser};
use controlgen_core::{
    At, Binding, Classifier, Condition, Control, Controls, Denoiser, Energy, EnergyFn, Error, Guidance,
    NoiseLevel, Parameterisation, Result, SiteKind, SiteMap,
};
use controlgen_diffusion::{Ddim, sample, steps};
use controlgen_guidance::{
    ClassifierFreeGuidance, ClassifierGuidance, GuidanceInterval, PerturbedAttentionGuidance,
    UniversalGuidance, class_energy,
};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

const FORMS: [Parameterisation; 4] =
    [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V, Parameterisation::Velocity];

fn at(t: f64) -> Step {
    Step { index: 3, of: 8, timestep: t, level: level(t).unwrap(), next: level(t / 2.0).unwrap() }
}

/// ε of the mixture or a class of it.
fn epsilon(x: &Tensor, class: Option<i64>, level: NoiseLevel) -> Tensor {
    let data = class.map_or(data(), |class| data().of_class(class).unwrap());
    data.epsilon(&Noised { x: x.shallow_clone(), level }).unwrap()
}

fn model(form: Parameterisation) -> MixtureDenoiser {
    MixtureDenoiser::new(data(), form, level).unwrap()
}

/// Conditions: none, class 0, class 1; class 0 is the base.
fn guider(model: &MixtureDenoiser, controls: Option<Controls>) -> Guider {
    let conditions = [Condition::Null, Condition::Class(0), Condition::Class(1)];
    Guider::new(model.handle(), conditions.map(|c| vec![c]).into(), controls, 1).unwrap()
}

fn predict(guider: &Guider, x: &Tensor, step: &Step) -> Result<Guided> {
    guider.predict(x, step, &mut guider.start(&[*step])?)
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size());
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{difference}");
}

/// On rows of variant 1 the components have their prior weights, whatever x is: the mixture's attention map, spoilt.
#[derive(Clone)]
struct Spoilt;
impl Control for Spoilt {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Hidden, "responsibilities")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn hidden(&self, at: At<'_>, h: Tensor, prior: &Tensor) -> Result<Tensor> {
        let rows: Vec<bool> = at.pass.lanes.unwrap().rows().iter().map(|lane| lane.variant == 1).collect();
        Ok(prior.f_where_self(&Tensor::f_from_slice(&rows)?.f_view([-1, 1, 1])?, &h)?)
    }
}

fn spoilt(model: &MixtureDenoiser) -> Controls {
    Controls::bind(model.sites(), vec![Box::new(Spoilt)]).unwrap()
}

/// Σ over a row of cos(x + channel).
fn wavy(x: &Tensor) -> Tensor {
    let phase = Tensor::from_slice(&[0.0, 1.0]).view([1, 2, 1, 1]);
    (x + phase).cos().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double)
}

#[test]
fn classifier_free_guidance_is_its_formula() {
    let step = at(0.6);
    let of = |class| epsilon(&x(3), class, step.level);
    let (u, c, d) = (of(None), of(Some(0)), of(Some(1)));
    for form in FORMS {
        let model = model(form);
        let run =
            |stage: ClassifierFreeGuidance| predict(&guider(&model, None).with(stage), &x(3), &step).unwrap();
        let free = |scale| ClassifierFreeGuidance::new(scale).unwrap();
        for scale in [-1.0, 0.0, 0.7, 1.0, 7.5] {
            let guided = run(free(scale)).epsilon(step.level).unwrap();
            assert_close(&guided, &(&u + (&c - &u) * scale), 1e-10);
        }
        // At 1 to the bit.
        let plain = predict(&guider(&model, None), &x(3), &step).unwrap().prediction.value;
        assert!(run(free(1.0)).prediction.value.equal(&plain));
        // Others than 0 and 1; several.
        let guided = run(free(2.0).of(2, 0)).epsilon(step.level).unwrap();
        assert_close(&guided, &(&d + (&u - &d) * 2.0), 1e-10);
        let guided = run(free(3.0).and(2, -0.5).unwrap()).epsilon(step.level).unwrap();
        assert_close(&guided, &(&u + (&c - &u) * 3.0 - (&d - &u) * 0.5), 1e-10);
    }
    assert!(matches!(ClassifierFreeGuidance::new(1.0).unwrap().and(1, 1.0), Err(Error::Value { .. })));
}

#[test]
fn perturbed_attention_guidance_is_its_formula_in_any_order() {
    let step = at(0.6);
    let model = model(Parameterisation::V);
    let (u, c) = (epsilon(&x(3), None, step.level), epsilon(&x(3), Some(1), step.level));
    // Of a class with one component the map is already what the perturbation makes of it; of all data it is not.
    let alone = |k: usize| {
        let one = Mixture::new([2, 1, 1], vec![data().components()[k].clone()]).unwrap();
        one.epsilon(&Noised { x: x(3), level: step.level }).unwrap()
    };
    let weights = data().weights();
    let p: Tensor = (0..3).map(|k| alone(k) * weights[k]).sum();
    let free = || ClassifierFreeGuidance::new(2.5).unwrap().of(0, 2);
    let perturbed = || {
        let stage = PerturbedAttentionGuidance::new(1.5).unwrap();
        stage.of(Branch::of(0).variant(1)).unwrap()
    };
    let base = |stages: fn(Guider, ClassifierFreeGuidance, PerturbedAttentionGuidance) -> Guider| {
        let conditions = [Condition::Null, Condition::Class(0), Condition::Class(1)];
        let conditions = conditions.map(|c| vec![c]).into();
        let guider = Guider::new(model.handle(), conditions, Some(spoilt(&model)), 2).unwrap();
        predict(&stages(guider, free(), perturbed()), &x(3), &step).unwrap().epsilon(step.level).unwrap()
    };
    let expected = &u + (&c - &u) * 2.5 + (&u - &p) * 1.5;
    assert!((&u - &p).abs().max().double_value(&[]) > 0.1, "the perturbation shows");
    assert_close(&base(|g, free, perturbed| g.with(free).with(perturbed)), &expected, 1e-10);
    assert_close(&base(|g, free, perturbed| g.with(perturbed).with(free)), &expected, 1e-10);
}

#[test]
fn branches_and_gradients_of_one_graph_are_one_call() {
    let model = model(Parameterisation::Epsilon);
    let by_class = |class| data().noised_classifier(class).unwrap();
    let image = Energy::from_fn(|image: &Image| Ok(wavy(&image.0)));
    let guider = guider(&model, Some(spoilt(&model)))
        .with(ClassifierFreeGuidance::new(3.0).unwrap())
        .with(PerturbedAttentionGuidance::new(0.5).unwrap())
        .with(ClassifierGuidance::new(by_class(0), 1.0).unwrap())
        .with(ClassifierGuidance::new(by_class(2), -0.3).unwrap())
        .with(UniversalGuidance::new(image, 0.1).unwrap());
    let n = 12;
    let times: Vec<f64> = (0..n).map(|i| 0.9 * (1.0 - i as f64 / n as f64)).collect();
    let steps = steps(&times, level, NoiseLevel::CLEAN).unwrap();
    let _ =
        sample(&Ddim::new(1.0).unwrap(), &guider, x(4), &steps, &mut Noise::seeded(1).streams(4)).unwrap();
    // u, c and the perturbed c: 3 rows a sample, one call a step.
    assert_eq!(model.counts(), (n, n * 3 * 4));
}

#[test]
fn gradients_go_where_their_papers_say() {
    let step = at(0.4);
    let (a, s) = (step.level.alpha(), step.level.sigma());
    for form in [Parameterisation::Epsilon, Parameterisation::Velocity] {
        let model = model(form);
        let free = || ClassifierFreeGuidance::new(2.5).unwrap();
        let unguided = guider(&model, None).with(free());
        let run = |x: &Tensor| predict(&unguided, x, &step).unwrap();
        // Classifier guidance: ε − σ s ∇ ln p(y | x_t).
        let classifier = data().noised_classifier(2).unwrap();
        let (_, gradient) = gradient(&classifier, &Noised { x: x(3), level: step.level }).unwrap();
        let stage = ClassifierGuidance::new(classifier, 4.0).unwrap();
        let guided = predict(&guider(&model, None).with(free()).with(stage), &x(3), &step).unwrap();
        assert_close(guided.shift.as_ref().unwrap(), &(&gradient * -4.0), 1e-9);
        let expected = run(&x(3)).epsilon(step.level).unwrap() + gradient * 4.0 * s;
        assert_close(&guided.epsilon(step.level).unwrap(), &expected, 1e-9);
        assert_close(&guided.x0(step.level).unwrap(), &((x(3) - expected * s) / a), 1e-9);
        // Universal guidance: the total derivative of E(x̂₀(x_t)), by differences, through classifier-free guidance.
        let energy = |x: &Tensor| wavy(&run(x).x0(step.level).unwrap());
        let h = 1e-6;
        let column = |channel: i64| {
            let unit = Tensor::zeros([1, 2, 1, 1], DOUBLE_CPU);
            let _ = unit.select(1, channel).fill_(h);
            (energy(&(x(3) + &unit)) - energy(&(x(3) - &unit))) / (2.0 * h)
        };
        let expected = Tensor::stack(&[column(0), column(1)], 1).view([3, 2, 1, 1]) * -0.7;
        let image = Energy::from_fn(|image: &Image| Ok(wavy(&image.0)));
        let stage = UniversalGuidance::new(image, 0.7).unwrap();
        let guided = predict(&guider(&model, None).with(free()).with(stage), &x(3), &step).unwrap();
        assert_close(guided.shift.as_ref().unwrap(), &expected, 1e-7);
    }
}

/// The mixture's classes as a classifier of noised samples: logits up to a constant a row.
#[derive(Clone)]
struct Classes(Vec<String>);
impl Classifier<Noised> for Classes {
    fn handle(&self) -> Box<dyn Classifier<Noised>> {
        Box::new(self.clone())
    }
    fn classes(&self) -> &[String] {
        &self.0
    }
    fn logits(&self, x: &Noised) -> Result<Tensor> {
        let logits = [0, 1, 2].map(|class| data().log_class(x, class).unwrap());
        Ok(Tensor::stack(&logits, 1) + x.x.select(1, 0).view([-1, 1]))
    }
}

#[test]
fn a_class_of_a_classifier_is_an_energy() {
    let classifier = |n: usize| Box::new(Classes((0..n).map(|i| i.to_string()).collect()));
    let noised = || Noised { x: x(3), level: level(0.4).unwrap() };
    let all = class_energy(classifier(3), &[1]).unwrap();
    let exact = |class| data().noised_classifier(class).unwrap();
    let ((energy, downhill), (expected, slope)) =
        (gradient(&all, &noised()).unwrap(), gradient(&exact(1), &noised()).unwrap());
    assert_close(&energy, &expected, 1e-12);
    assert_close(&downhill, &slope, 1e-12);
    let by_row = class_energy(classifier(3), &[2, 0, 1]).unwrap().clone().energy(&noised()).unwrap();
    for (row, class) in [(0, 2), (1, 0), (2, 1)] {
        assert_close(&by_row.get(row), &exact(class).energy(&noised()).unwrap().get(row), 1e-12);
    }
    for bad in [vec![], vec![3], vec![-1]] {
        assert!(matches!(class_energy(classifier(3), &bad), Err(Error::Value { .. })));
    }
    let two = class_energy(classifier(3), &[0, 1]).unwrap().energy(&noised());
    assert!(matches!(two, Err(Error::Value { .. })), "two classes, three rows");
    let four = class_energy(classifier(4), &[3]).unwrap().energy(&noised());
    assert!(matches!(four, Err(Error::Shape { .. })), "three logits, four classes");
}

#[test]
fn in_its_interval_a_stage_acts_and_else_costs_nothing() {
    let model = model(Parameterisation::Epsilon);
    let noise = |t: f64| level(t).unwrap().sigma() / level(t).unwrap().alpha();
    let free = || ClassifierFreeGuidance::new(3.0).unwrap();
    let within = GuidanceInterval::new(free(), noise(0.3), noise(0.6)).unwrap();
    let limited = guider(&model, None).with(within);
    let (always, never) = (guider(&model, None).with(free()), guider(&model, None));
    for (t, acts) in [(0.2, false), (0.3, false), (0.31, true), (0.6, true), (0.61, false), (1.0, false)] {
        model.reset_counts();
        let found = predict(&limited, &x(2), &at(t)).unwrap().prediction.value;
        assert_eq!(model.counts(), (1, if acts { 4 } else { 2 }), "{t}");
        let expected = if acts { &always } else { &never };
        assert!(found.equal(&predict(expected, &x(2), &at(t)).unwrap().prediction.value), "{t}");
    }
    for (low, high) in [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (f64::NAN, 1.0), (0.0, f64::NAN)] {
        assert!(matches!(GuidanceInterval::new(free(), low, high), Err(Error::Value { .. })));
    }
    assert!(GuidanceInterval::new(free(), 0.0, f64::INFINITY).is_ok());
}

#[test]
fn branches_that_cannot_be_given_are_refused_before_the_run() {
    let model = model(Parameterisation::Epsilon);
    let refused = |guider: Guider, names: &[&str]| {
        let error = guider.start(&[at(0.5)]).map(drop).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        names.iter().for_each(|name| assert!(error.to_string().contains(name), "{error}"));
    };
    let one = || Guider::new(model.handle(), vec![vec![Condition::Null]], None, 0).unwrap();
    refused(
        one().with(ClassifierFreeGuidance::new(2.0).unwrap()),
        &["classifier-free guidance", "condition 1"],
    );
    let perturbed = || PerturbedAttentionGuidance::new(2.0).unwrap();
    refused(one().with(perturbed()), &["perturbed-attention guidance", "condition 1"]);
    refused(guider(&model, None).with(perturbed()), &["perturbed-attention guidance", "variant 1"]);
    let graph = perturbed().of(Branch::of(1).graph(1)).unwrap();
    refused(guider(&model, Some(spoilt(&model))).with(graph), &["graph 1"]);
    assert_eq!(model.counts(), (0, 0));
    assert!(matches!(perturbed().of(Branch::of(2)), Err(Error::Value { .. })));
}

#[test]
fn scales_are_finite_numbers() {
    for bad in [f64::NAN, f64::INFINITY] {
        let image = Energy::from_fn(|image: &Image| Ok(wavy(&image.0)));
        let noised = data().noised_classifier(0).unwrap();
        let errors = [
            ClassifierFreeGuidance::new(bad).map(drop),
            ClassifierFreeGuidance::new(1.0).unwrap().and(2, bad).map(drop),
            PerturbedAttentionGuidance::new(bad).map(drop),
            ClassifierGuidance::new(noised, bad).map(drop),
            UniversalGuidance::new(image, bad).map(drop),
        ];
        assert!(errors.iter().all(|error| matches!(error, Err(Error::Value { .. }))));
    }
}

#[test]
fn bad_energies_are_named_with_stage_step_and_norm() {
    let model = model(Parameterisation::Epsilon);
    let noised = |f: fn(&Tensor) -> Tensor| {
        let energy = Energy::from_fn(move |at: &Noised| Ok(f(&at.x)));
        let guider = guider(&model, None).with(ClassifierGuidance::new(energy, 1.0).unwrap());
        predict(&guider, &x(3), &at(0.5)).map(drop).unwrap_err()
    };
    let image = |f: fn(&Tensor) -> Tensor| {
        let energy = Energy::from_fn(move |image: &Image| Ok(f(&image.0)));
        let guider = guider(&model, None).with(UniversalGuidance::new(energy, 1.0).unwrap());
        predict(&guider, &x(3), &at(0.5)).map(drop).unwrap_err()
    };
    // √ of a constant 0 in rows 1 and 2: the energy is a number, its gradient 0 / 0.
    let root = |x: &Tensor| {
        let rows = Tensor::from_slice(&[1.0, 0.0, 0.0]).view([3, 1, 1, 1]);
        (x * rows).square().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double).sqrt() * 3.0
    };
    for (error, stage) in [(noised(root), "classifier guidance"), (image(root), "universal guidance")] {
        let Error::NotFinite { what, at, found } = &error else { panic!("{error}") };
        assert_eq!(what, &format!("{stage}: gradient of the energy"));
        assert_eq!(at, "rows 1, 2, step 3 of 8");
        assert!(
            found.starts_with("NaN, norm NaN (") && found.ends_with("over its finite numbers)"),
            "{found}"
        );
    }
    // Row 0's gradient is 3 x / |x|, of norm 3.
    assert!(noised(root).to_string().contains("(3.0000e0 over"), "{}", noised(root));
    let infinite = noised(|x| (x * 0.0).select(1, 0).abs().sqrt().view([3]) + wavy(x));
    assert!(matches!(&infinite, Error::NotFinite { .. }), "{infinite}");
    let energy = image(|x| wavy(x) / 0.0);
    assert_eq!(energy.to_string(), "universal guidance: energy: infinity at rows 0, 1, 2, step 3 of 8");
    for (error, found) in
        [(noised(|x| wavy(x).sum(Kind::Double)), "[]"), (image(Tensor::cos), "[3, 2, 1, 1]")]
    {
        assert!(
            matches!(&error, Error::Shape { expected, found: f, .. } if expected == "[3]" && f == found),
            "{error}"
        );
    }
    let apart = noised(|_| Tensor::zeros([3], DOUBLE_CPU));
    assert!(matches!(&apart, Error::NotDifferentiable { what } if what.starts_with("classifier guidance")));
}

#[test]
fn handles_are_the_same_stages() {
    let classifier = data().noised_classifier(0).unwrap();
    let image = Energy::from_fn(|image: &Image| Ok(wavy(&image.0)));
    let free = ClassifierFreeGuidance::new(2.0).unwrap().of(2, 0).and(1, 0.5).unwrap();
    let stages: [Box<dyn Guidance>; 4] = [
        Box::new(GuidanceInterval::new(free, 0.0, 9.0).unwrap()),
        Box::new(PerturbedAttentionGuidance::new(0.5).unwrap()),
        Box::new(ClassifierGuidance::new(classifier, 2.0).unwrap()),
        Box::new(UniversalGuidance::new(image, 2.0).unwrap()),
    ];
    for stage in stages {
        let other = stage.handle();
        assert_eq!((other.name(), other.needs(&at(0.5))), (stage.name(), stage.needs(&at(0.5))));
        assert_ne!(stage.needs(&at(0.5)), Needs::default());
    }
    let model = model(Parameterisation::V);
    let whole = guider(&model, None).with(ClassifierFreeGuidance::new(2.0).unwrap());
    let expected = predict(&whole, &x(2), &at(0.5)).unwrap().prediction.value;
    let handle = whole.handle().unwrap();
    let found = std::thread::spawn(move || predict(&handle, &x(2), &at(0.5)).unwrap().prediction.value);
    assert!(found.join().unwrap().equal(&expected));
}
