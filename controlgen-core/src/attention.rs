//! Attention as a value: queries, keys, values and what may be seen.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Narrower heads are computed as ones of this width on the CPU, ...
const NARROW: i64 = 16;
/// ... where there are at least so many scores a head: measured, 1.4 to 1.8 times as fast, and 1.1 for a width of 12.
const MANY: i64 = 1 << 16;

/// Which keys a query may see.
pub enum Mask {
    /// All.
    Full,
    /// Bottom-right aligned: query i of Tq sees keys 0 ..= i + (Tk − Tq). Keys put before all others (a prefix)
    /// then need no work on the mask.
    Causal,
    /// True where a key may be seen: boolean, broadcastable to `[B, heads, Tq, Tk]`.
    Keep(Tensor),
    /// Added to the scores: float, broadcastable to `[B, heads, Tq, Tk]`.
    Bias(Tensor),
}

impl Mask {
    /// The same mask over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        match self {
            Self::Full => Self::Full,
            Self::Causal => Self::Causal,
            Self::Keep(t) => Self::Keep(t.shallow_clone()),
            Self::Bias(t) => Self::Bias(t.shallow_clone()),
        }
    }

    /// The mask for `n` more keys before all others, which every query may see.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn with_prefix(&self, n: i64) -> Result<Self> {
        let front = |t: &Tensor, fill: f64| -> Result<Tensor> {
            let mut shape = t.size();
            if let Some(last) = shape.last_mut() {
                *last = n;
            }
            Ok(Tensor::f_cat(&[&Tensor::f_full(&shape, fill, (t.f_kind()?, t.device()))?, t], -1)?)
        };
        Ok(match self {
            Self::Full => Self::Full,
            Self::Causal => Self::Causal,
            Self::Keep(t) => Self::Keep(front(t, 1.0)?),
            Self::Bias(t) => Self::Bias(front(t, 0.0)?),
        })
    }
}

impl Mask {
    /// The mask of rows by index, of a batch of `batch`: one that all rows share stays as it is.
    ///
    /// # Errors
    /// Those of LibTorch, for an index that is no row.
    pub fn select(&self, batch: i64, rows: &Tensor) -> Result<Self> {
        let of_rows = |t: &Tensor| -> Result<Tensor> {
            let own = t.dim() == 4 && t.size()[0] == batch && batch > 1;
            Ok(if own { t.f_index_select(0, rows)? } else { t.shallow_clone() })
        };
        Ok(match self {
            Self::Full => Self::Full,
            Self::Causal => Self::Causal,
            Self::Keep(t) => Self::Keep(of_rows(t)?),
            Self::Bias(t) => Self::Bias(of_rows(t)?),
        })
    }
}

/// An attention about to be computed: softmax(q kᵀ · scale + mask) v.
pub struct Attn {
    /// Queries, `[B, heads, Tq, head_dim]`.
    pub q: Tensor,
    /// Keys, `[B, kv_heads, Tk, head_dim]`; `kv_heads` divides `heads` (Ainslie et al. 2023, grouped queries).
    pub k: Tensor,
    /// Values, `[B, kv_heads, Tk, head_dim]`.
    pub v: Tensor,
    /// Which keys may be seen.
    pub mask: Mask,
    /// The factor on the scores; 1/√head_dim where `None`.
    pub scale: Option<f64>,
}

