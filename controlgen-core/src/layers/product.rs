//! Matrix products: whose kernel multiplies.

use tch::{Device, Kind, Tensor};

use crate::{Result, sys};

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
        && !x.requires_grad()
        && !weight.requires_grad()
        && !bias.is_some_and(Tensor::requires_grad);
    match if few { sys::few_rows(x, weight, bias)? } else { None } {
        Some(y) => Ok(y),
        None => Ok(x.f_linear(weight, bias)?),
    }
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
}
