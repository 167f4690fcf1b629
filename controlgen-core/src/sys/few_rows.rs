//! Products of a few rows with a large matrix, at the speed of memory.
//!
//! A decoder's step multiplies one row, or a few, with every weight, so that it lasts as long as reading them. The
//! libraries that LibTorch brings read at a fraction of memory's speed there: MKL takes a kernel without AVX on
//! processors that are not Intel's and leaves a single row to one thread; oneDNN wants bf16 in a layout of its own.
//! These kernels read the plain matrix once, on the threads of LibTorch's own OpenMP team, so that no second pool of
//! threads competes with it. Where the processor or the team is missing, nothing is done and LibTorch multiplies; so too
//! in builds that are not optimised or have debug assertions, in which these kernels would be the slower ones.

/// x Wᵀ + b: x `[.., inputs]` and W `[outputs, inputs]`, both f32 or both bf16, on the CPU, contiguous, without
/// gradients. Sums are in f32, in the same order for a row whatever other rows there are. `None` where this machine has
/// no kernel.
#[cfg(not(all(target_arch = "x86_64", unix, optimised, not(debug_assertions))))]
pub(crate) fn few_rows(
    _x: &tch::Tensor,
    _weight: &tch::Tensor,
    _bias: Option<&tch::Tensor>,
) -> crate::Result<Option<tch::Tensor>> {
    Ok(None)
}

#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
pub(crate) use x86::few_rows;

#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
pub(super) mod x86 {
    use std::arch::x86_64::{
        __m256, _CMP_UNORD_Q, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps,
        _mm_movehl_ps, _mm_packus_epi32, _mm_storeu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
        _mm256_blendv_epi8, _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps,
        _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_extractf128_ps,
        _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_or_si256, _mm256_set1_epi32,
        _mm256_setzero_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps,
    };
    use std::ffi::c_void;

    use tch::{Device, Kind, Tensor};

    use crate::Result;
    pub(in crate::sys) use crate::sys::team::supported;
    use crate::sys::team::team;

    /// How many numbers a vector holds.
    pub(in crate::sys) const LANES: usize = 8;
    /// A thread has at least so many weights to read: less is not worth waking it.
    const GRAIN: usize = 1 << 15;

    /// x Wᵀ + b; see the parent module.
    pub(crate) fn few_rows(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(team) = team() else { return Ok(None) };
        if [Some(x), Some(weight), bias].into_iter().flatten().any(|t| !plain(t)) {
            return Ok(None);
        }
        let (outputs, inputs) = weight.size2()?;
        let kind = weight.f_kind()?;
        let mut shape = x.size();
        let (Some(last), true) = (shape.last_mut(), x.f_kind()? == kind) else { return Ok(None) };
        if *last != inputs || !weight.is_contiguous() || !matches!(kind, Kind::Float | Kind::BFloat16) {
            return Ok(None);
        }
        *last = outputs;
        let y = Tensor::f_empty(&shape, (kind, x.device()))?;
        let (Ok(outputs), Ok(inputs)) = (usize::try_from(outputs), usize::try_from(inputs)) else {
            return Ok(None);
        };
        let Some(rows) = y.numel().checked_div(outputs).filter(|_| y.numel() > 0) else { return Ok(None) };
        let x = x.f_to_kind(Kind::Float)?.f_contiguous()?;
        let bias = bias.map(|bias| bias.f_to_kind(Kind::Float)?.f_contiguous()).transpose()?;
        if x.numel() != rows * inputs || bias.as_ref().is_some_and(|bias| bias.numel() != outputs) {
            return Ok(None);
        }
        let task = Task {
            x: x.data_ptr().cast(),
            weight: weight.data_ptr(),
            bias: bias.as_ref().map_or(std::ptr::null(), |bias| bias.data_ptr().cast_const().cast()),
            y: y.data_ptr(),
            rows,
            inputs,
            outputs,
            bf16: kind == Kind::BFloat16,
            threads: (inputs * outputs).div_euclid(GRAIN).max(1),
        };
        // SAFETY: all sizes were checked, the processor has the instructions, and each part has outputs of its own.
        team.run(task.threads, |this, count| unsafe {
            let share = task.outputs.div_ceil(count);
            let from = (this * share).min(task.outputs);
            task.outputs(from, (from + share).min(task.outputs));
        });
        Ok(Some(y))
    }

