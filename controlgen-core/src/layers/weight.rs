//! The weight of a matrix product, in the layout that multiplies fastest.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::{Error, Result, sys};

/// A matrix `[outputs, inputs]`, and how to multiply with it.
///
/// On the CPU a bf16 weight is kept in oneDNN's own layout where the machine can: LibTorch would otherwise bring it
/// into that layout before every product. The plain matrix is then made on demand: for gradients, for a product
/// with a part of it, for merging. Once made it is kept.
pub struct Weight {
    shape: [i64; 2],
    plain: OnceCell<Tensor>,
    packed: Option<Tensor>,
}

impl Weight {
    /// A matrix, as it is.
    ///
    /// # Errors
    /// [`Error::Shape`] for anything but two dimensions.
    pub fn new(plain: Tensor) -> Result<Self> {
        let &[outputs, inputs] = plain.size().as_slice() else {
            return Err(Error::shape("linear weight", "[outputs, inputs]", &plain.size()));
        };
        Ok(Self { shape: [outputs, inputs], plain: OnceCell::from(plain), packed: None })
    }

    /// A matrix, in oneDNN's layout if that is faster here. If `keep`, the plain one is kept beside it.
    ///
    /// # Errors
    /// As [`Weight::new`]; those of LibTorch.
    pub fn pack(plain: Tensor, keep: bool) -> Result<Self> {
        let mut weight = Self::new(plain)?;
        let Some(plain) = weight.plain.get() else { return Ok(weight) };
        let suited = plain.device() == Device::Cpu && plain.f_kind()? == Kind::BFloat16 && plain.numel() > 0;
        if !suited || plain.requires_grad() {
            return Ok(weight);
        }
        weight.packed = sys::pack(plain)?;
        if weight.packed.is_some() && !keep {
            weight.plain = OnceCell::new();
        }
        Ok(weight)
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            shape: self.shape,
            plain: self.plain.get().map(Tensor::shallow_clone).map(OnceCell::from).unwrap_or_default(),
            packed: self.packed.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// `[outputs, inputs]`
    pub fn shape(&self) -> [i64; 2] {
        self.shape
    }

    /// Whether it is kept in oneDNN's layout.
    #[cfg(test)]
    pub fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// The plain matrix.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn plain(&self) -> Result<&Tensor> {
        if self.plain.get().is_none() {
            let plain = self.to_plain()?;
            return Ok(self.plain.get_or_init(|| plain));
        }
        self.plain.get().ok_or_else(|| Error::value("a weight", "a matrix", "nothing"))
    }

    /// The plain matrix, which is not kept if it had to be made.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_plain(&self) -> Result<Tensor> {
        match (self.plain.get(), &self.packed) {
            (Some(plain), _) => Ok(plain.shallow_clone()),
            (None, Some(packed)) => {
                let _guard = tch::no_grad_guard();
                Ok(packed.f_to_dense(None::<Kind>, false)?)
            }
            (None, None) => Err(Error::value("a weight", "a matrix", "nothing")),
        }
    }

    /// x Wᵀ + b: x `[.., inputs]`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match &self.packed {
            Some(packed)
                if !x.requires_grad()
                    && !bias.is_some_and(Tensor::requires_grad)
                    && x.f_kind()? == Kind::BFloat16
                    && x.size().last() == Some(&self.shape[1]) =>
            {
                sys::packed_linear(x, packed, bias, self.shape[0])
            }
            _ => product(x, self.plain()?, bias),
        }
    }
}

/// Up to this many rows a product in f32 on the CPU is split among threads by hand.
const FEW_ROWS: i64 = 64;

/// x Wᵀ + b: x `[.., inputs]`, W `[outputs, inputs]`.
///
/// LibTorch multiplies few rows in f32 on one thread: a matrix–vector product that reads memory at half its speed. As a
/// batch of narrower products, a slice of W each, all threads read.
pub(super) fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = weight.size2()?;
    let slices = i64::from(tch::get_num_threads());
    let few = slices > 1
        && i64::try_from(x.numel()).is_ok_and(|n| n <= FEW_ROWS.saturating_mul(inputs))
        && x.device() == Device::Cpu
        && x.f_kind()? == Kind::Float
        && weight.f_kind()? == Kind::Float
        && outputs % slices == 0
        && weight.is_contiguous()
        && x.size().last() == Some(&inputs);
    if !few {
        return Ok(x.f_linear(weight, bias)?);
    }
    let mut shape = x.size();
    let flat = x.f_reshape([1, -1, inputs])?; // (1, M, inputs)
    let rows = flat.size()[1];
    let flat = flat.f_expand([slices, rows, inputs], false)?;
    let sliced = weight.f_view([slices, -1, inputs])?.f_transpose(1, 2)?; // (S, inputs, outputs / S)
    let y = flat.f_bmm(&sliced)?; // (S, M, outputs / S)
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let y = y.f_transpose(0, 1)?.f_reshape(shape)?;
    Ok(match bias {
        Some(bias) => y.f_add(bias)?,
        None => y,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    fn matrix(rows: i64, columns: i64) -> Tensor {
        Tensor::arange(rows * columns, FLOAT_CPU).view([rows, columns]).sin()
    }

    const SHAPES: [&[i64]; 5] = [&[24], &[1, 24], &[1, 1, 24], &[3, 5, 24], &[2, 70, 24]];

    #[test]
    fn few_rows_are_multiplied_as_many_are() {
        let (w, b) = (matrix(40, 24), Tensor::arange(40, FLOAT_CPU).cos());
        for bias in [None, Some(&b)] {
            for shape in SHAPES {
                let x = matrix(1, shape.iter().product()).view(shape);
                let y = product(&x, &w, bias).unwrap();
                let expected = x.matmul(&w.transpose(0, 1)) + bias.map_or(0.0 * &b, Tensor::shallow_clone);
                assert_eq!(y.size(), expected.size());
                assert!(y.allclose(&expected, 1e-5, 1e-5, false), "{shape:?}");
            }
        }
    }

    #[test]
    fn a_packed_weight_multiplies_as_a_plain_one() {
        let plain = matrix(40, 24).to_kind(Kind::BFloat16);
        let b = Tensor::arange(40, FLOAT_CPU).cos().to_kind(Kind::BFloat16);
        let weight = Weight::pack(plain.shallow_clone(), false).unwrap();
        println!("packed here: {}", weight.is_packed());
        for bias in [None, Some(&b)] {
            for shape in SHAPES {
                let x = matrix(1, shape.iter().product()).view(shape).to_kind(Kind::BFloat16);
                let y = weight.product(&x, bias).unwrap();
                let expected = x.linear(&plain, bias);
                assert_eq!(y.size(), expected.size());
                let (y, expected) = (y.to_kind(Kind::Float), expected.to_kind(Kind::Float));
                assert!(y.allclose(&expected, 2e-2, 2e-2, false), "{shape:?}");
            }
        }
        // The plain matrix comes back, to the bit; so do gradients with respect to x.
        assert!(weight.plain().unwrap().equal(&plain));
        let x = matrix(2, 24).to_kind(Kind::BFloat16).set_requires_grad(true);
        let y = weight.product(&x, None).unwrap().sum(Kind::Float);
        y.backward();
        assert!(x.grad().defined());
        let handle = weight.handle();
        assert!(handle.plain().unwrap().equal(&plain));
    }

    #[test]
    fn only_matrices_are_weights() {
        assert!(matches!(Weight::new(Tensor::zeros([2], FLOAT_CPU)), Err(Error::Shape { .. })));
    }
}
