//! What all optimizers are: a step along gradients, and a state that can be saved.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::{Gradients, Parameter, Parameters};
use crate::{Error, Result};

/// Moves parameters along gradients.
///
/// A parameter without a gradient is left alone, with its state. Steps are taken in place, without gradients being
/// recorded.
pub trait Optimizer: Send {
    /// The parameters that it moves.
    fn parameters(&self) -> &Parameters;

    /// One step at a learning rate, which the rate of a parameter's [`Group`](super::Group) multiplies.
    ///
    /// # Errors
    /// [`Error::ForeignState`] for gradients of other parameters; [`Error::Value`] for a rate that is negative or no
    /// number. Numbers are not looked at: see [`Gradients::norm`].
    fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()>;

    /// What it remembers, by name: `KEY.PARAMETER`. Handles, no copies.
    ///
    /// # Errors
    /// Those of LibTorch.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Takes up a state that the same optimizer gave, of parameters of the same names. Nothing changes unless all fits.
    ///
    /// # Errors
    /// [`Error::Keys`] for a state of other parameters, or of another optimizer; [`Error::Shape`], [`Error::Kind`],
    /// [`Error::Value`].
    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()>;

    /// Its name and settings: what a run that is resumed must have in common with the one before.
    fn configuration(&self) -> serde_json::Value;
}

/// Checks what is given to a step.
pub(super) fn check_step(parameters: &Parameters, gradients: &Gradients, learning_rate: f64) -> Result<()> {
    gradients.belong_to(parameters)?;
    not_negative("learning rate", learning_rate)
}

/// Refuses what is negative or no number.
pub(super) fn not_negative(what: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::value(what, "a finite number ≥ 0", value))
}

/// Refuses what is not in [0, 1).
pub(super) fn fraction(what: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::value(what, "0 ≤ x < 1", value))
}

/// The gradient times its scale: itself where that is 1.
pub(super) fn scaled(gradient: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(gradient.shallow_clone()) } else { Ok(gradient.f_mul_scalar(scale)?) }
}

/// 1 for each row of a gradient that is not all 0, of shape `[rows, 1, ..]`.
pub(super) fn touched(gradient: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; gradient.dim()];
    shape[0] = gradient.size()[0];
    let rows = gradient.f_ne(0.0)?.f_reshape([shape[0], -1])?.f_any_dim(1, false)?;
    Ok(rows.f_view(shape.as_slice())?.f_to_kind(Kind::Float)?)
}

/// p ← (1 − `decay`) p, in all rows or those with a gradient.
pub(super) fn decay(parameter: &Parameter, gradient: &Tensor, decay: f64) -> Result<()> {
    let mut value = parameter.value.shallow_clone();
    if decay == 0.0 {
        return Ok(());
    }
    if parameter.group.decay_touched_rows {
        let factor = touched(gradient)?.f_mul_scalar_(-decay)?.f_add_scalar_(1.0)?;
        let _ = value.f_mul_(&factor)?;
    } else {
        let _ = value.f_mul_scalar_(1.0 - decay)?;
    }
    Ok(())
}

/// A count as it is saved.
pub(super) fn count(steps: u64) -> Result<Tensor> {
    let steps = i64::try_from(steps).map_err(|_| Error::value("steps", "< 2^63", steps))?;
    Ok(Tensor::f_from_slice(&[steps])?)
}

/// A saved state, taken apart.
pub(super) struct Saved {
    what: &'static str,
    tensors: BTreeMap<String, Tensor>,
    missing: Vec<String>,
}

impl Saved {
    /// The state of `what`.
    pub(super) fn new(what: &'static str, state: Vec<(String, Tensor)>) -> Self {
        Self { what, tensors: state.into_iter().collect(), missing: Vec::new() }
    }

    /// Whether there is a tensor of this key for a parameter.
    pub(super) fn has(&self, key: &str, parameter: &str) -> bool {
        self.tensors.contains_key(&format!("{key}.{parameter}"))
    }

    /// An f32 tensor of this key for a parameter: a copy, which lies in memory as `like` does. If it is missing, that is
    /// remembered, and the result is 0.
    pub(super) fn take(&mut self, key: &str, parameter: &str, like: &Tensor) -> Result<Tensor> {
        let name = format!("{key}.{parameter}");
        let mut to = like.f_zeros_like()?.f_detach()?;
        let Some(found) = self.tensors.remove(&name) else {
            self.missing.push(name);
            return Ok(to);
        };
        let what = || format!("{}: {name}", self.what);
        if found.size() != to.size() {
            return Err(Error::shape(what(), format!("{:?}", to.size()), &found.size()));
        }
        if found.f_kind()? != Kind::Float {
            let found = format!("{:?}", found.f_kind()?);
            return Err(Error::Kind { what: what(), expected: "Float".into(), found });
        }
        to.f_copy_(&found)?;
        Ok(to)
    }

    /// A count by its full name.
    pub(super) fn count(&mut self, name: &str) -> Result<u64> {
        let Some(found) = self.tensors.remove(name) else {
            self.missing.push(name.to_owned());
            return Ok(0);
        };
        let what = || format!("{}: {name}", self.what);
        if found.numel() != 1 {
            return Err(Error::shape(what(), "[1]", &found.size()));
        }
        if found.f_kind()? != Kind::Int64 {
            let found = format!("{:?}", found.f_kind()?);
            return Err(Error::Kind { what: what(), expected: "Int64".into(), found });
        }
        let steps = found.f_reshape([1])?.f_int64_value(&[0])?;
        u64::try_from(steps).map_err(|_| Error::value(what(), "≥ 0", steps))
    }

    /// Refuses what was missing and what is left over.
    pub(super) fn finish(self) -> Result<()> {
        if self.missing.is_empty() && self.tensors.is_empty() {
            return Ok(());
        }
        let (missing, unexpected) = (self.missing, self.tensors.into_keys().collect());
        Err(Error::Keys { what: self.what.to_owned(), missing, unexpected })
    }
}
