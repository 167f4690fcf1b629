//! Relative position buckets (Raffel et al. 2020, section 2.1).

use controlgen_core::checkpoint::Weights;
use controlgen_core::{Error, Mask, Result};
use tch::{Kind, Tensor};

/// A number that is added to the score of a key for how far it stands from the query, head by head.
///
/// Near distances have a bucket each, far ones share buckets that grow logarithmically up to `max_distance`, and all
/// that are further share the last. It is kept by distance, so that a pass looks numbers up and computes no bucket.
pub struct RelativeBias {
    /// `[2 M + 1, H]`: of key − query = −M ..= M.
    by_distance: Tensor,
    /// M
    max_distance: i64,
}

/// How distances are put into buckets.
#[derive(Clone, Copy, Debug)]
pub struct Buckets {
    /// How many there are.
    pub count: i64,
    /// From here on all distances share one.
    pub max_distance: i64,
    /// Whether keys after the query have buckets of their own: half of them.
    pub bidirectional: bool,
}

impl Buckets {
    /// The bucket of each distance key − query in −M ..= M, int64 `[2 M + 1]`.
    ///
    /// In f32, as the models were trained: at the borders another rounding would be another bucket.
    fn of_distances(self) -> Result<Tensor> {
        let options = (Kind::Int64, tch::Device::Cpu);
        let relative = Tensor::f_arange_start(-self.max_distance, self.max_distance + 1, options)?;
        let count = if self.bidirectional { self.count >> 1 } else { self.count };
        let (after, distance) = if self.bidirectional {
            (relative.f_gt(0)?.f_to_kind(Kind::Int64)?.f_mul_scalar(count)?, relative.f_abs()?)
        } else {
            (relative.f_zeros_like()?, relative.f_neg()?.f_clamp_min(0)?)
        };
        let exact = count >> 1;
        let span = (self.max_distance as f64 / exact as f64).ln();
        let far = distance
            .f_to_kind(Kind::Float)?
            .f_div_scalar(exact)?
            .f_log()?
            .f_div_scalar(span)?
            .f_mul_scalar(count - exact)?;
        // log 0 is of a near distance.
        let far = far.f_clamp_min(0)?.f_to_kind(Kind::Int64)?.f_add_scalar(exact)?.f_clamp_max(count - 1)?;
        Ok(distance.f_where_self(&distance.f_lt(exact)?, &far)?.f_add(&after)?)
    }
}

impl RelativeBias {
    /// Reads the table `[buckets, H]` of a name.
    pub fn load(weights: &Weights<'_>, name: &str, buckets: Buckets, heads: i64) -> Result<Self> {
        let table = weights.get(name, &[buckets.count, heads])?;
        let of_distances = buckets.of_distances()?.f_to_device(table.device())?;
        let by_distance = table.f_index_select(0, &of_distances)?;
        Ok(Self { by_distance, max_distance: buckets.max_distance })
    }

    /// Another handle over the same numbers.
    pub fn handle(&self) -> Self {
        Self { by_distance: self.by_distance.shallow_clone(), max_distance: self.max_distance }
    }

    /// Of `queries` positions from `first` on and all keys from 0 to the last of them: `[1, H, queries, keys]`.
    pub fn range(&self, first: i64, queries: i64) -> Result<Tensor> {
        let keys =
            Tensor::f_arange(first + queries, (Kind::Int64, self.by_distance.device()))?.f_unsqueeze(0)?;
        self.at(&keys.f_narrow(1, first, queries)?, &keys)
    }

    /// Of queries at positions `[1 or B, Tq]` and keys at `[1 or B, Tk]`: `[1 or B, H, Tq, Tk]`.
    pub fn at(&self, queries: &Tensor, keys: &Tensor) -> Result<Tensor> {
        let m = self.max_distance;
        let distance = keys.f_unsqueeze(1)?.f_sub(&queries.f_unsqueeze(2)?)?; // (B, Tq, Tk)
        let index = distance.f_clamp(-m, m)?.f_add_scalar(m)?;
        let bias = Tensor::f_embedding(&self.by_distance, &index, -1, false, false)?; // (B, Tq, Tk, H)
        Ok(bias.f_permute([0, 3, 1, 2])?.f_contiguous()?)
    }
}

/// The bias where a query sees a key, −∞ where it does not: bias `[1 or B, H, Tq, Tk]`.
pub fn masked(bias: Tensor, mask: &Mask) -> Result<Mask> {
    let seen = match mask {
        Mask::Full => return Ok(Mask::Bias(bias)),
        Mask::Causal => {
            let &[.., queries, keys] = bias.size().as_slice() else {
                return Err(Error::shape("relative bias", "[B, H, Tq, Tk]", &bias.size()));
            };
            if queries == 1 {
                return Ok(Mask::Bias(bias));
            }
            Tensor::f_ones([queries, keys], (Kind::Bool, bias.device()))?.f_tril(keys - queries)?
        }
        Mask::Keep(seen) => seen.shallow_clone(),
        Mask::Bias(more) => return Ok(Mask::Bias(bias.f_add(more)?)),
    };
    Ok(Mask::Bias(bias.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The buckets of T5 (32, 128), worked out by hand from the definition: exact up to half, then logarithmic.
    #[test]
    fn buckets_are_those_of_the_paper() {
        let bucket = |bidirectional, relative: i64| {
            let buckets = Buckets { count: 32, max_distance: 128, bidirectional };
            buckets.of_distances().unwrap().int64_value(&[relative + 128])
        };
        // Both ways: 16 buckets a side, 8 of them exact; 8 · log(d / 8) / log(16) more after that.
        for (relative, expected) in
            [(0, 0), (-1, 1), (1, 17), (-7, 7), (-8, 8), (7, 23), (-11, 8), (-12, 9), (-31, 11), (-33, 12)]
        {
            assert_eq!(bucket(true, relative), expected, "{relative}");
        }
        assert_eq!((bucket(true, -127), bucket(true, -128), bucket(true, 128)), (15, 15, 31));
        // Backwards only: 32 buckets, 16 of them exact; what comes after the query shares the first.
        for (relative, expected) in [(0, 0), (5, 0), (-15, 15), (-16, 16), (-18, 16), (-19, 17), (-128, 31)] {
            assert_eq!(bucket(false, relative), expected, "{relative}");
        }
    }
}
