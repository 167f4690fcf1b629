//! Positions to one feature vector of a text.

use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

/// How the features of a text's positions become those of the text. Padding has no part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// Those of the last position, which in a language model has seen all others.
    Last,
    /// The mean and the last, side by side: twice as wide.
    MeanAndLast,
}

impl Pooling {
    /// The name in a configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Last => "last",
            Self::MeanAndLast => "mean_and_last",
        }
    }

    /// The inverse of [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Mean, Self::Last, Self::MeanAndLast].into_iter().find(|pooling| pooling.name() == name)
    }

    /// The width of what it makes of features of this width.
    pub fn width(self, features: i64) -> i64 {
        if self == Self::MeanAndLast { 2 * features } else { features }
    }

    /// Features `[B, T, D]` to `[B, D]`, or `[B, 2 D]`, of the positions where `keep`, boolean `[B, T]`, is true; of all of
    /// them for `None`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Value`] for a row of padding alone.
    pub fn pool(self, features: &Tensor, keep: Option<&Tensor>) -> Result<Tensor> {
        let &[rows, len, _] = features.size().as_slice() else {
            return Err(Error::shape("features of positions", "[B, T, D]", &features.size()));
        };
        let weights = match keep {
            None => Tensor::f_ones([rows, len], (features.f_kind()?, features.device()))?,
            Some(keep) if keep.size() == [rows, len] => {
                keep.f_to_device(features.device())?.f_to_kind(features.f_kind()?)?
            }
            Some(keep) => return Err(Error::shape("keep", format!("[{rows}, {len}]"), &keep.size())),
        };
        let counts = weights.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?; // (B, 1)
        if rows == 0 || len == 0 || counts.f_min()?.f_double_value(&[])? < 1.0 {
            return Err(Error::value(
                "text to classify",
                "at least one token in each row",
                "a row without any",
            ));
        }
        let mean = || -> Result<Tensor> {
            let sums = weights.f_unsqueeze(1)?.f_bmm(features)?.f_squeeze_dim(1)?; // (B, D)
            Ok(sums.f_div(&counts)?)
        };
        let last = || -> Result<Tensor> {
            let at = Tensor::f_arange(len, (Kind::Int64, features.device()))?;
            let at = at.f_mul(&weights.f_to_kind(Kind::Int64)?)?.f_amax(&[1i64][..], false)?; // (B)
            let at = at.f_view([rows, 1, 1])?.f_expand([rows, 1, features.size()[2]], false)?;
            Ok(features.f_gather(1, &at, false)?.f_squeeze_dim(1)?) // (B, D)
        };
        match self {
            Self::Mean => mean(),
            Self::Last => last(),
            Self::MeanAndLast => Ok(Tensor::f_cat(&[mean()?, last()?], -1)?),
        }
    }
}
