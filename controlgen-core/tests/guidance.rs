//! Guidance around a denoiser whose answers are known in closed form.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::{Branch, Grad, Guided, Guider, GuiderRun, Memory, Needs, Outputs, Step};
use controlgen_core::{
    At, Binding, Condition, Control, Controls, Denoiser, DenoiserSpec, Dims, Energy, EnergyFn, Error,
    Guidance, NoiseLevel, Parameterisation, Pass, Placement, Prediction, Prepared, Result, SiteId, SiteKind,
    SiteMap, WeightMap,
};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

/// The deviation of the data around its mean.
const S: f64 = 0.5;

/// x₀ ~ N(μ, S²) for a mean μ a class, [2, 1, 1] each, and 0 unconditionally: the best denoiser is linear,
/// E[x₀ | x] = μ + α S² / (α² S² + σ²) · (x − α μ).
struct Gaussian {
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    to_k: SiteId,
    out: SiteId,
    /// t to its level.
    schedule: fn(f64) -> NoiseLevel,
    calls: Arc<AtomicI64>,
    rows: Arc<AtomicI64>,
}

fn diffusion(t: f64) -> NoiseLevel {
    NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2)).unwrap()
}

fn flow(t: f64) -> NoiseLevel {
    NoiseLevel::from_flow(t).unwrap()
}

impl Gaussian {
    fn new(parameterisation: Parameterisation, schedule: fn(f64) -> NoiseLevel) -> Self {
        let mut sites = SiteMap::new();
        let to_k = sites.add("to_k", Dims::Linear { inputs: 2, outputs: 2 });
        let out = sites.add("out", Dims::Hidden { width: 2 });
        let spec = DenoiserSpec {
            architecture: "gaussian".into(),
            channels: 2,
            size: [1, 1],
            multiple: 1,
            parameterisation,
            learned_variance: false,
            placement: Placement::CPU.with_kind(Kind::Double),
        };
        Self { spec, sites: sites.into(), to_k, out, schedule, calls: Arc::default(), rows: Arc::default() }
    }

    fn mean(class: i64) -> [f64; 2] {
        [[2.0, -1.0], [-1.0, 0.5], [0.0, 3.0]][class as usize]
    }

    /// ε for rows x [B, 2, 1, 1] of one mean, by the formula.
    fn epsilon(x: &Tensor, mean: [f64; 2], level: NoiseLevel) -> Tensor {
        let (a, s) = (level.alpha(), level.sigma());
        let mu = Tensor::from_slice(&mean).view([1, 2, 1, 1]);
        let x0 = &mu + (x - &mu * a) * (a * S * S / (a * a * S * S + s * s));
        (x - x0 * a) / s
    }
}

impl Denoiser for Gaussian {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            calls: self.calls.clone(),
            rows: self.rows.clone(),
            ..*self
        })
    }
    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        let mean = |condition: &Condition| match condition {
            Condition::Null => Ok([0.0; 2]),
            Condition::Class(class @ 0..3) => Ok(Self::mean(*class)),
            _ => Err(Error::unsupported("such a condition", "Null, Class(0 .. 3)")),
        };
        let means = conditions.iter().map(mean).collect::<Result<Vec<_>>>()?;
        let means = Tensor::from_slice2(&means);
        let means = pass.linear(self.to_k, &means, means.shallow_clone())?;
        Prepared::new(&self.sites, pass, conditions.len() as i64, vec![means])
    }
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        pass.check(&self.sites)?;
        prepared.check(&self.sites, pass)?;
        let batch = self.spec.validate(x, t, prepared)?;
        self.calls.fetch_add(1, Relaxed);
        self.rows.fetch_add(batch, Relaxed);
        let level = (self.schedule)(t.f_get(0)?.f_double_value(&[])?);
        let (a, s) = (level.alpha(), level.sigma());
        let mu = prepared.tensors()[0].view([batch, 2, 1, 1]);
        let x0 = &mu + (x - &mu * a) * (a * S * S / (a * a * S * S + s * s));
        let x0 = pass.hidden(self.out, x0, x)?;
        Prediction::new(x0, Parameterisation::Sample).convert(x, level, self.spec.parameterisation)
    }
    fn map_weights(&self, _f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(self.handle())
    }
}

