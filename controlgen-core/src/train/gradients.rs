//! Gradients as values: summed over batches, clipped, given to an optimizer.

use tch::{Kind, Tensor};

use super::Parameters;
use crate::{Error, Result};

/// The gradients of a loss at [`Parameters`], one each, or none where the loss does not depend on the parameter.
///
/// They are values of their own and not kept at the leaves, so that nothing is left over from one step to the next.
pub struct Gradients {
    id: u64,
    all: Vec<Option<Gradient>>,
    /// All are to be multiplied by it. Clipping sets it: the multiplication is part of the optimizer's pass.
    scale: f64,
}

struct Gradient {
    value: Tensor,
    /// Whether nobody else holds it, so that it may be changed in place. What LibTorch answers with may be one tensor
    /// for two parameters.
    ours: bool,
}

impl Gradients {
    /// None, for parameters: where a sum begins.
    #[must_use]
    pub fn none(parameters: &Parameters) -> Self {
        Self { id: parameters.id(), all: parameters.iter().map(|_| None).collect(), scale: 1.0 }
    }

    /// ∇ `loss`, at all parameters that are not frozen. The graph is used up.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the loss is one number, [`Error::NotFinite`] if it is none;
    /// [`Error::NotDifferentiable`] if it depends on no parameter; [`Error::Unsupported`] for a gradient that is not
    /// dense.
    pub fn of(loss: &Tensor, parameters: &Parameters) -> Result<Self> {
        finite("loss", "this step", scalar(loss)?)?;
        let mut gradients = Self::none(parameters);
        gradients.add(loss, parameters)?;
        Ok(gradients)
    }

    /// Adds ∇ `loss`. The graph is used up. The loss is not looked at: see [`Gradients::norm`].
    ///
    /// # Errors
    /// [`Error::ForeignState`] for other parameters; [`Error::NotDifferentiable`]; [`Error::Unsupported`], as above.
    pub fn add(&mut self, loss: &Tensor, parameters: &Parameters) -> Result<()> {
        self.belong_to(parameters)?;
        let independent = || Error::NotDifferentiable { what: "the loss".into() };
        if !loss.requires_grad() {
            return Err(independent());
        }
        let trained = || parameters.iter().zip(0..).filter(|(parameter, _)| !parameter.group.frozen);
        let leaves: Vec<&Tensor> = trained().map(|(parameter, _)| &parameter.value).collect();
        let found = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
        let _no_gradients = tch::no_grad_guard();
        let mut any = false;
        for ((parameter, number), value) in trained().zip(found) {
            if !value.defined() {
                continue;
            }
            any = true;
            if value.is_sparse() {
                let what = format!("the gradient of parameter `{}`, which is sparse,", parameter.name);
                return Err(Error::unsupported(what, "dense gradients"));
            }
            let sum: &mut Option<Gradient> = &mut self.all[number];
            match sum {
                None => *sum = Some(Gradient { value, ours: false }),
                Some(sum) if sum.ours => drop(sum.value.f_add_(&value)?),
                Some(sum) => *sum = Gradient { value: sum.value.f_add(&value)?, ours: true },
            }
        }
        if any { Ok(()) } else { Err(independent()) }
    }

    /// The norm of all gradients as one vector, √Σ g²; 0 without any. NaN or infinite if a gradient is.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn norm(&self) -> Result<f64> {
        let _no_gradients = tch::no_grad_guard();
        let mut norms: Vec<Tensor> = Vec::with_capacity(self.all.len());
        for gradient in self.all.iter().flatten() {
            let norm = gradient.value.f_norm()?;
            norms.push(match norms.first() {
                Some(first) if first.device() != norm.device() => norm.f_to_device(first.device())?,
                _ => norm,
            });
        }
        if norms.is_empty() {
            return Ok(0.0);
        }
        Ok(Tensor::f_stack(&norms, 0)?.f_norm()?.f_double_value(&[])? * self.scale)
    }

    /// Scales all gradients to a norm of at most `most`: by min(1, most / (norm + 10⁻⁶)), as PyTorch's
    /// `clip_grad_norm_`. Gives the norm before (Pascanu, Mikolov & Bengio 2013, "On the difficulty of training
    /// recurrent neural networks").
    ///
    /// # Errors
    /// [`Error::Value`] unless `most` > 0; [`Error::NotFinite`] for a norm that is no number.
    pub fn clip_norm(&mut self, most: f64) -> Result<f64> {
        positive("clip_norm", most)?;
        let norm = self.norm()?;
        finite("norm of the gradients", "this step", norm)?;
        self.clip_to(norm, most);
        Ok(norm)
    }

    /// The same where the norm is known.
    pub(super) fn clip_to(&mut self, norm: f64, most: f64) {
        self.scale *= (most / (norm + 1e-6)).min(1.0);
    }

    /// Brings each number of each gradient into −`most` … `most`, as PyTorch's `clip_grad_value_`.
    ///
    /// # Errors
    /// [`Error::Value`] unless `most` > 0.
    pub fn clip_value(&mut self, most: f64) -> Result<()> {
        positive("clip_value", most)?;
        let _no_gradients = tch::no_grad_guard();
        for gradient in self.all.iter_mut().flatten() {
            let scaled = gradient.value.f_mul_scalar(self.scale)?.f_clamp_(-most, most)?;
            *gradient = Gradient { value: scaled, ours: true };
        }
        self.scale = 1.0;
        Ok(())
    }

    /// The gradient of a parameter by its number, and what it is to be multiplied by.
    pub(super) fn get(&self, number: usize) -> Option<(&Tensor, f64)> {
        let gradient = self.all.get(number)?.as_ref()?;
        Some((&gradient.value, self.scale))
    }

    /// The gradient of a parameter by its number in [`Parameters::iter`]; none where the loss did not depend on it.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn value(&self, number: usize) -> Result<Option<Tensor>> {
        let _no_gradients = tch::no_grad_guard();
        self.get(number).map(|(gradient, scale)| Ok(gradient.f_mul_scalar(scale)?)).transpose()
    }

    pub(super) fn belong_to(&self, parameters: &Parameters) -> Result<()> {
        if self.id == parameters.id() {
            return Ok(());
        }
        Err(Error::ForeignState { expected: "gradients of these parameters" })
    }
}

/// A loss as a number.
pub(super) fn scalar(loss: &Tensor) -> Result<f64> {
    if !loss.defined() {
        return Err(Error::value("loss", "a tensor", "an undefined one"));
    }
    if loss.numel() != 1 {
        return Err(Error::shape("loss", "one number", &loss.size()));
    }
    crate::energy::checks::floating("loss", loss)?;
    Ok(loss.f_detach()?.f_to_kind(Kind::Double)?.f_sum(None::<Kind>)?.f_double_value(&[])?)
}

/// Refuses NaN and infinities.
pub(super) fn finite(what: &str, at: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let found = if value.is_nan() { "NaN" } else { "infinity" };
    Err(Error::NotFinite { what: what.to_owned(), at: at.to_owned(), found: found.into() })
}

fn positive(what: &str, value: f64) -> Result<()> {
    if value > 0.0 {
        return Ok(());
    }
    Err(Error::value(what, "a number > 0", value))
}
