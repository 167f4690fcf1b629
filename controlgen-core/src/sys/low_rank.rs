//! Changes of low rank to a product of few rows, in one pass.
//!
//! Two products with a rank of eight are a few thousand multiplications: less than LibTorch takes to find out which
//! function to call, twice, and to convert types in between. Here a row of x goes through A and B on one thread. More
//! work than that is LibTorch's.

use tch::Tensor;

/// s B A: A `[r, inputs]`, contiguous; B `[outputs, r]`, lying in memory as its transpose; both f32.
pub struct LowRank<'a> {
    /// A
    pub a: &'a Tensor,
    /// B
    pub b: &'a Tensor,
    /// s
    pub scale: f64,
}

/// y + s B A x, the outputs of several parts side by side: x `[.., inputs]` and y `[.., Σ outputs]`, both f32 or both
/// bf16, on the CPU, without gradients. Sums are in f32 and rounded once. `None` where this machine has no kernel.
#[cfg(not(all(target_arch = "x86_64", unix, optimised, not(debug_assertions))))]
pub(crate) fn low_rank(_x: &Tensor, _y: &Tensor, _parts: &[LowRank<'_>]) -> crate::Result<Option<Tensor>> {
    Ok(None)
}

#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
pub(crate) use x86::low_rank;

#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
mod x86 {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use tch::{Kind, Tensor};

    use super::LowRank;
    use crate::Result;
    use crate::sys::few_rows::x86::{Element, LANES, dots, plain, supported};

    /// Up to so many multiplications one thread is faster than two calls of LibTorch.
    const MOST: usize = 1 << 21;
    /// How many vectors of outputs are summed at once: B is read along its rows.
    const BLOCK: usize = 8;

    /// A part, as the kernel sees it.
    struct Part {
        /// `[rank, inputs]`
        a: *const f32,
        /// `[rank, outputs]`
        b: *const f32,
        scale: f32,
        rank: usize,
        outputs: usize,
    }

    /// y + s B A x; see the parent module.
    pub(crate) fn low_rank(x: &Tensor, y: &Tensor, parts: &[LowRank<'_>]) -> Result<Option<Tensor>> {
        if !supported() {
            return Ok(None);
        }
        let tensors = parts.iter().flat_map(|part| [part.a, part.b]).chain([x, y]);
        if tensors.into_iter().any(|t| !plain(t)) {
            return Ok(None);
        }
        let kind = y.f_kind()?;
        let (Some(&inputs), Some(&width)) = (x.size().last(), y.size().last()) else { return Ok(None) };
        if x.f_kind()? != kind || !matches!(kind, Kind::Float | Kind::BFloat16) {
            return Ok(None);
        }
        let mut total = 0;
        let mut seen = Vec::with_capacity(parts.len());
        for LowRank { a, b, scale } in parts {
            let ((rank, from), (outputs, other)) = (a.size2()?, b.size2()?);
            let plain = a.f_kind()? == Kind::Float && b.f_kind()? == Kind::Float && a.is_contiguous();
            if !plain || b.stride() != [1, outputs] || from != inputs || other != rank {
                return Ok(None);
            }
            total += outputs;
            let (Ok(rank), Ok(outputs)) = (usize::try_from(rank), usize::try_from(outputs)) else {
                return Ok(None);
            };
            let (a, b) = (a.data_ptr().cast_const().cast(), b.data_ptr().cast_const().cast());
            seen.push(Part { a, b, scale: *scale as f32, rank, outputs });
        }
        let (Ok(inputs), Ok(outputs)) = (usize::try_from(inputs), usize::try_from(width)) else {
            return Ok(None);
        };
        if total != width || inputs == 0 || outputs == 0 {
            return Ok(None);
        }
        let rows = y.numel().div_euclid(outputs);
        let work: usize = seen.iter().map(|part| rows * part.rank * (inputs + part.outputs)).sum();
        if x.numel() != rows * inputs || work > MOST {
            return Ok(None);
        }
        let (x, y) = (x.f_contiguous()?, y.f_contiguous()?);
        let new = y.f_empty_like()?;
        for row in 0..rows {
            // SAFETY: the tensors live until the end, are contiguous and of the sizes checked above; the
            // processor has the instructions.
            unsafe {
                if kind == Kind::Float {
                    let (from, to) = (y.data_ptr().cast::<f32>(), new.data_ptr().cast::<f32>());
                    let x = x.data_ptr().cast::<f32>().add(row * inputs);
                    row_of(x, inputs, from.add(row * outputs), to.add(row * outputs), &seen);
                } else {
                    let (from, to) = (y.data_ptr().cast::<u16>(), new.data_ptr().cast::<u16>());
                    let x = x.data_ptr().cast::<u16>().add(row * inputs);
                    row_of(x, inputs, from.add(row * outputs), to.add(row * outputs), &seen);
                }
            }
        }
        Ok(Some(new))
    }

    /// One row.
    ///
    /// # Safety
    /// x has `inputs` numbers, `y` and `new` those of all parts' outputs, and the processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn row_of<E: Element>(x: *const E, inputs: usize, y: *const E, new: *mut E, parts: &[Part]) {
        let mut low = Vec::new();
        // As f32, once for all rows of all A.
        let mut floats = vec![0f32; inputs];
        let whole = inputs - inputs % LANES;
        // SAFETY: every index is below `inputs`.
        unsafe {
            for i in (0..whole).step_by(LANES) {
                _mm256_storeu_ps(floats.as_mut_ptr().add(i), E::load(x.add(i)));
            }
            for (i, float) in floats.iter_mut().enumerate().skip(whole) {
                *float = (*x.add(i)).to_f32();
            }
        }
        let x = floats.as_ptr();
        let mut start = 0;
        for part in parts {
            low.clear();
            // SAFETY: A has `rank` rows of `inputs` numbers.
            low.extend(
                (0..part.rank)
                    .map(|j| unsafe { part.scale * dots::<f32, 1>(part.a.add(j * inputs), x, inputs)[0] }),
            );
            let whole = part.outputs - part.outputs % LANES;
            let blocks = part.outputs - part.outputs % (BLOCK * LANES);
            // SAFETY: every index is below the part's outputs, and below its rank.
            unsafe {
                for o in (0..blocks).step_by(BLOCK * LANES) {
                    part.add::<E, BLOCK>(&low, y.add(start + o), new.add(start + o), o);
                }
                for o in (blocks..whole).step_by(LANES) {
                    part.add::<E, 1>(&low, y.add(start + o), new.add(start + o), o);
                }
                for o in whole..part.outputs {
                    let mut sum = (*y.add(start + o)).to_f32();
                    for (j, &low) in low.iter().enumerate() {
                        sum = low.mul_add(*part.b.add(j * part.outputs + o), sum);
                    }
                    *new.add(start + o) = E::from_f32(sum);
                }
            }
            start += part.outputs;
        }
    }

    impl Part {
        /// y + B l for `N` vectors of outputs, from output `o` on.
        ///
        /// # Safety
        /// So many outputs are left, of this part and at `y` and `new`; the processor has AVX2 and FMA.
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn add<E: Element, const N: usize>(&self, low: &[f32], y: *const E, new: *mut E, o: usize) {
            let mut sums = [_mm256_setzero_ps(); N];
            // SAFETY: as above.
            unsafe {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = E::load(y.add(i * LANES));
                }
                for (j, &low) in low.iter().enumerate() {
                    let (b, low) = (self.b.add(j * self.outputs + o), _mm256_set1_ps(low));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_fmadd_ps(_mm256_loadu_ps(b.add(i * LANES)), low, *sum);
                    }
                }
                for (i, &sum) in sums.iter().enumerate() {
                    E::store(new.add(i * LANES), sum);
                }
            }
        }
    }
}