impl Attn {
    /// The same attention over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            q: self.q.shallow_clone(),
            k: self.k.shallow_clone(),
            v: self.v.shallow_clone(),
            mask: self.mask.handle(),
            scale: self.scale,
        }
    }

    /// The mask for `n` more keys before all others, which the queries of some rows may see: `rows`, boolean `[B]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows that are not one a row of the batch; those of LibTorch.
    pub fn mask_with_prefix_of(&self, n: i64, rows: &Tensor) -> Result<Mask> {
        let (b, _, tq, _) = self.q.size4()?;
        let (_, _, tk, _) = self.k.size4()?;
        if rows.size() != [b] {
            return Err(Error::shape("rows that see a prefix", format!("[{b}]"), &rows.size()));
        }
        let front = rows.f_to_device(self.q.device())?.f_view([b, 1, 1, 1])?;
        let ones = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Bool, self.q.device()));
        // The keys there were: kept (boolean), or biased.
        let (kept, bias) = match &self.mask {
            Mask::Full => (ones(&[1, 1, 1, tk])?, false),
            Mask::Causal if tq == 1 => (ones(&[1, 1, 1, tk])?, false),
            Mask::Causal => (ones(&[tq, tk])?.f_tril(tk - tq)?, false),
            Mask::Keep(t) => (t.shallow_clone(), false),
            Mask::Bias(t) => (t.shallow_clone(), true),
        };
        let mut shape = vec![1; 4 - kept.dim().min(4)];
        shape.extend(kept.size());
        let (heads, queries) = (shape[1], shape[2]);
        let kept = kept.f_view(&shape[..])?.f_expand([b, heads, queries, tk], false)?;
        let front = front.f_expand([b, heads, queries, n], false)?;
        if !bias {
            return Ok(Mask::Keep(Tensor::f_cat(&[&front, &kept], -1)?));
        }
        let none = Tensor::f_zeros_like(&front)?.f_to_kind(kept.f_kind()?)?;
        let front = none.f_masked_fill(&front.f_logical_not()?, f64::NEG_INFINITY)?;
        Ok(Mask::Bias(Tensor::f_cat(&[&front, &kept], -1)?))
    }

    /// The attention of rows by index: of some rows of the batch, or of all in another order.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is no row.
    pub fn select(&self, rows: &[i64]) -> Result<Self> {
        let batch = self.q.size().first().copied().unwrap_or(0);
        if let Some(row) = rows.iter().find(|&&row| row < 0 || row >= batch) {
            return Err(Error::value("row", format!("0 .. {batch}"), row));
        }
        let rows = Tensor::f_from_slice(rows)?.f_to_device(self.q.device())?;
        let of_rows = |t: &Tensor| t.f_index_select(0, &rows);
        let (q, k, v) = (of_rows(&self.q)?, of_rows(&self.k)?, of_rows(&self.v)?);
        Ok(Self { q, k, v, mask: self.mask.select(batch, &rows)?, scale: self.scale })
    }

    /// Computes it, with LibTorch's fused kernel: `[B, heads, Tq, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] where the heads do not divide; those of LibTorch.
    pub fn sdpa(self) -> Result<Tensor> {
        let (b, heads, tq, d) = self.q.size4()?;
        let (_, kv_heads, tk, _) = self.k.size4()?;
        if kv_heads == 0 || heads % kv_heads != 0 {
            let expected = format!("a divisor of {heads} as the number of heads");
            return Err(Error::shape("attention keys", expected, &self.k.size()));
        }
        let kept = match &self.mask {
            Mask::Keep(t) | Mask::Bias(t) => Some(t.shallow_clone()),
            Mask::Causal if tq > 1 && tq != tk => {
                Some(Tensor::f_ones([tq, tk], (Kind::Bool, self.q.device()))?.f_tril(tk - tq)?)
            }
            Mask::Full | Mask::Causal => None,
        };
        let causal = matches!(self.mask, Mask::Causal) && tq > 1 && tq == tk;
        let shared_rows = match &kept {
            None => true,
            Some(t) => t.size().iter().rev().skip(1).take(2).all(|&n| n == 1),
        };
        if heads != kv_heads && tq == 1 && shared_rows {
            // One query: its groups are as good as positions, and no key need be repeated.
            let grouped = self.q.f_reshape([b, kv_heads, -1, d])?;
            let out = Tensor::f_scaled_dot_product_attention(
                &grouped,
                &self.k,
                &self.v,
                kept.as_ref(),
                0.0,
                false,
                self.scale,
                false,
            )?;
            return Ok(out.f_reshape([b, heads, 1, d])?);
        }
        let narrow = d < NARROW && self.v.size().last() == Some(&d);
        if narrow && tq.saturating_mul(tk) >= MANY && self.q.device() == Device::Cpu {
            // Products of so narrow heads are slow on the CPU; zeros beside them change nothing.
            let wide = |t: &Tensor| t.f_constant_pad_nd([0, NARROW - d]);
            let scale = self.scale.unwrap_or(1.0 / (d as f64).sqrt());
            let out = Tensor::f_scaled_dot_product_attention(
                &wide(&self.q)?,
                &wide(&self.k)?,
                &wide(&self.v)?,
                kept.as_ref(),
                0.0,
                causal,
                scale,
                heads != kv_heads,
            )?;
            return Ok(out.f_narrow(-1, 0, d)?);
        }
        Ok(Tensor::f_scaled_dot_product_attention(
            &self.q,
            &self.k,
            &self.v,
            kept.as_ref(),
            0.0,
            causal,
            self.scale,
            heads != kv_heads,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    /// softmax(q kᵀ · scale, masked) v, written out.
    fn explicit(a: &Attn) -> Tensor {
        let (_, h, tq, d) = a.q.size4().unwrap();
        let (_, hk, tk, _) = a.k.size4().unwrap();
        let k = a.k.repeat_interleave_self_int(h.div_euclid(hk), 1, None);
        let v = a.v.repeat_interleave_self_int(h.div_euclid(hk), 1, None);
        let scores = a.q.matmul(&k.transpose(2, 3)) * a.scale.unwrap_or(1.0 / (d as f64).sqrt());
        let scores = match &a.mask {
            Mask::Full => scores,
            Mask::Causal => {
                let keep = Tensor::ones([tq, tk], (Kind::Bool, Device::Cpu)).tril(tk - tq);
                scores.masked_fill(&keep.logical_not(), f64::NEG_INFINITY)
            }
            Mask::Keep(keep) => scores.masked_fill(&keep.logical_not(), f64::NEG_INFINITY),
            Mask::Bias(bias) => scores + bias,
        };
        scores.softmax(-1, None).matmul(&v)
    }

    fn noise(shape: &[i64], salt: f64) -> Tensor {
        let n: i64 = shape.iter().product();
        ((Tensor::arange(n, FLOAT_CPU) * 12.9898 + salt).sin() * 43758.5453).frac().view(shape) * 2.0 - 1.0
    }

    #[test]
    fn sdpa_is_the_written_out_attention() {
        for (h, hk) in [(4, 4), (6, 2), (9, 3)] {
            for (tq, tk) in [(1, 1), (1, 7), (3, 3), (3, 8)] {
                let keep = noise(&[2, 1, tq, tk], 9.0)
                    .ge(-0.3)
                    .logical_or(&Tensor::ones([tq, tk], (Kind::Bool, Device::Cpu)).tril(0));
                let masks = [
                    Mask::Full,
                    Mask::Causal,
                    Mask::Keep(keep),
                    Mask::Bias(noise(&[2, 1, tq, tk], 5.0)),
                    Mask::Bias(noise(&[1, h, tq, tk], 6.0)),
                ];
                for (i, mask) in masks.into_iter().enumerate() {
                    let a = Attn {
                        q: noise(&[2, h, tq, 8], 1.0),
                        k: noise(&[2, hk, tk, 8], 2.0),
                        v: noise(&[2, hk, tk, 8], 3.0),
                        mask,
                        scale: (i == 0).then_some(0.7),
                    };
                    let expected = explicit(&a);
                    let diff = (a.sdpa().unwrap() - expected).abs().max().double_value(&[]);
                    assert!(diff < 1e-5, "heads {h}/{hk}, {tq}×{tk}, mask {i}: {diff}");
                }
            }
        }
    }

    #[test]
    fn narrow_heads_over_many_places_are_the_written_out_attention() {
        for (width, hk) in [(12, 4), (8, 4), (5, 2)] {
            for (i, mask) in
                [Mask::Full, Mask::Causal, Mask::Bias(noise(&[2, 1, 1, 300], 5.0))].into_iter().enumerate()
            {
                let a = Attn {
                    q: noise(&[2, 4, 260, width], 1.0),
                    k: noise(&[2, hk, 300, width], 2.0),
                    v: noise(&[2, hk, 300, width], 3.0),
                    mask,
                    scale: (i == 0).then_some(0.7),
                };
                let (expected, found) = (explicit(&a), a.sdpa().unwrap());
                assert_eq!(found.size(), expected.size());
                let diff = (found - expected).abs().max().double_value(&[]);
                assert!(diff < 1e-5, "heads of {width}, mask {i}: {diff}");
            }
        }
    }

    #[test]
    fn a_prefix_is_seen_by_all() {
        let a = Attn {
            q: noise(&[1, 2, 3, 4], 1.0),
            k: noise(&[1, 2, 5, 4], 2.0),
            v: noise(&[1, 2, 5, 4], 3.0),
            mask: Mask::Keep(Tensor::ones([3, 3], (Kind::Bool, Device::Cpu)).tril(0)).with_prefix(2).unwrap(),
            scale: None,
        };
        let causal = Attn { mask: Mask::Causal, ..a.handle() };
        let diff = (a.sdpa().unwrap() - causal.sdpa().unwrap()).abs().max().double_value(&[]);
        assert!(diff < 1e-6, "{diff}");
    }

    #[test]
    fn a_prefix_of_some_rows_is_seen_by_them_alone() {
        for tq in [1, 3] {
            let keep = noise(&[3, 1, 1, 5], 8.0)
                .ge(-0.5)
                .logical_or(&Tensor::from_slice(&[1u8, 0, 0, 0, 0]).to_kind(Kind::Bool));
            let masks = [
                Mask::Full,
                Mask::Causal,
                Mask::Keep(keep.shallow_clone()),
                Mask::Keep(keep.logical_and(&Tensor::ones([tq, 5], (Kind::Bool, Device::Cpu)).tril(5 - tq))),
                Mask::Bias(noise(&[3, 1, tq, 5], 5.0)),
                Mask::Bias(noise(&[1, 4, tq, 5], 6.0)),
                Mask::Bias(noise(&[tq, 5], 7.0)),
            ];
            for (i, mask) in masks.into_iter().enumerate() {
                let (k, v) = (noise(&[3, 2, 5, 8], 2.0), noise(&[3, 2, 5, 8], 3.0));
                let (pk, pv) = (noise(&[1, 2, 2, 8], 12.0), noise(&[1, 2, 2, 8], 13.0));
                let plain = Attn { q: noise(&[3, 4, tq, 8], 1.0), k, v, mask, scale: None };
                let front = |p: &Tensor, t: &Tensor| Tensor::cat(&[&p.expand([3, -1, -1, -1], false), t], 2);
                let rows = Tensor::from_slice(&[1u8, 0, 1]).to_kind(Kind::Bool);
                let some = Attn {
                    k: front(&pk, &plain.k),
                    v: front(&pv, &plain.v),
                    mask: plain.mask_with_prefix_of(2, &rows).unwrap(),
                    ..plain.handle()
                };
                let all = Attn { mask: plain.mask.with_prefix(2).unwrap(), ..some.handle() };
                let (some, all, none) = (some.sdpa().unwrap(), explicit(&all), explicit(&plain));
                for (row, expected) in [(0, &all), (1, &none), (2, &all)] {
                    let diff = (some.get(row) - expected.get(row)).abs().max().double_value(&[]);
                    assert!(diff < 1e-5, "{tq} queries, mask {i}, row {row}: {diff}");
                }
            }
        }
        let a = Attn {
            q: noise(&[2, 1, 1, 4], 1.0),
            k: noise(&[2, 1, 1, 4], 2.0),
            v: noise(&[2, 1, 1, 4], 3.0),
            mask: Mask::Full,
            scale: None,
        };
        let rows = Tensor::from_slice(&[true, false, true]);
        assert!(matches!(a.mask_with_prefix_of(1, &rows), Err(Error::Shape { .. })));
    }

    #[test]
    fn rows_take_their_masks_along() {
        let of = |mask| Attn {
            q: noise(&[3, 2, 3, 8], 1.0), // as many queries as rows
            k: noise(&[3, 2, 5, 8], 2.0),
            v: noise(&[3, 2, 5, 8], 3.0),
            mask,
            scale: Some(0.5),
        };
        let keep = || noise(&[3, 1, 1, 5], 9.0).ge(-0.3);
        let masks = [
            Mask::Full,
            Mask::Causal,
            Mask::Keep(keep()),
            Mask::Bias(noise(&[3, 1, 3, 5], 5.0)),
            Mask::Bias(noise(&[3, 5], 6.0)),
            Mask::Keep(keep().narrow(0, 0, 1)),
        ];
        for (i, mask) in masks.into_iter().enumerate() {
            let a = of(mask);
            let found = a.select(&[2, 0, 2, 1]).unwrap().sdpa().unwrap();
            let all = a.sdpa().unwrap();
            let expected = all.index_select(0, &Tensor::from_slice(&[2i64, 0, 2, 1]));
            let diff = (found - expected).abs().max().double_value(&[]);
            assert!(diff < 1e-6, "mask {i}: {diff}");
        }
        for bad in [3, -1] {
            assert!(matches!(of(Mask::Full).select(&[bad]), Err(Error::Value { .. })));
        }
    }

    #[test]
    fn heads_that_do_not_divide_are_refused() {
        let t = |h| noise(&[1, h, 2, 4], 0.0);
        let a = Attn { q: t(4), k: t(3), v: t(3), mask: Mask::Full, scale: None };
        assert!(matches!(a.sdpa(), Err(Error::Shape { .. })));
    }
}
