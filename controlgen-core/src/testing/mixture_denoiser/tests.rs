use super::*;
use crate::energy::Noised;
use crate::testing::Component;
use crate::{At, Binding, Control, Controls, SiteKind};
use tch::kind::DOUBLE_CPU;

const FORMS: [Parameterisation; 4] =
    [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V, Parameterisation::Velocity];

fn mixture() -> Mixture {
    let parts = [([1.0, -1.0], 0.5, 1.0, 0), ([-1.0, 2.0], 0.3, 2.0, 1), ([0.4, 0.4], 0.8, 1.5, 0)];
    let of = |(mean, deviation, weight, class): ([f64; 2], f64, f64, i64)| Component {
        mean: mean.to_vec(),
        deviation,
        weight,
        class,
    };
    Mixture::new([2, 1, 1], parts.map(of).into()).unwrap()
}

fn model(form: Parameterisation) -> MixtureDenoiser {
    MixtureDenoiser::new(mixture(), form, NoiseLevel::from_flow).unwrap()
}

fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 2, DOUBLE_CPU) * 1.3 + 0.2).sin().view([rows, 2, 1, 1]) * 1.5
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

#[test]
fn every_form_is_that_of_the_mixture_row_by_row() {
    let conditions = [Condition::Null, Condition::Class(0), Condition::Class(1)];
    let densities = [mixture(), mixture().of_class(0).unwrap(), mixture().of_class(1).unwrap()];
    let times = [0.2, 0.9, 0.55];
    for form in FORMS {
        let model = model(form);
        let prepared = model.prepare(&conditions, &Pass::default()).unwrap();
        let t = Tensor::from_slice(&times);
        let found = model.predict(&x(3), &t, &prepared, &Pass::default()).unwrap();
        assert_eq!(found.parameterisation, form);
        for (i, (density, t)) in densities.iter().zip(times).enumerate() {
            let level = NoiseLevel::from_flow(t).unwrap();
            let at = Noised { x: x(3).narrow(0, i as i64, 1), level };
            let (eps, x0) = (density.epsilon(&at).unwrap(), density.x0(&at).unwrap());
            let expected = match form {
                Parameterisation::Epsilon => eps,
                Parameterisation::Sample => x0,
                Parameterisation::V => eps * level.alpha() - x0 * level.sigma(),
                Parameterisation::Velocity => eps - x0,
            };
            assert!(distance(&found.value.narrow(0, i as i64, 1), &expected) < 1e-12, "{}", form.name());
        }
        let single = model.predict(&x(3).to_kind(Kind::Float), &t, &prepared, &Pass::default()).unwrap();
        assert_eq!(single.value.kind(), Kind::Float);
        assert!(distance(&single.value, &found.value) < 1e-5);
        assert_eq!(model.counts(), (2, 6));
        model.reset_counts();
        assert_eq!(model.handle().spec().parameterisation, form);
        assert_eq!(model.counts(), (0, 0));
    }
}

#[test]
fn the_ends_are_exact() {
    // Only noise: x says nothing of x₀, whose mean is that of the data; ε is x.
    let model = model(Parameterisation::Velocity);
    let prepared = model.prepare(&[Condition::Class(1)], &Pass::default()).unwrap();
    let u =
        |t: f64| model.predict(&x(1), &Tensor::from_slice(&[t]), &prepared, &Pass::default()).unwrap().value;
    let mean = Tensor::from_slice(&[-1.0, 2.0]).view([1, 2, 1, 1]);
    assert!(distance(&u(1.0), &(x(1) - mean)) < 1e-12);
    // No noise: x₀ is x, and σ times the score is 0.
    assert!(distance(&u(0.0), &x(1).neg()) < 1e-12);
}

/// Adds to the log-weights in `prepare`, or forgets x.
struct Edit {
    shift: Option<[f64; 3]>,
}
impl Control for Edit {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self { ..*self })
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        let (kind, name) = match self.shift {
            Some(_) => (SiteKind::Linear, "to_k"),
            None => (SiteKind::Hidden, "responsibilities"),
        };
        sites.select(kind, name)?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y.f_add(&Tensor::from_slice(&self.shift.unwrap()))?)
    }
    fn hidden(&self, _at: At<'_>, h: Tensor, residual: &Tensor) -> Result<Tensor> {
        assert_eq!(h.size(), residual.size());
        Ok(residual.shallow_clone())
    }
}

