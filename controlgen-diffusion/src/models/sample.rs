//! Samples as networks take them, and predictions as they are given back.

use controlgen_core::{DenoiserSpec, Error, Placement, Prediction, Result};
use tch::Tensor;

use super::blocks::channels_last;

/// The sample `[B, C, H, W]` with the channels of a condition after its own, as a network takes it.
///
/// # Errors
/// [`Error::Shape`] for channels of another height and width.
pub fn input(x: &Tensor, concat: Option<&Tensor>, center: bool, placement: Placement) -> Result<Tensor> {
    let mut x = x.f_to_device(placement.device)?.f_to_kind(placement.kind)?;
    if let Some(concat) = concat {
        let (size, other) = (x.size(), concat.size());
        if size[2..] != other[2..] {
            return Err(Error::shape(
                "`concat`",
                format!("[C, {}, {}], as the sample", size[2], size[3]),
                &other[1..],
            ));
        }
        x = Tensor::f_cat(&[&x, concat], 1)?;
    }
    if center {
        x = x.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
    }
    channels_last(&x)
}

/// A network's output as a prediction for x, where x lies and in its element type.
///
/// # Errors
/// Those of [`Prediction::with_variance`].
pub fn predicted(output: &Tensor, x: &Tensor, spec: &DenoiserSpec) -> Result<Prediction> {
    let output = output.f_to_device(x.device())?.f_to_kind(x.f_kind()?)?.f_contiguous()?;
    match spec.learned_variance {
        true => Prediction::with_variance(&output, spec.channels, spec.parameterisation),
        false => Ok(Prediction::new(output, spec.parameterisation)),
    }
}
