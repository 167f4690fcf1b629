//! Linear operators on the columns of an attention map.

/// An N × N operator P, kept as simple as it is. It acts on a map `[.., Tq, N]` from the right, A P, and so on values
/// `[.., N, d]` from the left: (A P) v = A (P v).
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Columns {
    /// 0.
    Zero,
    /// 1.
    Identity,
    /// diag(w), of N numbers.
    Diagonal(Vec<f64>),
    /// Row-major.
    Matrix { n: usize, entries: Vec<f64> },
}

impl Columns {
    /// P diag(w): weights on the columns of what P makes.
    pub(super) fn weighted(self, w: &[f64]) -> Self {
        let diagonal = match self {
            Self::Zero => Self::Zero,
            Self::Identity => Self::Diagonal(w.to_vec()),
            Self::Diagonal(d) => Self::Diagonal(d.iter().zip(w).map(|(d, w)| d * w).collect()),
            Self::Matrix { n, entries } => {
                let weighted = entries.chunks_exact(n).flat_map(|row| row.iter().zip(w).map(|(p, w)| p * w));
                Self::Matrix { n, entries: weighted.collect() }
            }
        };
        diagonal.simplified()
    }

    /// P + Q, both of n columns where they say so.
    pub(super) fn plus(self, other: Self, n: usize) -> Self {
        match (self, other) {
            (Self::Zero, sum) | (sum, Self::Zero) => sum,
            (a, b) => {
                let (a, b) = (a.dense(n), b.dense(n));
                let entries = a.iter().zip(&b).map(|(a, b)| a + b).collect();
                Self::Matrix { n, entries }.simplified()
            }
        }
    }

    fn dense(self, n: usize) -> Vec<f64> {
        let diagonal = |at: &dyn Fn(usize) -> f64| {
            let entry = |i: usize| if i.is_multiple_of(n + 1) { at(i.div_euclid(n + 1)) } else { 0.0 };
            (0..n * n).map(entry).collect()
        };
        match self {
            Self::Zero => vec![0.0; n * n],
            Self::Identity => diagonal(&|_| 1.0),
            Self::Diagonal(w) => diagonal(&|i| w[i]),
            Self::Matrix { entries, .. } => entries,
        }
    }

    /// The simplest form of the same.
    fn simplified(self) -> Self {
        match self {
            Self::Diagonal(w) if w.iter().all(|&w| w == 0.0) => Self::Zero,
            Self::Diagonal(w) if w.iter().all(|&w| w == 1.0) => Self::Identity,
            Self::Matrix { n, entries } => {
                let off = |(i, &p): (usize, &f64)| !i.is_multiple_of(n + 1) && p != 0.0;
                if entries.iter().enumerate().any(off) {
                    return Self::Matrix { n, entries };
                }
                Self::Diagonal(entries.iter().step_by(n + 1).copied().collect()).simplified()
            }
            simple => simple,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_stay_as_simple_as_they_are() {
        let m = |entries: [f64; 4]| Columns::Matrix { n: 2, entries: entries.to_vec() };
        let w = [2.0, -3.0];
        assert_eq!(Columns::Zero.weighted(&w), Columns::Zero);
        assert_eq!(Columns::Identity.weighted(&w), Columns::Diagonal(w.to_vec()));
        assert_eq!(Columns::Identity.weighted(&[1.0, 1.0]), Columns::Identity);
        assert_eq!(Columns::Diagonal(w.to_vec()).weighted(&[0.5, 0.0]), Columns::Diagonal(vec![1.0, -0.0]));
        assert_eq!(Columns::Diagonal(w.to_vec()).weighted(&[0.0, 0.0]), Columns::Zero);
        assert_eq!(m([1.0, 2.0, 3.0, 4.0]).weighted(&w), m([2.0, -6.0, 6.0, -12.0]));
        assert_eq!(m([1.0, 2.0, 3.0, 4.0]).weighted(&[0.0, 0.0]), Columns::Zero);
        assert_eq!(Columns::Zero.plus(Columns::Identity, 2), Columns::Identity);
        assert_eq!(
            Columns::Identity.plus(Columns::Diagonal(w.to_vec()), 2),
            Columns::Diagonal(vec![3.0, -2.0])
        );
        assert_eq!(m([0.0, 1.0, 0.0, 1.0]).plus(Columns::Identity, 2), m([1.0, 1.0, 0.0, 2.0]));
        assert_eq!(m([0.0, 1.0, 0.0, 1.0]).plus(m([1.0, -1.0, 0.0, 0.0]), 2), Columns::Identity);
    }
}
