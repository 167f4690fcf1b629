//! Energies, and sums and multiples of them.

use std::ops::{Add, Mul, Neg, Sub};

use tch::Tensor;

use super::{Bound, checks};
use crate::{Error, Result};

/// A function of a batch of x, one number a row, lower being better.
///
/// X is an owned value, such as [`Text`](super::Text), [`Image`](super::Image) or [`Noised`](super::Noised). An
/// energy that holds a model holds a handle of its own; it is `Clone` by making another handle.
pub trait EnergyFn<X: ?Sized> {
    /// E(x), `[B]`, floating-point. Differentiable in x wherever it can be: it neither detaches nor turns gradients
    /// off. +∞ means "never".
    ///
    /// # Errors
    /// The energy's own.
    fn energy(&self, x: &X) -> Result<Tensor>;
}

/// What [`Energy`] holds: an [`EnergyFn`] that can be cloned although its type is not known.
trait AnyEnergy<X: ?Sized>: Send {
    fn handle(&self) -> Box<dyn AnyEnergy<X>>;
    fn evaluate(&self, x: &X) -> Result<Tensor>;
}

impl<X: ?Sized, E: EnergyFn<X> + Clone + Send + 'static> AnyEnergy<X> for E {
    fn handle(&self) -> Box<dyn AnyEnergy<X>> {
        Box::new(self.clone())
    }
    fn evaluate(&self, x: &X) -> Result<Tensor> {
        self.energy(x)
    }
}

/// An energy over X: owned, cloned by sharing, and with an algebra: `2.0 * a + b`, `a - b`, `-a`.
///
/// ```
/// use controlgen_core::energy::{Energy, Image};
///
/// let bright = Energy::from_fn(|x: &Image| Ok(x.0.f_mean_dim(&[1i64, 2, 3][..], false, x.0.f_kind()?)?.f_neg()?));
/// let calm = Energy::from_fn(|x: &Image| Ok(x.0.f_std_dim(&[1i64, 2, 3][..], false, false)?));
/// let both = 2.0 * bright + calm;
/// # let _ = both;
/// ```
///
/// Each part must give one number a row; a part that gives another shape is refused ([`Error::Shape`]) instead of
/// being broadcast.
pub struct Energy<X: ?Sized>(Box<dyn AnyEnergy<X>>);

impl<X: ?Sized> Clone for Energy<X> {
    fn clone(&self) -> Self {
        Self((*self.0).handle())
    }
}

impl<X: ?Sized> EnergyFn<X> for Energy<X> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        (*self.0).evaluate(x)
    }
}

impl<X: ?Sized + 'static> Energy<X> {
    /// Boxes an energy.
    pub fn new(energy: impl EnergyFn<X> + Clone + Send + 'static) -> Self {
        Self(Box::new(energy))
    }

    /// The energy that a closure computes, `[B]` of x. What it captures must be `Clone`: wrap tensors in
    /// [`SharedTensor`](crate::SharedTensor).
    pub fn from_fn(f: impl Fn(&X) -> Result<Tensor> + Clone + Send + 'static) -> Self {
        Self(Box::new(FromFn(f)))
    }

    /// The constraint E(x) ≤ `epsilon`. It is no energy until somebody chooses how it is enforced
    /// ([`Value`](super::Value)).
    pub fn at_most(self, epsilon: f64) -> Bound<X> {
        Bound { energy: self, epsilon }
    }
}

/// A newtype, because an impl for every closure would leave no room for other impls.
#[derive(Clone)]
struct FromFn<F>(F);

impl<X: ?Sized, F: Fn(&X) -> Result<Tensor>> EnergyFn<X> for FromFn<F> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        (self.0)(x)
    }
}

struct Scaled<X: ?Sized>(f64, Energy<X>);

impl<X: ?Sized> Clone for Scaled<X> {
    fn clone(&self) -> Self {
        Self(self.0, self.1.clone())
    }
}

impl<X: ?Sized> EnergyFn<X> for Scaled<X> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        if !self.0.is_finite() {
            return Err(Error::value("factor of an energy", "a finite number", self.0));
        }
        let value = self.1.energy(x)?;
        checks::one_a_row("energy", &value, None)?;
        Ok(value.f_mul_scalar(self.0)?)
    }
}

struct Sum<X: ?Sized>(Energy<X>, Energy<X>);

impl<X: ?Sized> Clone for Sum<X> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), self.1.clone())
    }
}

impl<X: ?Sized> EnergyFn<X> for Sum<X> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        let a = self.0.energy(x)?;
        checks::one_a_row("energy", &a, None)?;
        let b = self.1.energy(x)?;
        checks::one_a_row("energy", &b, a.size().first().copied())?;
        Ok(a.f_add(&b)?)
    }
}

impl<X: ?Sized + 'static> Mul<Energy<X>> for f64 {
    type Output = Energy<X>;
    fn mul(self, energy: Energy<X>) -> Energy<X> {
        Energy(Box::new(Scaled(self, energy)))
    }
}

impl<X: ?Sized + 'static> Mul<f64> for Energy<X> {
    type Output = Self;
    fn mul(self, factor: f64) -> Self {
        factor * self
    }
}

impl<X: ?Sized + 'static> Neg for Energy<X> {
    type Output = Self;
    fn neg(self) -> Self {
        -1.0 * self
    }
}

impl<X: ?Sized + 'static> Add for Energy<X> {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(Box::new(Sum(self, other)))
    }
}

impl<X: ?Sized + 'static> Sub for Energy<X> {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}