/// p_u + s (p_c − p_u), Ho & Salimans 2022.
struct ClassifierFree(f64);
impl Guidance for ClassifierFree {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(Self(self.0))
    }
    fn name(&self) -> &'static str {
        "classifier-free guidance"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::branches([Branch::of(0), Branch::of(1)])
    }
    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let (u, c) = (out.get(Branch::of(0))?, out.get(Branch::of(1))?);
        Ok(Guided { prediction: Prediction::combine(&[(1.0 - self.0, u), (self.0, c)])?, ..so_far })
    }
}

/// + s (p_c − p_perturbed).
struct Perturbed(Branch, f64);
impl Guidance for Perturbed {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(Self(self.0, self.1))
    }
    fn name(&self) -> &'static str {
        "perturbed guidance"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::branches([Branch::of(self.0.condition), self.0])
    }
    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let (c, p) = (out.get(Branch::of(self.0.condition))?, out.get(self.0)?);
        let prediction = Prediction::combine(&[(1.0, &so_far.prediction), (self.1, c), (-self.1, p)])?;
        Ok(Guided { prediction, ..so_far })
    }
}

/// −s ∇E at x_t, or through the denoiser at x̂₀.
#[derive(Clone)]
enum Downhill {
    AtX(Energy<Noised>),
    AtX0(Energy<Image>),
}
impl Guidance for Downhill {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }
    fn name(&self) -> &'static str {
        "downhill"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::grad(match self {
            Self::AtX(_) => Grad::AtX,
            Self::AtX0(_) => Grad::ThroughDenoiser,
        })
    }
    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let energy = match self {
            Self::AtX(e) => e.energy(&Noised { x: out.x().shallow_clone(), level: step.level })?,
            Self::AtX0(e) => e.energy(&Image(so_far.prediction.x0(&so_far.x, step.level)?))?,
        };
        let shift = out.grad(&energy)?.f_neg()?;
        so_far.shifted(shift)
    }
}

/// On the lanes of variant 1, or on all, the prediction forgets its condition.
struct Forget {
    by_lane: bool,
}
impl Control for Forget {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self { ..*self })
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Hidden, "out")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn hidden(&self, at: At<'_>, h: Tensor, x: &Tensor) -> Result<Tensor> {
        let plain = |variant: u8| !self.by_lane || variant == 1;
        let rows: Vec<bool> = at.pass.lanes.unwrap().rows().iter().map(|lane| plain(lane.variant)).collect();
        Ok(x.f_where_self(&Tensor::from_slice(&rows).view([-1, 1, 1, 1]), &h)?)
    }
}

/// Doubles the means, in `prepare`.
struct Double;
impl Control for Double {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "to_k")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y.f_mul_scalar(2.0)?)
    }
}

fn step(t: f64, schedule: fn(f64) -> NoiseLevel) -> Step {
    Step { index: 2, of: 10, timestep: t, level: schedule(t), next: schedule(t * 0.9) }
}

fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 2, DOUBLE_CPU) * 1.3 + 0.2).sin().view([rows, 2, 1, 1]) * 1.5
}

fn null_and(class: i64) -> Vec<Vec<Condition>> {
    vec![vec![Condition::Null], vec![Condition::Class(class)]]
}

fn plain(parameterisation: Parameterisation) -> (Gaussian, Guider) {
    let model = Gaussian::new(parameterisation, diffusion);
    let guider = Guider::new(model.handle(), null_and(0), None, 1).unwrap();
    (model, guider)
}

fn predict(guider: &Guider, x: &Tensor, step: &Step) -> Result<Guided> {
    guider.predict(x, step, &mut guider.start(&[*step])?)
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size());
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{difference}");
}

const FORMS: [Parameterisation; 4] =
    [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V, Parameterisation::Velocity];

#[test]
fn without_stages_it_is_the_denoiser() {
    for form in FORMS {
        let (model, guider) = plain(form);
        let guided = predict(&guider, &x(3), &step(0.6, diffusion)).unwrap();
        let expected = Gaussian::epsilon(&x(3), Gaussian::mean(0), diffusion(0.6));
        assert_close(&guided.epsilon(diffusion(0.6)).unwrap(), &expected, 1e-12);
        assert!(guided.shift.is_none());
        assert_eq!((model.calls.load(Relaxed), model.rows.load(Relaxed)), (1, 3));
    }
}

