//! What every stage of guidance keeps.

use std::cell::RefCell;

use tch::Tensor;

use super::{
    Breach, Check, Clause, Options, Violation, breach, check, close, demand, equal, finite, on_thread,
    recording, sized,
};
use crate::guidance::{Branch, Grad, Guided, Memory, Outputs, Step};
use crate::{EnableGrad, Guidance, Parameterisation, Prediction, Result};

/// What a stage of guidance is run on.
pub struct GuidanceCase<'a> {
    /// x_t `[B, ..]`, at least two rows; f64 where digits count.
    pub x: &'a Tensor,
    /// The steps of a run; α and σ above 0 in each.
    pub steps: &'a [Step],
    /// The branch whose prediction the stage is handed first, as a [`Guider`](crate::guidance::Guider)'s base.
    pub base: Branch,
    /// The same stage at the scale at which it does nothing: 1 for classifier-free guidance, 0 for most others.
    pub neutral: Option<&'a dyn Guidance>,
    /// Whether it replaces x_t (blending); otherwise [`Guidance::before`] must be the identity.
    pub replaces_x: bool,
}

/// The stage, and the case.
pub struct Case<'a> {
    stage: &'a dyn Guidance,
    given: &'a GuidanceCase<'a>,
    tolerance: f64,
}

const FORMS: [Parameterisation; 4] =
    [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V, Parameterisation::Velocity];

pub fn clauses<'a>() -> Vec<Clause<Case<'a>>> {
    vec![
        ("needs", needs),
        ("before", before),
        ("declared", declared),
        ("shape", shape),
        ("gradient mode", mode),
        ("memory", memory),
        ("rows", rows),
        ("forms", forms),
        ("handle", handle),
        ("neutral", neutral),
    ]
}

impl Options {
    /// [`guidance`](super::guidance) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn guidance(&self, stage: &dyn Guidance, case: &GuidanceCase<'_>) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let whole = || -> Result<_, Breach> {
            let rows = case.x.size().first().copied().unwrap_or(0);
            demand(rows >= 2, "at least 2 rows of x", rows)?;
            demand(!case.steps.is_empty(), "a step", "none")?;
            let fine = case.steps.iter().all(|step| step.level.alpha() > 0.0 && step.level.sigma() > 0.0);
            demand(fine, "alpha and sigma above 0 in every step", "0")?;
            Ok(Case { stage, given: case, tolerance: self.tolerance(case.x.f_kind()?) })
        };
        let case = whole().map_err(|b| b.in_clause("guidance", "needs"))?;
        check("guidance", &clauses(), &case)
    }
}

/// A denoiser of the contract's own: x̂₀ = 0.8 sin(a x + b), a and b of the branch, in any form.
fn predict(x: &Tensor, branch: Branch, step: &Step, form: Parameterisation) -> Result<Prediction> {
    let k = f64::from(branch.condition) + 3.0 * f64::from(branch.variant) + 7.0 * f64::from(branch.graph);
    let x0 = x.f_mul_scalar(0.5 + 0.15 * k.sin())?.f_add_scalar(0.6 * k)?.f_sin()?.f_mul_scalar(0.8)?;
    Prediction::new(x0, Parameterisation::Sample).convert(x, step.level, form)
}

/// One step of a stage, as a runner takes it, with no prediction but those declared.
struct Taken {
    guided: Guided,
    x: Tensor,
    base: Prediction,
    /// What was asked for late.
    late: Vec<Branch>,
    declared: Vec<Branch>,
    /// Whether gradients were on before and after.
    recording: (bool, bool),
}

