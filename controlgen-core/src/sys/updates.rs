//! Updates of optimizers in one pass over memory.
//!
//! An update reads and writes three or four tensors once. LibTorch has it in one call, `_fused_adamw_`, that tch does not
//! bind; put together of calls that it binds, it goes over memory ten times. Where the processor or the layout is another,
//! nothing is done, and the caller puts it together.

use tch::Tensor;

// Where `kernels` below does nothing, its fields are read by nobody.
#[cfg_attr(not(all(target_arch = "x86_64", unix, optimised, not(debug_assertions))), allow(dead_code))]
/// p ← d p; m ← m + n₁ (s g − m); v ← k₂ v + n₂ (s g)²; p ← p − r m / (√v q + ε).
pub(crate) struct AdamWUpdate {
    /// s
    pub(crate) scale: f32,
    /// d
    pub(crate) decay: f32,
    /// n₁
    pub(crate) new1: f32,
    /// k₂
    pub(crate) kept2: f32,
    /// n₂
    pub(crate) new2: f32,
    /// r
    pub(crate) rate: f32,
    /// q
    pub(crate) correction: f32,
    /// ε
    pub(crate) epsilon: f32,
}

#[cfg_attr(not(all(target_arch = "x86_64", unix, optimised, not(debug_assertions))), allow(dead_code))]
/// g' = s g + λ p; b ← μ b + n g'; p ← p − r b, or p − r (g' + μ b).
pub(crate) struct SgdUpdate {
    /// s
    pub(crate) scale: f32,
    /// λ
    pub(crate) decay: f32,
    /// μ; 0 at the first step
    pub(crate) kept: f32,
    /// n; 1 at the first step
    pub(crate) new: f32,
    /// Nesterov's μ; `None` for p − r b.
    pub(crate) nesterov: Option<f32>,
    /// r
    pub(crate) rate: f32,
}

#[cfg(not(all(target_arch = "x86_64", unix, optimised, not(debug_assertions))))]
mod kernels {
    use super::{AdamWUpdate, SgdUpdate, Tensor};

    pub(crate) fn adamw(_: [&Tensor; 3], _: &Tensor, _: &AdamWUpdate) -> crate::Result<bool> {
        Ok(false)
    }

    pub(crate) fn sgd(_: [&Tensor; 2], _: &Tensor, _: &SgdUpdate) -> crate::Result<bool> {
        Ok(false)
    }
}

pub(crate) use kernels::{adamw, sgd};

#[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
mod kernels {
    use tch::Kind;

    use super::{AdamWUpdate, SgdUpdate, Tensor};
    use crate::Result;
    use crate::sys::few_rows::x86::plain;
    use crate::sys::team::{Team, team};

    /// A thread has at least so many numbers: less is not worth waking it.
    const GRAIN: usize = 1 << 15;

    /// Updates p, m, v, of the same layout, by the gradient. Whether it was done.
    pub(crate) fn adamw(state: [&Tensor; 3], gradient: &Tensor, update: &AdamWUpdate) -> Result<bool> {
        let Some((team, gradient)) = prepare(&state, gradient)? else { return Ok(false) };
        let [p, m, v] = state.map(|t| t.data_ptr().cast::<f32>() as usize);
        let g = gradient.data_ptr() as usize;
        // SAFETY: `prepare` has seen that all lie apart, and are so many numbers in memory; the parts do not overlap.
        parts(team, gradient.numel(), |from, n| unsafe {
            adamw_part(of(p, from, n), of(g, from, n), of(m, from, n), of(v, from, n), update);
        });
        Ok(true)
    }

    /// Updates p and b, of the same layout, by the gradient. Whether it was done.
    pub(crate) fn sgd(state: [&Tensor; 2], gradient: &Tensor, update: &SgdUpdate) -> Result<bool> {
        let Some((team, gradient)) = prepare(&state, gradient)? else { return Ok(false) };
        let [p, b] = state.map(|t| t.data_ptr() as usize);
        let g = gradient.data_ptr() as usize;
        // SAFETY: as above.
        parts(team, gradient.numel(), |from, n| unsafe {
            sgd_part(of(p, from, n), of(g, from, n), of(b, from, n), update);
        });
        Ok(true)
    }

    /// The team, and the gradient in the layout of the rest, where a kernel can run: f32 numbers on the CPU that fill
    /// their memory, apart from each other.
    fn prepare(state: &[&Tensor], gradient: &Tensor) -> Result<Option<(&'static Team, Tensor)>> {
        let Some(team) = team() else { return Ok(None) };
        let first = state[0];
        let (shape, strides) = (first.size(), first.stride());
        if !dense(&shape, &strides) || gradient.size() != shape {
            return Ok(None);
        }
        for t in state.iter().copied().chain([gradient]) {
            if !plain(t) || t.f_kind()? != Kind::Float {
                return Ok(None);
            }
        }
        if state.iter().any(|t| t.size() != shape || t.stride() != strides) {
            return Ok(None);
        }
        let gradient = if gradient.stride() == strides {
            gradient.shallow_clone()
        } else {
            let mut copy = first.f_empty_like()?;
            copy.f_copy_(gradient)?;
            copy
        };
        let bytes = gradient.numel() * size_of::<f32>();
        let mut places: Vec<usize> =
            state.iter().chain([&&gradient]).map(|t| t.data_ptr() as usize).collect();
        places.sort_unstable();
        let apart = places.windows(2).all(|pair| pair[1] - pair[0] >= bytes);
        Ok(apart.then_some((team, gradient)))
    }