#[test]
fn classifier_free_guidance_is_its_formula_whatever_is_predicted() {
    let level = diffusion(0.6);
    let (u, c) =
        (Gaussian::epsilon(&x(3), [0.0; 2], level), Gaussian::epsilon(&x(3), Gaussian::mean(0), level));
    for form in FORMS {
        for scale in [0.0, 0.7, 1.0, 7.5] {
            let (model, guider) = plain(form);
            let guider = guider.with(ClassifierFree(scale));
            let guided = predict(&guider, &x(3), &step(0.6, diffusion)).unwrap();
            assert_close(&guided.epsilon(level).unwrap(), &(&u + (&c - &u) * scale), 1e-11);
            assert_eq!(
                (model.calls.load(Relaxed), model.rows.load(Relaxed)),
                (1, 6),
                "two branches, one call"
            );
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
    let model = Gaussian::new(Parameterisation::Epsilon, diffusion);
    let bind = |by_lane| Controls::bind(model.sites(), vec![Box::new(Forget { by_lane })]).unwrap();
    let at = step(0.5, diffusion);
    let (u, c) =
        (Gaussian::epsilon(&x(4), [0.0; 2], at.level), Gaussian::epsilon(&x(4), Gaussian::mean(0), at.level));
    // x̂₀ = x, hence ε = x (1 − α) / σ.
    let p = x(4) * ((1.0 - at.level.alpha()) / at.level.sigma());
    let expected = &u + (&c - &u) * 3.0 + (&c - &p) * 0.5;
    let square = Energy::from_fn(|x: &Noised| {
        Ok(x.x.f_square()?.f_sum_dim_intlist(&[1i64, 2, 3][..], false, None::<Kind>)?)
    });

    // By lanes: three branches and a gradient in one call of 3 B rows.
    let lane = Branch::of(1).variant(1);
    let guider = Guider::new(model.handle(), null_and(0), Some(bind(true)), 1).unwrap();
    let guider = guider.with(ClassifierFree(3.0)).with(Perturbed(lane, 0.5)).with(Downhill::AtX(square));
    let guided = predict(&guider, &x(4), &at).unwrap();
    assert_eq!((model.calls.swap(0, Relaxed), model.rows.swap(0, Relaxed)), (1, 12));
    assert_close(&guided.prediction.value, &expected, 1e-12);
    assert_close(guided.shift.as_ref().unwrap(), &(x(4) * -2.0), 1e-12);

    // A control that does not go by lanes is another graph: two calls, the same prediction.
    let graph = Branch::of(1).graph(1);
    let guider =
        Guider::new(model.handle(), null_and(0), None, 1).unwrap().with_graph(Some(bind(false))).unwrap();
    let guider = guider.with(ClassifierFree(3.0)).with(Perturbed(graph, 0.5));
    let guided = predict(&guider, &x(4), &at).unwrap();
    assert_eq!((model.calls.load(Relaxed), model.rows.load(Relaxed)), (2, 12));
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
    let unconditional = Gaussian::epsilon(&x(2), [0.0; 2], at.level);

    let (_, guider) = asks(&[], Branch::of(0), false);
    let error = predict(&guider, &x(2), &at).map(drop).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(
        error.to_string().contains("condition 0") && error.to_string().contains("not declared"),
        "{error}"
    );
    let (model, guider) = asks(&[Branch::of(0)], Branch::of(0), false);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &unconditional, 1e-12);
    assert_eq!(model.calls.load(Relaxed), 1);
    let (model, guider) = asks(&[], Branch::of(0), true);
    assert_close(&predict(&guider, &x(2), &at).unwrap().prediction.value, &unconditional, 1e-12);
    assert_eq!(model.calls.load(Relaxed), 2, "decided late, a call of its own");

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
        assert_eq!(model.calls.load(Relaxed), 0);
    }
    let alone = Outputs::new(x(1), vec![]);
    assert!(matches!(alone.extra(Branch::of(0)), Err(Error::Unsupported { .. })));
}

