//! What Prompt-to-Prompt does to an attention map.

use controlgen_core::{Error, Result};

use super::columns::Columns;

/// An edit of an attention map: what becomes of the edited prompt's map A, given that of the source prompt, A_s, and
/// the result of the edits before. Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control" (2022),
/// section 3.
///
/// All are linear in maps, and so in values; nothing is normalised anew, as in the paper.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit(Kind);

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Swap,
    /// M `[N, N]`, and α `[N]`.
    Replace(Vec<f64>, Vec<f64>),
    /// Which source token each token is, and α `[N]`, 0 for new ones.
    Refine(Vec<Option<usize>>, Vec<f64>),
    Reweight(Vec<f64>),
}

/// An edited map A' = A_s P + A Q.
pub(super) struct Edited {
    pub(super) source: Columns,
    pub(super) own: Columns,
}

impl Edited {
    /// A' = A.
    pub(super) const NOTHING: Self = Self { source: Columns::Zero, own: Columns::Identity };
}

impl Edit {
    /// A' = A_s: for self-attention, whose maps hold the layout of the image.
    pub fn swap() -> Self {
        Self(Kind::Swap)
    }

    /// A' = A_s M, *word swap*: M `[N, N]` row-major takes the attention of source token i (row) to token j (column)
    /// of the edited prompt. A word of n tokens replaced by one of m gives each of these 1/m of each of those. N is
    /// the length of the padded prompts; what stays has ones on the diagonal.
    ///
    /// # Errors
    /// [`Error::Shape`] where M is not square; [`Error::Value`] for no tokens or more than 4096; [`Error::NotFinite`].
    pub fn replace(mapper: &[f64]) -> Result<Self> {
        let n = length(mapper.len().isqrt())?;
        if n * n != mapper.len() {
            let found = [i64::try_from(mapper.len()).unwrap_or(i64::MAX)];
            return Err(Error::shape("mapper of tokens, row-major", "[N · N]", &found));
        }
        Ok(Self(Kind::Replace(numbers("mapper of tokens", mapper)?, vec![1.0; n])))
    }

    /// A'_j = A_s, column `source[j]`, for the tokens j that the source prompt has too; new ones (`None`) keep their
    /// own: *adding a phrase*.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens or more than 4096, or a source token that is none of N.
    pub fn refine(source: &[Option<usize>]) -> Result<Self> {
        let n = length(source.len())?;
        if let Some(token) = source.iter().flatten().find(|&&token| token >= n) {
            return Err(Error::value("source token", format!("0 .. {n}"), token));
        }
        let alpha = source.iter().map(|token| if token.is_some() { 1.0 } else { 0.0 }).collect();
        Ok(Self(Kind::Refine(source.to_vec(), alpha)))
    }

    /// A'_j = w_j A_j, *attention re-weighting*: of the result of the edits before. w is 1 for tokens to leave alone,
    /// larger for more of a word, negative for its opposite.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens or more than 4096; [`Error::NotFinite`].
    pub fn reweight(weights: &[f64]) -> Result<Self> {
        length(weights.len())?;
        Ok(Self(Kind::Reweight(numbers("weights of tokens", weights)?)))
    }

    /// Only α_j of the edit on token j, and 1 − α_j of what was there before: the paper's word-by-word blending.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is one α a token; [`Error::Value`] for one outside 0 ..= 1;
    /// [`Error::Unsupported`] for a swap or re-weighting.
    pub fn blend(self, alpha: &[f64]) -> Result<Self> {
        if let Some(bad) = alpha.iter().find(|a| !(0.0..=1.0).contains(*a)) {
            return Err(Error::value("alpha of a token", "0 ..= 1", bad));
        }
        let same = |n: usize| {
            let found = [i64::try_from(alpha.len()).unwrap_or(i64::MAX)];
            if alpha.len() == n { Ok(()) } else { Err(Error::shape("alpha", format!("[{n}]"), &found)) }
        };
        match self.0 {
            Kind::Replace(mapper, before) => {
                same(before.len())?;
                Ok(Self(Kind::Replace(mapper, alpha.to_vec())))
            }
            Kind::Refine(source, before) => {
                same(before.len())?;
                let known = source.iter().zip(alpha).map(|(s, a)| if s.is_some() { *a } else { 0.0 });
                let alpha = known.collect();
                Ok(Self(Kind::Refine(source, alpha)))
            }
            Kind::Swap | Kind::Reweight(_) => {
                Err(Error::unsupported("blending this edit", "replace, refine"))
            }
        }
    }

    /// N, where the edit is of tokens.
    pub(super) fn tokens(&self) -> Option<usize> {
        match &self.0 {
            Kind::Swap => None,
            Kind::Replace(_, w) | Kind::Refine(_, w) | Kind::Reweight(w) => Some(w.len()),
        }
    }

    /// The edit of what earlier ones made of the map.
    pub(super) fn of(&self, Edited { source, own }: Edited) -> Edited {
        let blended = |new: Columns, alpha: &[f64]| {
            let rest: Vec<f64> = alpha.iter().map(|a| 1.0 - a).collect();
            let source = new.weighted(alpha).plus(source.clone().weighted(&rest), alpha.len());
            Edited { source, own: own.clone().weighted(&rest) }
        };
        match &self.0 {
            Kind::Swap => Edited { source: Columns::Identity, own: Columns::Zero },
            Kind::Replace(mapper, alpha) => {
                blended(Columns::Matrix { n: alpha.len(), entries: mapper.clone() }, alpha)
            }
            Kind::Refine(map, alpha) => {
                let n = alpha.len();
                let mut entries = vec![0.0; n * n];
                for (j, i) in map.iter().enumerate().filter_map(|(j, i)| Some((j, (*i)?))) {
                    entries[i * n + j] = 1.0;
                }
                blended(Columns::Matrix { n, entries }, alpha)
            }
            Kind::Reweight(w) => Edited { source: source.weighted(w), own: own.weighted(w) },
        }
    }
}

/// A number of tokens N, of which N × N operators are made.
pub(super) fn length(n: usize) -> Result<usize> {
    const MOST: usize = 4096;
    if (1..=MOST).contains(&n) {
        Ok(n)
    } else {
        Err(Error::value("tokens of an edit", format!("1 ..= {MOST}"), n))
    }
}

/// Numbers that are finite.
fn numbers(what: &str, values: &[f64]) -> Result<Vec<f64>> {
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        let (at, found) = (format!("index {i}"), values[i].to_string());
        return Err(Error::NotFinite { what: what.into(), at, found });
    }
    Ok(values.to_vec())
}