    /// Whether a tensor is numbers in memory: on the CPU, and not a view that stands for their negatives.
    pub(in crate::sys) fn plain(t: &Tensor) -> bool {
        t.device() == Device::Cpu && !t.is_neg() && !t.is_sparse() && !t.is_mkldnn()
    }

    /// A product, as its threads see it. The tensors outlive it: `few_rows` holds them until every thread is done.
    struct Task {
        /// `[rows, inputs]`
        x: *const f32,
        /// `[outputs, inputs]`
        weight: *const c_void,
        /// `[outputs]`, or null
        bias: *const f32,
        /// `[rows, outputs]`
        y: *mut c_void,
        rows: usize,
        inputs: usize,
        outputs: usize,
        bf16: bool,
        /// The most threads that are worth waking.
        threads: usize,
    }

    /// What a weight is made of.
    pub(in crate::sys) trait Element: Copy {
        /// Eight of them as f32.
        unsafe fn load(from: *const Self) -> __m256;
        /// Eight of them, as [`Self::from_f32`] makes them.
        unsafe fn store(to: *mut Self, values: __m256);
        fn to_f32(self) -> f32;
        /// Rounds to the nearest, ties to even.
        fn from_f32(value: f32) -> Self;
    }

    impl Element for f32 {
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn load(from: *const Self) -> __m256 {
            // SAFETY: the caller has eight numbers there.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn store(to: *mut Self, values: __m256) {
            // SAFETY: the caller has room for eight numbers there.
            unsafe { _mm256_storeu_ps(to, values) }
        }
        fn to_f32(self) -> f32 {
            self
        }
        fn from_f32(value: f32) -> Self {
            value
        }
    }

    /// The bits of a bf16: the upper half of an f32's.
    impl Element for u16 {
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn load(from: *const Self) -> __m256 {
            // SAFETY: the caller has eight numbers there.
            let bits = unsafe { _mm_loadu_si128(from.cast()) };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        }
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn store(to: *mut Self, values: __m256) {
            let bits = _mm256_castps_si256(values);
            // Half of the last bit that stays, and that bit itself where only half is left: ties to even.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed =
                _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            // SAFETY: the caller has room for eight numbers there.
            unsafe { _mm_storeu_si128(to.cast(), packed) }
        }
        fn to_f32(self) -> f32 {
            half::bf16::from_bits(self).to_f32()
        }
        fn from_f32(value: f32) -> Self {
            half::bf16::from_f32(value).to_bits()
        }
    }

    impl Task {
        /// Computes outputs `from .. to` of every row.
        ///
        /// # Safety
        /// The sizes are those of the tensors, and the processor has AVX2 and FMA.
        unsafe fn outputs(&self, from: usize, to: usize) {
            // SAFETY: as above; the element type is that of the tensors.
            unsafe {
                if self.bf16 {
                    self.outputs_of::<u16>(from, to);
                } else {
                    self.outputs_of::<f32>(from, to);
                }
            }
        }

        /// Output by output, so that the matrix is read from its first number to its last.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn outputs_of<E: Element>(&self, from: usize, to: usize) {
            for output in from..to {
                let mut row = 0;
                while row < self.rows {
                    // SAFETY: as many rows are left as are taken.
                    unsafe {
                        row += match self.rows - row {
                            1 => self.dot::<E, 1>(output, row),
                            2 | 3 => self.dot::<E, 2>(output, row),
                            _ => self.dot::<E, 4>(output, row),
                        }
                    }
                }
            }
        }