/// Σ over a row of cos(x + channel), smooth and not symmetric.
fn wavy(x: &Tensor) -> Tensor {
    let phase = Tensor::from_slice(&[0.0, 1.0]).view([1, 2, 1, 1]);
    (x + phase).cos().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double)
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let at = step(0.4, diffusion);
    for (schedule, form) in
        [(diffusion as fn(f64) -> NoiseLevel, FORMS[0]), (diffusion, FORMS[2]), (flow, FORMS[3])]
    {
        let at = Step { level: schedule(0.4), ..at };
        let model = Gaussian::new(form, schedule);
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
        let difference = |energy: &dyn Fn(&Tensor) -> Tensor| -> Tensor {
            let h = 1e-6;
            let column = |channel: i64| {
                let unit = Tensor::zeros([1, 2, 1, 1], DOUBLE_CPU);
                let _ = unit.select(1, channel).fill_(h);
                (energy(&(x(3) + &unit)) - energy(&(x(3) - &unit))) / (2.0 * h)
            };
            Tensor::stack(&[column(0), column(1)], 1).view([3, 2, 1, 1])
        };
        let stages: [(Downhill, &dyn Fn(&Tensor) -> Tensor); 2] = [
            (Downhill::AtX(Energy::from_fn(|n: &Noised| Ok(wavy(&n.x) * n.level.alpha()))), &direct),
            (Downhill::AtX0(Energy::from_fn(|i: &Image| Ok(wavy(&i.0)))), &through),
        ];
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
        let AtBoth(a, b) = AtBoth::new();
        let both = with(Some(a)).with(b);
        let shift = predict(&both, &x(3), &at).unwrap().shift.unwrap();
        assert_close(&shift, &(&shifts[0] + &shifts[1]), 1e-12);
    }
}

/// The two stages of the test above.
struct AtBoth(Downhill, Downhill);
impl AtBoth {
    fn new() -> Self {
        let at_x = Energy::from_fn(|n: &Noised| Ok(wavy(&n.x) * n.level.alpha()));
        Self(Downhill::AtX(at_x), Downhill::AtX0(Energy::from_fn(|i: &Image| Ok(wavy(&i.0)))))
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
    let expected = Gaussian::epsilon(&(x(2) + 0.3), Gaussian::mean(0), at.level);
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
fn errors_name_stage_rows_and_step() {
    let at = step(0.5, diffusion);
    let run = |energy: fn(&Tensor) -> Tensor| {
        let (_, guider) = plain(Parameterisation::Epsilon);
        let stage = Downhill::AtX(Energy::from_fn(move |n: &Noised| Ok(energy(&n.x))));
        predict(&guider.with(stage), &x(3), &at).map(drop).unwrap_err()
    };
    let nan = run(|x| wavy(x) / Tensor::from_slice(&[1.0, 0.0, 0.0]) * 0.0);
    assert_eq!(nan.to_string(), "downhill: energy: NaN at rows 1, 2, step 2 of 10");
    let elsewhere = run(|_| Tensor::zeros([3], DOUBLE_CPU));
    assert!(matches!(&elsewhere, Error::NotDifferentiable { what } if what == "downhill: the energy"));
    let shape = run(|x| wavy(x).sum(Kind::Double));
    assert!(shape.to_string().starts_with("downhill: energy: expected shape [3]"), "{shape}");
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
    let mean = Tensor::from_slice(&Gaussian::mean(0)).view([1, 2, 1, 1]);
    let forms = [(diffusion as fn(f64) -> NoiseLevel, 0.98), (flow, 1.0)];
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
        let model = Gaussian::new(form, schedule);
        let guider = Guider::new(model.handle(), null_and(0), None, 1).unwrap().with(ClassifierFree(1.0));
        let mut run = guider.start(&steps).unwrap();
        let found = ddim(x(3), &steps, |x, step| guider.predict(x, step, &mut run).unwrap());
        let (a, s) = (steps[0].level.alpha(), steps[0].level.sigma());
        let expected = &mean + (x(3) - &mean * a) * (S / (a * a * S * S + s * s).sqrt());
        assert_close(&found, &expected, 2e-2);
        assert_eq!(model.calls.load(Relaxed), n as i64);
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
