//! Gradients: what they are, when they are recorded, and what errors say.

use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::{Branch, Grad, Guided, Guider, Memory, Needs, Outputs, Step};
use controlgen_core::{Denoiser, Energy, Error, Guidance, Parameterisation, Prediction, Result};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

use crate::stages::{ClassifierFree, Downhill};
use crate::{FORMS, Schedule, assert_close, diffusion, flow, null_and, plain, predict, scheduled, step, x};

/// Σ over a row of cos(x + channel), smooth and not symmetric.
fn wavy(x: &Tensor) -> Tensor {
    let phase = Tensor::from_slice(&[0.0, 1.0]).view([1, 2, 1, 1]);
    (x + phase).cos().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double)
}

/// One number a row.
type Rows<'a> = dyn Fn(&Tensor) -> Tensor + 'a;

/// The same energy of x_t, times α, and of x̂₀.
fn downhill() -> (Downhill, Downhill) {
    let at_x = Energy::from_fn(|n: &Noised| Ok(wavy(&n.x) * n.level.alpha()));
    (Downhill::AtX(at_x), Downhill::AtX0(Energy::from_fn(|i: &Image| Ok(wavy(&i.0)))))
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let at = step(0.4, diffusion);
    for (schedule, form) in [(diffusion as Schedule, FORMS[0]), (diffusion, FORMS[2]), (flow, FORMS[3])] {
        let at = Step { level: schedule(0.4), ..at };
        let model = scheduled(form, schedule);
        let with = |stage: Option<Downhill>| {
            let guider = Guider::new(model.handle(), null_and(2), None, 1).unwrap().with(ClassifierFree(2.5));
            match stage {
                Some(stage) => guider.with(stage),
                None => guider,
            }
        };
        let unguided = with(None);
        let x0 = |x: &Tensor| predict(&unguided, x, &at).unwrap().x0(at.level).unwrap();
        let through = |x: &Tensor| wavy(&x0(x));
        let direct = |x: &Tensor| wavy(x) * at.level.alpha();
        let difference = |energy: &Rows<'_>| -> Tensor {
            let h = 1e-6;
            let column = |channel: i64| {
                let unit = Tensor::zeros([1, 2, 1, 1], DOUBLE_CPU);
                let _ = unit.select(1, channel).fill_(h);
                (energy(&(x(3) + &unit)) - energy(&(x(3) - &unit))) / (2.0 * h)
            };
            Tensor::stack(&[column(0), column(1)], 1).view([3, 2, 1, 1])
        };
        let (at_x, at_x0) = downhill();
        let stages: [(&Downhill, &Rows<'_>); 2] = [(&at_x, &direct), (&at_x0, &through)];
        let mut shifts = Vec::new();
        for (stage, energy) in stages {
            let guided = predict(&with(Some(stage.clone())), &x(3), &at).unwrap();
            let shift = guided.shift.as_ref().unwrap();
            assert_close(shift, &-difference(energy), 1e-7);
            // The sampler's two views of it agree: x₀ = (x − σ ε) / α.
            let epsilon = guided.epsilon(at.level).unwrap();
            let unshifted = predict(&unguided, &x(3), &at).unwrap().epsilon(at.level).unwrap();
            assert_close(&epsilon, &(unshifted - shift * at.level.sigma()), 1e-12);
            let x0 = (x(3) - epsilon * at.level.sigma()) / at.level.alpha();
            assert_close(&guided.x0(at.level).unwrap(), &x0, 1e-10);
            shifts.push(shift.shallow_clone());
        }
        // Both at once: gradients through the same graph, added.
        let both = with(Some(at_x)).with(at_x0);
        let shift = predict(&both, &x(3), &at).unwrap().shift.unwrap();
        assert_close(&shift, &(&shifts[0] + &shifts[1]), 1e-12);
    }
}

#[test]
fn graphs_are_recorded_only_where_they_are_needed() {
    struct Looks(Grad);
    impl Guidance for Looks {
        fn handle(&self) -> Box<dyn Guidance> {
            Box::new(Self(self.0))
        }
        fn name(&self) -> &'static str {
            "looks"
        }
        fn needs(&self, _step: &Step) -> Needs {
            Needs::grad(self.0)
        }
        fn guide(&self, _: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
            assert_eq!(out.x().requires_grad(), self.0 != Grad::None);
            assert_eq!(out.get(Branch::of(1))?.value.requires_grad(), self.0 == Grad::ThroughDenoiser);
            assert_eq!(out.extra(Branch::of(0))?.value.requires_grad(), self.0 == Grad::ThroughDenoiser);
            assert_eq!((out.x() * 2.0).requires_grad(), self.0 != Grad::None);
            let prediction =
                Prediction::new(&so_far.prediction.value + out.x() * 0.0, so_far.prediction.parameterisation);
            Ok(Guided { prediction, ..so_far })
        }
    }
    for grad in [Grad::None, Grad::AtX, Grad::ThroughDenoiser] {
        let (_, guider) = plain(Parameterisation::Epsilon);
        let leaf = x(2).set_requires_grad(true);
        let guided = predict(&guider.with(Looks(grad)), &leaf, &step(0.5, diffusion)).unwrap();
        assert!(!guided.prediction.value.requires_grad() && !guided.x.requires_grad());
        assert!((leaf * 2.0).requires_grad(), "the caller's mode holds again");
    }
}

#[test]
fn errors_name_stage_rows_step_and_norm() {
    let at = step(0.5, diffusion);
    let run = |energy: fn(&Tensor) -> Tensor| {
        let (_, guider) = plain(Parameterisation::Epsilon);
        let stage = Downhill::AtX(Energy::from_fn(move |n: &Noised| Ok(energy(&n.x))));
        predict(&guider.with(stage), &x(3), &at).map(drop).unwrap_err()
    };
    let nan = run(|x| wavy(x) / Tensor::from_slice(&[1.0, 0.0, 0.0]) * 0.0);
    assert_eq!(nan.to_string(), "downhill: energy: NaN at rows 1, 2, step 2 of 10");
    // ∇ √(x² · 0) = 0 / 0, in the rows where there is no more.
    let gradient = run(|x| {
        let rows = Tensor::from_slice(&[0.0, 1.0, 0.0]).view([3, 1, 1, 1]);
        (x * rows).square().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double).sqrt() * 5.0
    });
    let found = "NaN, norm NaN (5.0000e0 over its finite numbers)";
    let expected = format!("downhill: gradient of the energy: {found} at rows 0, 2, step 2 of 10");
    assert_eq!(gradient.to_string(), expected);
    let elsewhere = run(|_| Tensor::zeros([3], DOUBLE_CPU));
    assert!(matches!(&elsewhere, Error::NotDifferentiable { what } if what == "downhill: the energy"));
    let shape = run(|x| wavy(x).sum(Kind::Double));
    assert!(shape.to_string().starts_with("downhill: energy: expected shape [3]"), "{shape}");
}
