//! Energies under constraints.

use std::ops::Add;

use tch::{Kind, Tensor};

use super::{Energy, EnergyFn, checks};
use crate::{Error, Result};

/// The constraint f(x) ≤ ε, made by [`Energy::at_most`].
pub struct Bound<X: ?Sized> {
    /// f.
    pub energy: Energy<X>,
    /// ε.
    pub epsilon: f64,
}

impl<X: ?Sized> Clone for Bound<X> {
    fn clone(&self) -> Self {
        Self { energy: self.energy.clone(), epsilon: self.epsilon }
    }
}

/// An energy to lower under constraints: `energy + f.at_most(0.5) + g.at_most(1.0)`.
///
/// As an [`EnergyFn`] it is the hard reading: +∞ wherever a constraint is broken.
pub struct Objective<X: ?Sized> {
    /// What is to be low.
    pub energy: Energy<X>,
    /// What must hold.
    pub bounds: Vec<Bound<X>>,
}

impl<X: ?Sized> Clone for Objective<X> {
    fn clone(&self) -> Self {
        Self { energy: self.energy.clone(), bounds: self.bounds.clone() }
    }
}

impl<X: ?Sized> From<Energy<X>> for Objective<X> {
    fn from(energy: Energy<X>) -> Self {
        Self { energy, bounds: Vec::new() }
    }
}

impl<X: ?Sized> Add<Bound<X>> for Energy<X> {
    type Output = Objective<X>;
    fn add(self, bound: Bound<X>) -> Objective<X> {
        Objective::from(self) + bound
    }
}

impl<X: ?Sized> Add<Bound<X>> for Objective<X> {
    type Output = Self;
    fn add(mut self, bound: Bound<X>) -> Self {
        self.bounds.push(bound);
        self
    }
}

impl<X: ?Sized + 'static> Add<Energy<X>> for Objective<X> {
    type Output = Self;
    fn add(self, energy: Energy<X>) -> Self {
        Self { energy: self.energy + energy, bounds: self.bounds }
    }
}

impl<X: ?Sized> Objective<X> {
    /// Evaluates each part once. How the constraints are read is chosen afterwards.
    ///
    /// # Errors
    /// [`Error::Value`] for an ε that is NaN; [`Error::Shape`] for a part that does not give one number a row; the
    /// parts' own.
    pub fn evaluate(&self, x: &X) -> Result<Value> {
        let energy = self.energy.energy(x)?;
        checks::one_a_row("energy", &energy, None)?;
        let rows = energy.size()[0];
        let mut slack = Vec::with_capacity(self.bounds.len());
        for Bound { energy: f, epsilon } in &self.bounds {
            if epsilon.is_nan() {
                return Err(Error::value("bound of a constraint", "a number", epsilon));
            }
            let f = f.energy(x)?;
            checks::one_a_row("constraint", &f, Some(rows))?;
            slack.push(f.f_neg()?.f_add_scalar(*epsilon)?.f_to_kind(energy.f_kind()?)?);
        }
        let slack = if slack.is_empty() {
            Tensor::f_zeros([rows, 0], (energy.f_kind()?, energy.device()))?
        } else {
            Tensor::f_stack(&slack, 1)?
        };
        Ok(Value { energy, slack })
    }
}

impl<X: ?Sized> EnergyFn<X> for Objective<X> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        self.evaluate(x)?.hard()
    }
}

/// An [`Objective`] at a point.
pub struct Value {
    /// E(x), `[B]`.
    pub energy: Tensor,
    /// εᵢ − fᵢ(x), `[B, n]`: negative where constraint i is broken.
    pub slack: Tensor,
}

impl Value {
    /// Whether each row keeps all constraints: boolean `[B]`. A slack of NaN breaks its constraint.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn feasible(&self) -> Result<Tensor> {
        Ok(self.slack.f_ge(0.0)?.f_all_dim(1, false)?)
    }

    /// E(x), and +∞ wherever a constraint is broken: `[B]`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn hard(&self) -> Result<Tensor> {
        Ok(self.energy.f_masked_fill(&self.feasible()?.f_logical_not()?, f64::INFINITY)?)
    }

    /// The Lagrangian E(x) − Σᵢ λᵢ (εᵢ − fᵢ(x)), `[B]`, with a multiplier λ ≥ 0 a row and constraint, `[B, n]`: a
    /// batch is B problems. The caller keeps and updates λ (Platt & Barr 1987; Kumar, Paria & Tsvetkov 2022).
    ///
    /// # Errors
    /// [`Error::Shape`], and [`Error::Value`] for a multiplier below 0 or NaN.
    pub fn lagrangian(&self, lambda: &Tensor) -> Result<Tensor> {
        if lambda.size() != self.slack.size() {
            return Err(Error::shape("multipliers", format!("{:?}", self.slack.size()), &lambda.size()));
        }
        if lambda.f_ge(0.0)?.f_all()?.f_int64_value(&[])? == 0 {
            let found = lambda.f_min()?.f_double_value(&[])?;
            return Err(Error::value("multiplier", ">= 0", found));
        }
        let penalty = self.slack.f_mul(lambda)?.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?;
        Ok(self.energy.f_sub(&penalty)?)
    }
}
