//! Tensors to `ndarray` arrays and back.
//!
//! A conversion never changes the element type: asking for another one than the tensor has is an error, and a
//! cast is for the caller to write. Layout is not part of a value: transposed, sliced, expanded and reversed
//! inputs convert as what they show, and results are contiguous in row-major order.
//!
//! ```
//! # fn main() -> controlgen_core::Result<()> {
//! use controlgen_core::ndarray::{from_array, to_array};
//!
//! let array = ndarray::arr2(&[[1.0_f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
//! let tensor = from_array(&array.t())?;
//! assert_eq!(tensor.size(), [3, 2]);
//! assert_eq!(to_array::<f32>(&tensor)?, array.t().into_dyn());
//! assert!(to_array::<f64>(&tensor).is_err());
//! # Ok(())
//! # }
//! ```

use ndarray::{ArrayBase, ArrayD, Data, Dimension, IxDyn};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

mod sealed {
    pub trait Sealed {}
}

/// The element types that arrays and tensors share. The set is closed.
pub trait Element: tch::kind::Element + Copy + sealed::Sealed {
    /// The tensor's element type.
    const DTYPE: Kind;
}

macro_rules! elements {
    ($($rust:ty => $kind:ident),* $(,)?) => { $(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: Kind = Kind::$kind;
        }
    )* };
}

elements! {
    bool => Bool, u8 => Uint8, i8 => Int8, i16 => Int16, i32 => Int, i64 => Int64,
    half::f16 => Half, half::bf16 => BFloat16, f32 => Float, f64 => Double,
}

/// The tensor's values as an array of its shape.
///
/// The values are copied: from any device, any layout, and without the gradient history.
///
/// # Errors
/// [`Error::Kind`] if the tensor holds other elements than `T`; [`Error::Torch`] if it is undefined or
/// sparse.
pub fn to_array<T: Element>(tensor: &Tensor) -> Result<ArrayD<T>> {
    let found = tensor.f_kind()?;
    if found != T::DTYPE {
        return Err(Error::Kind {
            what: "tensor to array".into(),
            expected: format!("{:?}", T::DTYPE),
            found: format!("{found:?}"),
        });
    }
    let shape = tensor.size();
    let n = count(&shape)?;
    // A negated view (the imaginary part of a conjugate) shows what its memory does not hold.
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_resolve_neg()?.f_contiguous()?;
    let mut values: Vec<T> = reserve(n, &shape)?;
    values.resize(n, T::ZERO);
    view_as(&tensor, <T as tch::kind::Element>::KIND)?.f_copy_data(&mut values, n)?;
    let dims: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
    ArrayD::from_shape_vec(IxDyn(&dims), values)
        .map_err(|problem| Error::shape("tensor to array", problem, &shape))
}

/// A tensor of the array's shape and values, on the CPU, without gradient.
///
/// # Errors
/// [`Error::Torch`] if LibTorch cannot hold the array.
pub fn from_array<S, D>(array: &ArrayBase<S, D>) -> Result<Tensor>
where
    S: Data,
    S::Elem: Element,
    D: Dimension,
{
    let shape: Vec<i64> = array.shape().iter().map(|&dim| dim as i64).collect();
    match array.as_slice() {
        Some(values) => tensor_from_slice(values, &shape),
        None => {
            let mut values = reserve(array.len(), &shape)?;
            values.extend(array.iter().copied());
            tensor_from_slice(&values, &shape)
        }
    }
}

/// A tensor of `shape` on the CPU with the given values, row by row.
pub(crate) fn tensor_from_slice<T: Element>(values: &[T], shape: &[i64]) -> Result<Tensor> {
    let tensor = Tensor::f_from_slice(values)?.f_view(shape)?;
    view_as(&tensor, T::DTYPE)
}

/// How many elements a shape has.
pub(crate) fn count(shape: &[i64]) -> Result<usize> {
    let wrong = || Error::value("shape", "dimensions ≥ 0 whose product fits in memory", format!("{shape:?}"));
    if shape.iter().any(|&dim| dim < 0) {
        return Err(wrong());
    }
    if shape.contains(&0) {
        return Ok(0);
    }
    // Below 2^60 elements, the bytes of any element type fit 64 bits.
    let n = shape.iter().try_fold(1_i64, |n, &dim| n.checked_mul(dim)).filter(|&n| n < 1 << 60);
    n.and_then(|n| usize::try_from(n).ok()).ok_or_else(wrong)
}

/// An empty vector with room for the `n` elements of `shape`.
pub(crate) fn reserve<T>(n: usize, shape: &[i64]) -> Result<Vec<T>> {
    let mut values = Vec::new();
    match values.try_reserve_exact(n) {
        Ok(()) => Ok(values),
        Err(_) => Err(Error::value("shape", "one that fits in memory", format!("{shape:?}"))),
    }
}

/// The same bits under another kind of the same width: `tch` knows `bf16` as `Half`.
fn view_as(tensor: &Tensor, kind: Kind) -> Result<Tensor> {
    if tensor.f_kind()? == kind { Ok(tensor.shallow_clone()) } else { Ok(tensor.f_view_dtype(kind)?) }
}
