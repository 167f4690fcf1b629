//! Guidance: what changes a denoiser's prediction, step by step. Place 4 of images.
//!
//! A stage of guidance says which predictions it needs ([`Guidance::needs`]) and how it combines them
//! ([`Guidance::guide`]); a [`Guider`] runs a stack of stages around a denoiser, all branches of one graph in one
//! call. A sampler takes what comes out, [`Guided`], and knows nothing of guidance.

mod classifier_free;
mod guided;
mod outputs;
mod runner;

pub use classifier_free::ClassifierFreeGuidance;
pub use guided::Guided;
pub use outputs::{Memory, Outputs};
pub use runner::{Guider, GuiderRun};

use tch::Tensor;

use crate::{Error, NoiseLevel, Result};

/// Where a sampler is: from `level` it goes to `next`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Which step this is, from 0.
    pub index: usize,
    /// How many there are.
    pub of: usize,
    /// The timestep, in the units of the denoiser.
    pub timestep: f64,
    /// The noise of x now.
    pub level: NoiseLevel,
    /// The noise of x after this step.
    pub next: NoiseLevel,
}

/// One prediction that a stage needs. Branches of one graph are rows of one batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Branch {
    /// Which of the guider's conditions: by custom 0 is the unconditional or negative one, 1 the prompt.
    pub condition: u32,
    /// Which variant of the forward pass, as [`Lane::variant`](crate::Lane) tells controls: 0 is the plain one.
    pub variant: u8,
    /// Which of the guider's stacks of controls. A control that cannot go by lanes needs a graph of its own.
    pub graph: u8,
}

impl Branch {
    /// The plain prediction under a condition.
    pub const fn of(condition: u32) -> Self {
        Self { condition, variant: 0, graph: 0 }
    }

    /// The same branch in another variant of the forward pass.
    #[must_use]
    pub const fn variant(self, variant: u8) -> Self {
        Self { variant, ..self }
    }

    /// The same branch under another stack of controls.
    #[must_use]
    pub const fn graph(self, graph: u8) -> Self {
        Self { graph, ..self }
    }
}

/// Which gradients a stage needs in a step; a property of the step, not of a branch, as it would split the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grad {
    /// None: everything runs without a graph.
    #[default]
    None,
    /// Those of functions of x_t, which the denoiser has no part in.
    AtX,
    /// Those of functions of predictions: the denoiser records its graph.
    ThroughDenoiser,
}

/// What a stage needs in a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The predictions.
    pub branches: Vec<Branch>,
    /// The gradients.
    pub grad: Grad,
}

impl Needs {
    /// Predictions, and no gradient.
    pub fn branches(branches: impl Into<Vec<Branch>>) -> Self {
        Self { branches: branches.into(), grad: Grad::None }
    }

    /// A gradient, and no prediction beyond the one so far.
    pub fn grad(grad: Grad) -> Self {
        Self { branches: Vec::new(), grad }
    }
}

/// A stage of guidance.
///
/// It is immutable; what it remembers from step to step is in [`Memory`], which belongs to the run. Stages that
/// combine predictions linearly use [`Prediction::combine`](crate::Prediction::combine), which means the same
/// whatever the model predicts; others ask for the form in which their paper is written.
pub trait Guidance: Send {
    /// Another handle over the same storage.
    fn handle(&self) -> Box<dyn Guidance>;

    /// What it is called in errors: `classifier-free guidance`.
    fn name(&self) -> &'static str;

    /// What it needs in this step. A stage that rests in a step needs nothing.
    fn needs(&self, step: &Step) -> Needs;

    /// Replaces x_t before anything is predicted (blending, inpainting).
    ///
    /// # Errors
    /// The stage's own.
    fn before(&self, step: &Step, x: Tensor) -> Result<Tensor> {
        let _ = step;
        Ok(x)
    }

    /// Changes what the stages before it made.
    ///
    /// # Errors
    /// The stage's own; [`Error::Unsupported`] from [`Outputs::get`] for a branch that was not declared.
    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, memory: &mut Memory) -> Result<Guided>;
}

impl<G: Guidance + ?Sized> Guidance for Box<G> {
    fn handle(&self) -> Box<dyn Guidance> {
        (**self).handle()
    }
    fn name(&self) -> &'static str {
        (**self).name()
    }
    fn needs(&self, step: &Step) -> Needs {
        (**self).needs(step)
    }
    fn before(&self, step: &Step, x: Tensor) -> Result<Tensor> {
        (**self).before(step, x)
    }
    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, memory: &mut Memory) -> Result<Guided> {
        (**self).guide(step, out, so_far, memory)
    }
}

/// An error of a stage, with the stage and the step.
fn in_stage(error: Error, stage: &dyn Guidance, step: &Step) -> Error {
    match error {
        Error::NotFinite { what, at, found } => {
            let at = format!("{at}, step {} of {}", step.index, step.of);
            Error::NotFinite { what: format!("{}: {what}", stage.name()), at, found }
        }
        Error::NotDifferentiable { what } => {
            Error::NotDifferentiable { what: format!("{}: {what}", stage.name()) }
        }
        Error::Shape { what, expected, found } => {
            Error::Shape { what: format!("{}: {what}", stage.name()), expected, found }
        }
        other => other,
    }
}
