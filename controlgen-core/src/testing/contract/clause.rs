//! Clauses, and what they demand.

use std::fmt;

use tch::{Device, Kind, Tensor};

use super::Violation;
use crate::noise::Noise;
use crate::{Error, Result};

/// What a clause is called, and how it is checked.
pub type Clause<C> = (&'static str, fn(&C) -> Check);

pub type Check = Result<(), Breach>;

/// Why a clause does not hold.
pub enum Breach {
    Found {
        expected: String,
        found: String,
    },
    /// An error where none is due.
    Failed(Error),
}

impl From<Error> for Breach {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<tch::TchError> for Breach {
    fn from(error: tch::TchError) -> Self {
        Self::Failed(error.into())
    }
}

impl Breach {
    pub fn in_clause(self, contract: &'static str, clause: &'static str) -> Violation {
        let (expected, found) = match self {
            Self::Found { expected, found } => (expected, found),
            Self::Failed(error) => ("no error".to_owned(), format!("the error \"{error}\"")),
        };
        Violation { contract, clause, expected, found }
    }
}

/// Checks all clauses, in order.
pub fn check<C>(contract: &'static str, clauses: &[Clause<C>], case: &C) -> Result<(), Violation> {
    clauses.iter().try_for_each(|(name, clause)| clause(case).map_err(|b| b.in_clause(contract, name)))
}

pub fn breach<T>(expected: impl fmt::Display, found: impl fmt::Display) -> Result<T, Breach> {
    Err(Breach::Found { expected: expected.to_string(), found: found.to_string() })
}

pub fn demand(holds: bool, expected: impl fmt::Display, found: impl fmt::Display) -> Check {
    if holds { Ok(()) } else { breach(expected, found) }
}

/// Demands an error of a kind.
macro_rules! refused {
    ($what:expr, $result:expr, $pattern:pat) => {
        match $result {
            Err($pattern) => Ok(()),
            Err(error) => crate::testing::contract::clause::breach(
                format!("{} to be refused as {}", $what, stringify!($pattern)),
                format!("the error \"{error}\""),
            ),
            Ok(_) => crate::testing::contract::clause::breach(
                format!("{} to be refused as {}", $what, stringify!($pattern)),
                "no error",
            ),
        }
    };
}
pub(super) use refused;

pub fn sized(what: &str, found: &Tensor, expected: &[i64]) -> Check {
    let size = found.size();
    demand(size == expected, format!("{what}: shape {expected:?}"), format!("{size:?}"))
}

/// Equal but for roundings: at most `tolerance` apart, as a part of the largest or, below 1, absolutely. Infinities
/// are equal; NaN is equal to nothing.
pub fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) -> Check {
    sized(what, found, &expected.size())?;
    let plain = |t: &Tensor| t.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
    let (a, b) = (plain(found)?, plain(expected)?);
    if a.numel() == 0 {
        return Ok(());
    }
    let difference = a.f_sub(&b)?.f_abs()?.f_masked_fill(&a.f_eq_tensor(&b)?, 0.0)?;
    let largest = b.f_abs()?.f_masked_fill(&b.f_isfinite()?.f_logical_not()?, 0.0)?;
    let limit = tolerance * largest.f_max()?.f_double_value(&[])?.max(1.0);
    let worst = difference.f_max()?.f_double_value(&[])?;
    demand(worst <= limit, format!("{what}: a difference of at most {limit:.1e}"), format!("{worst:.3e}"))
}

/// Equal to the bit.
pub fn equal(what: &str, found: &Tensor, expected: &Tensor) -> Check {
    sized(what, found, &expected.size())?;
    if found.f_equal(expected)? {
        return Ok(());
    }
    let worst = found.f_sub(expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    breach(format!("{what}: the same to the bit"), format!("a difference of up to {worst:.3e}"))
}

/// Demands a difference.
pub fn different(what: &str, found: &Tensor, from: &Tensor) -> Check {
    let same = found.size() == from.size() && found.f_equal(from)?;
    demand(!same, format!("{what}: a difference"), "the same to the bit")
}

pub fn finite(what: &str, found: &Tensor) -> Check {
    let fine = found.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
    demand(fine, format!("{what}: finite numbers"), "NaN or infinity")
}

/// Standard normals that depend on the seed and `salt` alone.
pub fn noise(seed: u64, salt: u64, shape: &[i64], (kind, device): (Kind, Device)) -> Result<Tensor> {
    Ok(Noise::seeded(seed)
        .stream(salt)
        .normal(shape, Kind::Double, Device::Cpu)?
        .f_to_device(device)?
        .f_to_kind(kind)?)
}

/// What `f` gives on another thread, on which gradients are off too.
pub fn on_thread<R: Send + 'static>(f: impl FnOnce() -> Result<R> + Send + 'static) -> Result<R, Breach> {
    let thread = std::thread::spawn(move || {
        let _no_gradients = tch::no_grad_guard();
        f()
    });
    match thread.join() {
        Ok(result) => Ok(result?),
        Err(_) => breach("the same on another thread", "a panic"),
    }
}

/// Whether gradients are being recorded.
pub fn recording() -> Result<bool> {
    let leaf = Tensor::f_ones([1], tch::kind::FLOAT_CPU)?.f_set_requires_grad(true)?;
    Ok(leaf.f_mul_scalar(2.0)?.requires_grad())
}

/// Demands that `gradient` be that of f `[B]` at x `[B, ..]`, whose rows are independent: along random directions, by
/// central differences of fourth order. Roundings spoil small steps, and kinks large ones: one must do.
pub fn by_differences(
    what: &str,
    x: &Tensor,
    gradient: &Tensor,
    seed: u64,
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Check {
    sized(what, gradient, &x.size())?;
    let double = x.f_kind()? == Kind::Double;
    let (steps, tolerance) = if double { ([1e-3, 1e-4, 1e-5], 1e-5) } else { ([2e-2, 5e-3, 1e-3], 5e-2) };
    let scale = x.f_to_kind(Kind::Double)?.f_square()?.f_mean(None::<Kind>)?.f_sqrt()?.f_double_value(&[])?;
    for salt in 1..=3 {
        let u = noise(seed, salt, &x.size(), (x.f_kind()?, x.device()))?.f_mul_scalar(scale.max(1e-3))?;
        let product = gradient.f_mul(&u)?.f_to_kind(Kind::Double)?.f_flatten(1, -1)?;
        let slopes: Vec<f64> = Vec::try_from(product.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)?;
        let mut told = Ok(());
        for h in steps {
            let at = |k: f64| -> Result<Vec<f64>> {
                Ok(Vec::try_from(f(&x.f_add(&u.f_mul_scalar(k * h)?)?)?.f_to_kind(Kind::Double)?)?)
            };
            let (a, b, c, d) = (at(-2.0)?, at(-1.0)?, at(1.0)?, at(2.0)?);
            let slope = |i: usize| (8.0 * (c[i] - b[i]) - (d[i] - a[i])) / (12.0 * h);
            let expected: Vec<f64> = (0..a.len()).map(slope).collect();
            let largest = expected.iter().fold(1e-6f64, |m, x| m.max(x.abs()));
            told = slopes.iter().zip(&expected).enumerate().try_for_each(|(row, (found, expected))| {
                let expect = format!("{what}: a slope of {expected:.6} in row {row}, by finite differences");
                demand((found - expected).abs() <= tolerance * largest, expect, format!("{found:.6}"))
            });
            if told.is_ok() {
                break;
            }
        }
        told?;
    }
    Ok(())
}
