//! Sums of terms.

use std::ops::{Add, Mul, Neg, Sub};

use super::Term;

/// Σᵢ fᵢ · termᵢ, and which tokens may be said at all. [`ModelArithmetic`](super::ModelArithmetic) runs it.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::testing::TableLm;
/// use controlgen_text::arithmetic::{ModelArithmetic, Term};
///
/// let a = Term::new(Box::new(TableLm::random(5, 1)?));
/// let (b, c) = (a.after([3, 4]), a.instead([2]));
/// let lm = ModelArithmetic::new(&a - 0.6 * b + c)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Expression {
    pub(super) parts: Vec<(f64, Term)>,
    /// Tokens are to have at least e^`.0` times the best one's probability.
    pub(super) plausible: Vec<(f64, Term)>,
}

impl Expression {
    /// Bans tokens to which this term gives less than `alpha` times the probability of its best one: the plausibility
    /// constraint of contrastive decoding (Li et al. 2023, equation 2). [`ModelArithmetic`](super::ModelArithmetic) refuses an
    /// `alpha` outside (0, 1].
    #[must_use]
    pub fn plausible(mut self, term: &Term, alpha: f64) -> Self {
        self.plausible.push((alpha.ln(), term.clone()));
        self
    }
}

impl From<Term> for Expression {
    fn from(term: Term) -> Self {
        Self { parts: vec![(1.0, term)], plausible: Vec::new() }
    }
}

impl From<&Term> for Expression {
    fn from(term: &Term) -> Self {
        term.clone().into()
    }
}

fn sum(mut left: Expression, right: Expression) -> Expression {
    left.parts.extend(right.parts);
    left.plausible.extend(right.plausible);
    left
}

fn scaled(mut expression: Expression, factor: f64) -> Expression {
    expression.parts.iter_mut().for_each(|(f, _)| *f *= factor);
    expression
}

macro_rules! sums {
    ($left:ty: $($right:ty),+) => {$(
        impl Add<$right> for $left {
            type Output = Expression;
            fn add(self, other: $right) -> Expression {
                sum(self.into(), other.into())
            }
        }
        impl Sub<$right> for $left {
            type Output = Expression;
            fn sub(self, other: $right) -> Expression {
                sum(self.into(), scaled(other.into(), -1.0))
            }
        }
    )+};
}

macro_rules! multiples {
    ($($of:ty),+) => {$(
        impl Mul<f64> for $of {
            type Output = Expression;
            fn mul(self, factor: f64) -> Expression {
                scaled(self.into(), factor)
            }
        }
        impl Mul<$of> for f64 {
            type Output = Expression;
            fn mul(self, of: $of) -> Expression {
                scaled(of.into(), self)
            }
        }
        impl Neg for $of {
            type Output = Expression;
            fn neg(self) -> Expression {
                scaled(self.into(), -1.0)
            }
        }
    )+};
}

sums!(Expression: Expression, Term, &Term);
sums!(Term: Expression, Term, &Term);
sums!(&Term: Expression, Term, &Term);
multiples!(Expression, Term, &Term);