    /// Whether the numbers of these strides fill their memory without holes or overlaps, in whatever order.
    fn dense(shape: &[i64], strides: &[i64]) -> bool {
        let mut axes: Vec<(i64, i64)> =
            strides.iter().copied().zip(shape.iter().copied()).filter(|&(_, size)| size != 1).collect();
        axes.sort_unstable();
        let mut next = 1;
        axes.into_iter().all(|(stride, size)| {
            let fits = stride == next;
            next = stride * size;
            fits
        })
    }

    /// Runs `part` over `count` numbers: from where, and how many.
    fn parts(team: &Team, count: usize, part: impl Fn(usize, usize)) {
        team.run(count.div_ceil(GRAIN), |this, of| {
            // Whole cache lines, of 16 numbers.
            let share = count.div_ceil(of).next_multiple_of(16);
            let from = (this * share).min(count);
            part(from, share.min(count - from));
        });
    }

    /// Numbers of a tensor.
    ///
    /// # Safety
    /// There are so many, nobody else reads or writes them while they are borrowed.
    unsafe fn of<'a>(place: usize, from: usize, count: usize) -> &'a mut [f32] {
        if count == 0 {
            return &mut [];
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut((place as *mut f32).add(from), count) }
    }

    #[target_feature(enable = "avx2,fma")]
    fn adamw_part(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], with: &AdamWUpdate) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * with.scale;
            *m = (g - *m).mul_add(with.new1, *m);
            *v = (g * g).mul_add(with.new2, *v * with.kept2);
            let deviation = v.sqrt().mul_add(with.correction, with.epsilon);
            *p = *p * with.decay - with.rate * *m / deviation;
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn sgd_part(p: &mut [f32], g: &[f32], b: &mut [f32], with: &SgdUpdate) {
        let (kept, nesterov) = (with.kept, with.nesterov);
        for ((p, g), b) in p.iter_mut().zip(g).zip(b) {
            let g = p.mul_add(with.decay, g * with.scale);
            *b = g.mul_add(with.new, *b * kept);
            let step = nesterov.map_or(*b, |mu| b.mul_add(mu, g));
            *p = step.mul_add(-with.rate, *p);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn layouts_that_fill_their_memory_are_known() {
            assert!(
                dense(&[2, 3], &[3, 1])
                    && dense(&[2, 3], &[1, 2])
                    && dense(&[], &[])
                    && dense(&[1, 4], &[9, 1])
            );
            assert!(!dense(&[2, 3], &[4, 1]) && !dense(&[2, 3], &[0, 1]) && !dense(&[4], &[2]));
        }

        #[test]
        fn plain_tensors_are_updated_whatever_their_length() {
            if !crate::sys::team::supported() {
                return;
            }
            let kinds = tch::kind::FLOAT_CPU;
            for n in [0, 1, 7, 16, 1003, 3 * GRAIN as i64 + 5] {
                let (p, b) = (Tensor::arange(n, kinds).cos(), Tensor::zeros([n], kinds));
                let (g, before) = (Tensor::arange(n, kinds).sin(), p.copy());
                let update =
                    SgdUpdate { scale: 2.0, decay: 0.5, kept: 0.9, new: 1.0, nesterov: None, rate: 0.1 };
                assert!(sgd([&p, &b], &g, &update).unwrap(), "the kernel was not used");
                let expected = &before - (&g * 2.0 + &before * 0.5) * 0.1;
                assert!(p.allclose(&expected, 1e-6, 1e-6, false), "{n} numbers");
            }
        }

        #[test]
        fn what_lies_in_one_place_is_left_alone() {
            let (p, m) = (Tensor::ones([8], tch::kind::FLOAT_CPU), Tensor::zeros([8], tch::kind::FLOAT_CPU));
            let update = SgdUpdate { scale: 1.0, decay: 0.0, kept: 0.0, new: 1.0, nesterov: None, rate: 1.0 };
            assert!(!sgd([&p, &p], &m, &update).unwrap());
            assert!(!sgd([&p, &m], &p, &update).unwrap());
            assert!(
                !sgd([&p.slice(0, 0, 8, 2), &m.slice(0, 0, 8, 2)], &p.slice(0, 1, 8, 2), &update).unwrap()
            );
            assert!(!sgd([&p, &m], &Tensor::ones([8], tch::kind::DOUBLE_CPU), &update).unwrap());
        }
    }
}
