//! Matrix products: whose kernel multiplies.

use tch::{Device, Kind, Tensor};

pub use crate::sys::LowRank;
use crate::{Result, is_recording, sys};

/// Up to so many rows a product on the CPU is ours: until what LibTorch does to the matrix first pays. Its bf16
/// instructions multiply more at once, so they pay earlier.
fn few_rows(kind: Kind) -> i64 {
    match kind {
        Kind::Float => 16,
        Kind::BFloat16 => 8,
        _ => 0,
    }
}

/// x Wᵀ + b: x `[.., inputs]`, W `[outputs, inputs]`.
pub(super) fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let inputs = weight.size().last().copied().unwrap_or(0);
    let most = few_rows(x.f_kind()?).saturating_mul(inputs);
    let few = x.device() == Device::Cpu
        && i64::try_from(x.numel()).is_ok_and(|n| n <= most)
        && !(is_recording()
            && [Some(x), Some(weight), bias].into_iter().flatten().any(Tensor::requires_grad));
    match if few { sys::few_rows(x, weight, bias)? } else { None } {
        Some(y) => Ok(y),
        None => Ok(x.f_linear(weight, bias)?),
    }
}

/// y + s B A x, the outputs of several parts side by side: x `[.., inputs]`, y `[.., Σ outputs]`, of one element type.
/// Sums are in f32 and rounded once. `None` where there is no kernel for it and LibTorch is to be called: for more than
/// a few rows, on a device, where gradients are recorded.
///
/// # Errors
/// Those of LibTorch.
pub fn add_low_rank(x: &Tensor, y: &Tensor, parts: &[LowRank<'_>]) -> Result<Option<Tensor>> {
    let inputs = x.size().last().copied().unwrap_or(0);
    let few = i64::try_from(x.numel()).is_ok_and(|n| n <= few_rows(Kind::Float).saturating_mul(inputs));
    if !few || is_recording() {
        return Ok(None);
    }
    sys::low_rank(x, y, parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    fn matrix(rows: i64, columns: i64) -> Tensor {
        Tensor::arange(rows * columns, FLOAT_CPU).view([rows, columns]).sin()
    }

    #[test]
    fn few_rows_are_multiplied_as_many_are() {
        let (w, b) = (matrix(70, 43), Tensor::arange(70, FLOAT_CPU).cos());
        for kind in [Kind::Float, Kind::BFloat16] {
            let (w, b) = (w.to_kind(kind), b.to_kind(kind));
            for bias in [None, Some(&b)] {
                for shape in [&[43][..], &[1, 43], &[1, 1, 43], &[3, 5, 43], &[7, 43], &[2, 70, 43]] {
                    let x = matrix(1, shape.iter().product()).view(shape).to_kind(kind);
                    let y = product(&x, &w, bias).unwrap();
                    let double = |t: &Tensor| t.to_kind(Kind::Double);
                    let expected = double(&x).matmul(&double(&w).transpose(0, 1))
                        + bias.map_or(0.0 * double(&b), double);
                    assert_eq!((y.size(), y.kind()), (expected.size(), kind));
                    // A bf16 is rounded once, from a sum in f32.
                    let tolerance = if kind == Kind::Float { 1e-5 } else { 4e-3 };
                    assert!(double(&y).allclose(&expected, tolerance, 1e-5, false), "{kind:?} {shape:?}");
                }
            }
        }
    }

    #[test]
    fn gradients_are_recorded() {
        let x = matrix(2, 24).set_requires_grad(true);
        product(&x, &matrix(40, 24), None).unwrap().sum(Kind::Float).backward();
        assert!(x.grad().defined());
        let w = matrix(40, 24).set_requires_grad(true);
        product(&matrix(2, 24), &w, None).unwrap().sum(Kind::Float).backward();
        assert!(w.grad().defined());
    }

    #[test]
    fn low_rank_changes_are_those_of_two_products() {
        let _no_gradients = tch::no_grad_guard();
        for kind in [Kind::Float, Kind::BFloat16] {
            for rows in [1, 3] {
                let (x, y) = (matrix(rows, 43).to_kind(kind), matrix(rows, 30).cos().to_kind(kind));
                let transposed = |outputs, r| matrix(r, outputs).transpose(0, 1);
                let (a, b) = ([matrix(5, 43), matrix(1, 43)], [transposed(13, 5), transposed(17, 1)]);
                let parts: Vec<_> =
                    (0..2).map(|i| LowRank { a: &a[i], b: &b[i], scale: 0.5 + i as f64 }).collect();
                let Some(found) = add_low_rank(&x, &y, &parts).unwrap() else {
                    #[cfg(all(target_arch = "x86_64", unix, optimised, not(debug_assertions)))]
                    assert!(
                        !std::arch::is_x86_feature_detected!("avx2")
                            || !std::arch::is_x86_feature_detected!("fma"),
                        "no kernel"
                    );
                    return;
                };
                let double = |t: &Tensor| t.to_kind(Kind::Double);
                let change = |p: &LowRank<'_>| {
                    double(&x).matmul(&double(p.a).tr()).matmul(&double(p.b).tr()) * p.scale
                };
                let expected = double(&y) + Tensor::cat(&parts.iter().map(change).collect::<Vec<_>>(), -1);
                assert_eq!((found.size(), found.kind()), (y.size(), kind));
                let tolerance = if kind == Kind::Float { 1e-5 } else { 4e-3 };
                assert!(double(&found).allclose(&expected, tolerance, 1e-5, false), "{kind:?}, {rows} rows");
                // What does not fit is left to LibTorch, which says why.
                assert!(add_low_rank(&x, &y, &parts[..1]).unwrap().is_none());
                assert!(add_low_rank(&x.narrow(1, 0, 42), &y, &parts).unwrap().is_none());
            }
        }
    }
}
