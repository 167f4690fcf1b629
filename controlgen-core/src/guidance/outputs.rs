//! What a stage of guidance works with: the predictions it declared, gradients, and its memory.

use std::any::Any;

use tch::Tensor;

use super::Branch;
use crate::energy::{backward, checks};
use crate::{Error, Prediction, Result};

/// Runs one more branch, decided late.
type Late<'a> = &'a dyn Fn(&Tensor, Branch) -> Result<Prediction>;

/// The predictions of a step, already run when a stage is called.
pub struct Outputs<'a> {
    x: Tensor,
    predictions: Vec<(Branch, Prediction)>,
    late: Option<Late<'a>>,
}

impl<'a> Outputs<'a> {
    /// Predictions at `x` `[B, ..]`, the base first, to call a stage with: in tests, or in a loop of one's own. For a stage that needs
    /// gradients, x is a leaf that requires them and the predictions were made of it.
    pub fn new(x: Tensor, predictions: Vec<(Branch, Prediction)>) -> Self {
        Self { x, predictions, late: None }
    }

    /// Lets stages ask for more.
    #[must_use]
    pub fn with_late(mut self, late: Late<'a>) -> Self {
        self.late = Some(late);
        self
    }

    /// x_t; the leaf, where gradients are taken.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The prediction that the first stage was given: the first of all. A stage that changes the prediction by a
    /// difference to this one acts the same wherever it stands among others that do.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where these outputs were made of no predictions.
    pub fn base(&self) -> Result<&Prediction> {
        let first = self.predictions.first().map(|(_, prediction)| prediction);
        first.ok_or_else(|| Error::unsupported("a step without predictions", "at least the base"))
    }

    /// The prediction of a branch that the stage declared.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another one.
    pub fn get(&self, branch: Branch) -> Result<&Prediction> {
        let found = self.predictions.iter().find(|(of, _)| *of == branch);
        found.map(|(_, prediction)| prediction).ok_or_else(|| {
            let declared =
                self.predictions.iter().map(|(of, _)| describe(*of)).collect::<Vec<_>>().join("; ");
            let what = format!("the branch of {}, which was not declared in `needs`,", describe(branch));
            Error::unsupported(what, declared)
        })
    }

    /// One more prediction at x_t, decided late (restarts, line searches): a call of its own. Declared branches
    /// share one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where these outputs were made without a denoiser; the denoiser's.
    pub fn extra(&self, branch: Branch) -> Result<Prediction> {
        let Some(late) = self.late else {
            return Err(Error::unsupported("a late prediction without a denoiser", "declared branches"));
        };
        late(&self.x, branch)
    }

    /// ∇ Σ `energy` at x_t, detached: the gradient of each row's. The graph stays for later stages.
    ///
    /// # Errors
    /// [`Error::Shape`] where `energy` is not `[B]`; [`Error::NotDifferentiable`] where it does not depend on x_t,
    /// or the step was declared to need no gradients; [`Error::NotFinite`], naming the rows and the gradient's norm.
    pub fn grad(&self, energy: &Tensor) -> Result<Tensor> {
        checks::one_a_row("energy", energy, self.x.size().first().copied())?;
        backward(energy, &self.x, true)
    }
}

/// A branch in words.
pub(super) fn describe(branch: Branch) -> String {
    let Branch { condition, variant, graph } = branch;
    format!("condition {condition}, variant {variant}, graph {graph}")
}

/// What a stage remembers from step to step of one run (momentum, warm starts): a value of a type of its own.
#[derive(Default)]
pub struct Memory(Option<Box<dyn Any + Send>>);

impl Memory {
    /// The value, made by `first` where there is none yet.
    ///
    /// # Errors
    /// [`Error::ForeignState`] where it is of another type; `first`'s own.
    pub fn get_or<T: Send + 'static>(&mut self, first: impl FnOnce() -> Result<T>) -> Result<&mut T> {
        if self.0.is_none() {
            self.0 = Some(Box::new(first()?));
        }
        let value = self.0.as_mut().and_then(|value| value.downcast_mut());
        value.ok_or(Error::ForeignState { expected: std::any::type_name::<T>() })
    }

    /// The value, if there is one and it is of this type.
    pub fn get<T: 'static>(&self) -> Option<&T> {
        self.0.as_ref().and_then(|value| value.downcast_ref())
    }
}