/// The same components with other weights.
fn reweighted(factors: [f64; 3]) -> Mixture {
    let parts = mixture().components().to_vec().into_iter().zip(factors);
    Mixture::new([2, 1, 1], parts.map(|(c, f)| Component { weight: c.weight * f, ..c }).collect()).unwrap()
}

#[test]
fn sites_do_what_they_say() {
    let model = model(Parameterisation::Epsilon);
    let level = NoiseLevel::from_flow(0.4).unwrap();
    let run = |model: &dyn Denoiser, edit: Option<Edit>, condition: Condition| {
        let edits = edit.into_iter().map(|edit| -> Box<dyn Control> { Box::new(edit) }).collect();
        let controls = Controls::bind(model.sites(), edits).unwrap();
        let pass = Pass::with_controls(&controls);
        let prepared = model.prepare(&[condition], &pass).unwrap();
        model.predict(&x(1), &Tensor::from_slice(&[0.4]), &prepared, &pass).unwrap().value
    };
    let at = Noised { x: x(1), level };
    // to_k: other log-weights, within the class that is asked for.
    let factors = [2.0, 0.3, 5.0];
    let shift = Some(factors.map(f64::ln));
    let expected = reweighted(factors);
    let found = run(&model, Some(Edit { shift }), Condition::Null);
    assert!(distance(&found, &expected.epsilon(&at).unwrap()) < 1e-12);
    let found = run(&model, Some(Edit { shift }), Condition::Class(0));
    assert!(distance(&found, &expected.of_class(0).unwrap().epsilon(&at).unwrap()) < 1e-12);
    // The same by mapped weights; the model itself keeps its own.
    let column = Tensor::from_slice(&factors.map(f64::ln)).unsqueeze(1);
    let mapped = model.map_weights(&mut |_, w| Ok(Some(w + &column))).unwrap();
    let found = run(&*mapped, None, Condition::Class(0));
    assert!(distance(&found, &expected.of_class(0).unwrap().epsilon(&at).unwrap()) < 1e-12);
    assert!(distance(&run(&model, None, Condition::Null), &mixture().epsilon(&at).unwrap()) < 1e-12);
    // responsibilities: the residual is the weights of the condition, whatever x is.
    let posterior = |k: usize| {
        let c = mixture().components()[k].clone();
        Mixture::new([2, 1, 1], vec![c]).unwrap().epsilon(&at).unwrap()
    };
    let expected = posterior(0) * (1.0 / 2.5) + posterior(2) * (1.5 / 2.5);
    let found = run(&model, Some(Edit { shift: None }), Condition::Class(0));
    assert!(distance(&found, &expected) < 1e-12);
}

#[test]
fn what_it_does_not_take_is_refused() {
    let model = model(Parameterisation::Epsilon);
    let plain = Pass::default();
    assert!(matches!(model.prepare(&[Condition::Class(2)], &plain), Err(Error::Unsupported { .. })));
    let features = Condition::Features(vec![("encoder_hidden_states".into(), x(1))]);
    assert!(matches!(model.prepare(&[features], &plain), Err(Error::Unsupported { .. })));
    let prepared = model.prepare(&[Condition::Null], &plain).unwrap();
    let predict =
        |x: Tensor, t: f64| model.predict(&x, &Tensor::from_slice(&[t]), &prepared, &plain).map(drop);
    assert!(matches!(predict(x(1), 1.5), Err(Error::Value { .. })), "a time of no level");
    assert!(matches!(predict(x(2).view([1, 2, 2, 1]), 0.5), Err(Error::Shape { .. })));
    assert!(predict(x(2), 0.5).is_err());
    assert_eq!(model.counts(), (0, 0));
    let strange = super::super::MixtureDenoiser::new(mixture(), FORMS[0], NoiseLevel::from_flow).unwrap();
    let t = Tensor::from_slice(&[0.5]);
    assert!(matches!(strange.predict(&x(1), &t, &prepared, &plain), Err(Error::ForeignState { .. })));
}