fn take(
    stage: &dyn Guidance,
    x: &Tensor,
    base: Branch,
    step: &Step,
    form: Parameterisation,
    memory: &mut Memory,
) -> Result<Taken> {
    let needs = stage.needs(step);
    let x = stage.before(step, x.f_detach()?)?;
    let _gradients = (needs.grad != Grad::None).then(EnableGrad::new);
    let leaf = if needs.grad == Grad::None { x } else { x.f_detach()?.f_set_requires_grad(true)? };
    let run = |x: &Tensor, branch| {
        let _no_gradients = (needs.grad != Grad::ThroughDenoiser).then(tch::no_grad_guard);
        predict(x, branch, step, form)
    };
    // The base is always there, but a stage that wants it by its name must declare it.
    let first = run(&leaf, base)?;
    let mut made = vec![(Branch { graph: u8::MAX, variant: u8::MAX, ..base }, first.handle())];
    for &branch in &needs.branches {
        made.push((branch, if branch == base { first.handle() } else { run(&leaf, branch)? }));
    }
    let asked = RefCell::new(Vec::new());
    let late = |x: &Tensor, branch: Branch| {
        asked.borrow_mut().push(branch);
        run(x, branch)
    };
    let so_far = Guided { x: leaf.shallow_clone(), prediction: first.handle(), shift: None };
    let before = recording()?;
    let guided = {
        let out = Outputs::new(leaf.shallow_clone(), made).with_late(&late);
        stage.guide(step, &out, so_far, memory)?
    };
    let recording = (before, recording()?);
    let shift = guided.shift.as_ref().map(Tensor::f_detach).transpose()?;
    let guided = Guided { x: guided.x.f_detach()?, prediction: guided.prediction.detach()?, shift };
    let (x, base) = (leaf.f_detach()?, first.detach()?);
    Ok(Taken { guided, x, base, late: asked.into_inner(), declared: needs.branches, recording })
}

impl Case<'_> {
    fn take(&self, x: &Tensor, step: &Step, form: Parameterisation, memory: &mut Memory) -> Result<Taken> {
        take(self.stage, x, self.given.base, step, form, memory)
    }

    /// A run from `x`, which stays the same in all steps: ε of each.
    fn run(&self, x: &Tensor, form: Parameterisation) -> Result<Vec<Tensor>> {
        run(self.stage, x, self.given.base, self.given.steps, form)
    }

    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        close(what, found, expected, self.tolerance)
    }
}

fn run(
    stage: &dyn Guidance,
    x: &Tensor,
    base: Branch,
    steps: &[Step],
    form: Parameterisation,
) -> Result<Vec<Tensor>> {
    let mut memory = Memory::default();
    steps
        .iter()
        .map(|step| take(stage, x, base, step, form, &mut memory)?.guided.epsilon(step.level))
        .collect()
}

fn needs(c: &Case<'_>) -> Check {
    let all = |stage: &dyn Guidance| c.given.steps.iter().map(|step| stage.needs(step)).collect::<Vec<_>>();
    let first = all(c.stage);
    for needs in &first {
        for (i, branch) in needs.branches.iter().enumerate() {
            demand(!needs.branches[..i].contains(branch), "each branch once", format!("{branch:?} twice"))?;
        }
    }
    let same = |what: &str, found| demand(found == first, format!("{what}: {first:?}"), format!("{found:?}"));
    same("the needs, the second time", all(c.stage))?;
    same("the needs of a handle", all(&*c.stage.handle()))?;
    if c.take(c.given.x, &c.given.steps[0], FORMS[0], &mut Memory::default()).is_ok() {
        same("the needs after a step", all(c.stage))?;
    }
    Ok(())
}

fn before(c: &Case<'_>) -> Check {
    for step in c.given.steps {
        let x = c.given.x.f_add_scalar(0)?;
        let found = c.stage.before(step, x)?;
        sized("x after `before`", &found, &c.given.x.size())?;
        let (expected, kind) = (c.given.x.f_kind()?, found.f_kind()?);
        demand(kind == expected, format!("x in {expected:?}"), format!("{kind:?}"))?;
        if !c.given.replaces_x {
            equal("x after `before`, of a stage that is not said to replace it", &found, c.given.x)?;
        }
    }
    Ok(())
}

fn declared(c: &Case<'_>) -> Check {
    for form in FORMS {
        let mut memory = Memory::default();
        for step in c.given.steps {
            let taken = c.take(c.given.x, step, form, &mut memory)?;
            if let Some(branch) = taken.late.iter().find(|branch| taken.declared.contains(branch)) {
                return breach(
                    "late predictions of branches that were not declared alone",
                    format!("{branch:?}, a call for nothing"),
                );
            }
        }
    }
    Ok(())
}