        /// One output of `ROWS` rows, which is how many are done.
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn dot<E: Element, const ROWS: usize>(&self, output: usize, row: usize) -> usize {
            // SAFETY: the output and the rows exist, and all have `inputs` numbers.
            unsafe {
                let weight = self.weight.cast::<E>().add(output * self.inputs);
                let sums = dots::<E, ROWS>(weight, self.x.add(row * self.inputs), self.inputs);
                for (r, mut sum) in sums.into_iter().enumerate() {
                    if !self.bias.is_null() {
                        sum += *self.bias.add(output);
                    }
                    *self.y.cast::<E>().add((row + r) * self.outputs + output) = E::from_f32(sum);
                }
            }
            ROWS
        }
    }

    /// The sums of the products of `n` weights with each of `ROWS` rows of x, in the same order for each.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(in crate::sys) unsafe fn dots<E: Element, const ROWS: usize>(
        weight: *const E,
        x: *const f32,
        n: usize,
    ) -> [f32; ROWS] {
        let whole = n - n % (2 * LANES);
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        let mut found = [0f32; ROWS];
        // SAFETY: the caller has n weights and ROWS rows of n numbers.
        unsafe {
            for i in (0..whole).step_by(2 * LANES) {
                let w = [E::load(weight.add(i)), E::load(weight.add(i + LANES))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(r * n + i);
                    sums[0] = _mm256_fmadd_ps(w[0], _mm256_loadu_ps(x), sums[0]);
                    sums[1] = _mm256_fmadd_ps(w[1], _mm256_loadu_ps(x.add(LANES)), sums[1]);
                }
            }
            for (r, (found, sums)) in found.iter_mut().zip(&sums).enumerate() {
                *found = add_up(_mm256_add_ps(sums[0], sums[1]));
                for i in whole..n {
                    *found = (*weight.add(i)).to_f32().mul_add(*x.add(r * n + i), *found);
                }
            }
        }
        found
    }

    /// The sum of a vector's numbers.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(in crate::sys) fn add_up(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[cfg(test)]
    mod tests {
        use std::arch::is_x86_feature_detected;

        use super::*;

        fn matrix(rows: i64, columns: i64) -> Tensor {
            Tensor::arange(rows * columns, tch::kind::FLOAT_CPU).view([rows, columns]).sin()
        }

        #[test]
        fn a_row_is_the_same_whatever_other_rows_there_are() {
            assert!(team().is_some() || !is_x86_feature_detected!("avx2"), "no OpenMP runtime was found");
            for kind in [Kind::Float, Kind::BFloat16] {
                let (x, w) = (matrix(9, 1003).to_kind(kind), matrix(211, 1003).to_kind(kind));
                let Some(all) = few_rows(&x, &w, None).unwrap() else { return };
                for n in [1, 2, 3, 4, 7] {
                    let some = few_rows(&x.narrow(0, 9 - n, n), &w, None).unwrap().unwrap();
                    assert!(some.equal(&all.narrow(0, 9 - n, n)), "{kind:?}, {n} rows");
                }
            }
        }

        #[test]
        fn eight_are_rounded_as_one_is() {
            if !is_x86_feature_detected!("avx2") {
                return;
            }
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::MIN_POSITIVE, 1e-40];
            let bits = (0..80_000u32).map(|i| f32::from_bits(i.wrapping_mul(53_687)));
            let ties = (0..512u32).map(|i| f32::from_bits(0x3f80_8000 + (i << 15)));
            let values: Vec<f32> = odd.into_iter().chain(bits).chain(ties).collect();
            for eight in values.chunks_exact(8) {
                let mut found = [0u16; 8];
                // SAFETY: there are eight, and the processor has AVX2.
                unsafe { u16::store(found.as_mut_ptr(), _mm256_loadu_ps(eight.as_ptr())) };
                assert_eq!(found.as_slice(), eight.iter().map(|&v| u16::from_f32(v)).collect::<Vec<_>>());
            }
        }

        #[test]
        fn what_it_does_not_know_is_left_to_libtorch() {
            let (x, w) = (matrix(2, 8), matrix(4, 8));
            let left = |x: &Tensor, w: &Tensor| few_rows(x, w, None).unwrap().is_none();
            assert!(left(&x.to_kind(Kind::Double), &w.to_kind(Kind::Double)));
            assert!(left(&x.to_kind(Kind::BFloat16), &w));
            assert!(left(&x, &w.to_kind(Kind::Half)));
            assert!(left(&x.narrow(1, 0, 7), &w));
            assert!(left(&x, &matrix(8, 4).transpose(0, 1)));
            assert!(left(&x.narrow(0, 0, 0), &w) && left(&x, &w.narrow(0, 0, 0)));
        }
    }
}
