//! How parameters begin.

use controlgen_core::Result;
use controlgen_core::noise::{Noise, Stream};
use tch::{Device, Kind, Tensor};

/// A parameter: an f32 leaf that gradients are recorded for.
pub(crate) fn leaf(value: &Tensor) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    Ok(value.f_to_kind(Kind::Float)?.f_contiguous()?.f_detach_copy()?.f_set_requires_grad(true)?)
}

/// Zeros.
pub(crate) fn zeros(shape: &[i64]) -> Result<Tensor> {
    leaf(&Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?)
}

/// Ones.
pub(crate) fn ones(shape: &[i64]) -> Result<Tensor> {
    leaf(&Tensor::f_ones(shape, (Kind::Float, Device::Cpu))?)
}

/// U(−1/√inputs, 1/√inputs) of shape `[outputs, inputs]`: Kaiming's uniform with a = √5, PyTorch's linear layer.
/// Parameter `number` draws from its own stream of the seed.
pub(crate) fn kaiming(shape: [i64; 2], seed: u64, number: usize) -> Result<Tensor> {
    let mut stream: Stream = Noise::seeded(seed).stream(number as u64);
    let bound = 1.0 / (shape[1].max(1) as f64).sqrt();
    let count = usize::try_from(shape[0] * shape[1]).unwrap_or(0);
    let values: Vec<f32> =
        std::iter::repeat_with(|| ((2.0 * stream.uniform() - 1.0) * bound) as f32).take(count).collect();
    leaf(&Tensor::f_from_slice(&values)?.f_view(shape)?)
}

/// Normals of deviation `std`. Parameter `number` draws from its own stream of the seed.
pub(crate) fn normal(shape: &[i64], std: f64, seed: u64, number: usize) -> Result<Tensor> {
    let mut stream = Noise::seeded(seed).stream(number as u64);
    leaf(&stream.normal(shape, Kind::Float, Device::Cpu)?.f_mul_scalar(std)?)
}