fn shape(c: &Case<'_>) -> Check {
    let (mut memory, expected) = (Memory::default(), c.given.x.f_kind()?);
    for step in c.given.steps {
        let taken = c.take(c.given.x, step, FORMS[0], &mut memory)?;
        let Guided { x, prediction, shift } = &taken.guided;
        equal("the x of the guided prediction", x, &taken.x)?;
        for (what, t) in [("the guided prediction", Some(&prediction.value)), ("the shift", shift.as_ref())] {
            let Some(t) = t else { continue };
            sized(what, t, &c.given.x.size())?;
            let kind = t.f_kind()?;
            demand(kind == expected, format!("{what} in {expected:?}, as x"), format!("{kind:?}"))?;
            finite(what, t)?;
        }
    }
    Ok(())
}

fn mode(c: &Case<'_>) -> Check {
    for step in c.given.steps {
        let (before, after) = c.take(c.given.x, step, FORMS[0], &mut Memory::default())?.recording;
        let say = |on| if on { "gradients on" } else { "gradients off" };
        demand(before == after, format!("{} after the stage, as before it", say(before)), say(after))?;
    }
    Ok(())
}

fn forms(c: &Case<'_>) -> Check {
    let expected = c.run(c.given.x, FORMS[0])?;
    for form in &FORMS[1..] {
        for (step, (found, expected)) in c.run(c.given.x, *form)?.iter().zip(&expected).enumerate() {
            let what = format!("step {step}: epsilon of a model that predicts {}, guided", form.name());
            c.close(&what, found, expected)?;
        }
    }
    Ok(())
}

fn rows(c: &Case<'_>) -> Check {
    let together = c.run(c.given.x, FORMS[0])?;
    for row in 0..c.given.x.size()[0] {
        let alone = c.run(&c.given.x.f_narrow(0, row, 1)?, FORMS[0])?;
        for (step, (found, expected)) in together.iter().zip(&alone).enumerate() {
            c.close(&format!("step {step}: row {row} of a batch"), &found.f_narrow(0, row, 1)?, expected)?;
        }
    }
    Ok(())
}

/// Two runs from different x by turns: each goes as it goes alone.
fn memory(c: &Case<'_>) -> Check {
    let (mut one, mut other) = (Memory::default(), Memory::default());
    let x = c.given.x.f_mul_scalar(-0.7)?;
    let expected = c.run(c.given.x, FORMS[0])?;
    for (i, (step, expected)) in c.given.steps.iter().zip(&expected).enumerate() {
        let found = c.take(c.given.x, step, FORMS[0], &mut one)?.guided.epsilon(step.level)?;
        let _ = c.take(&x, step, FORMS[0], &mut other)?;
        c.close(&format!("step {i} beside another run"), &found, expected)?;
    }
    Ok(())
}

fn handle(c: &Case<'_>) -> Check {
    let expected = c.run(c.given.x, FORMS[0])?;
    let handle = c.stage.handle();
    demand(
        handle.name() == c.stage.name(),
        format!("a handle of the name {}", c.stage.name()),
        handle.name(),
    )?;
    let (x, base, steps) = (c.given.x.shallow_clone(), c.given.base, c.given.steps.to_vec());
    let found = on_thread(move || run(&*handle, &x, base, &steps, FORMS[0]))?;
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        c.close(&format!("step {step} of a handle on another thread"), found, expected)?;
    }
    Ok(())
}

fn neutral(c: &Case<'_>) -> Check {
    let Some(stage) = c.given.neutral else { return Ok(()) };
    for form in FORMS {
        let mut memory = Memory::default();
        for step in c.given.steps {
            let taken = take(stage, c.given.x, c.given.base, step, form, &mut memory)?;
            let expected = taken.base.epsilon(&taken.x, step.level)?;
            let what = format!("epsilon at the neutral scale, of a model that predicts {}", form.name());
            c.close(&what, &taken.guided.epsilon(step.level)?, &expected)?;
        }
    }
    Ok(())
}
