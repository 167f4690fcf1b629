//! Devices and element types.

use std::str::FromStr;

use tch::{Device, Kind};

use crate::{Error, Result, sys};

/// Where tensors live and of what type their elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// The element type of weights and activations.
    pub kind: Kind,
}

impl Placement {
    /// f32 on the CPU.
    pub const CPU: Self = Self { device: Device::Cpu, kind: Kind::Float };

    /// On `device`, of element type `kind`.
    pub fn new(device: Device, kind: Kind) -> Self {
        Self { device, kind }
    }

    /// The same device with another element type.
    #[must_use]
    pub fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// The pair that tch's constructors take.
    pub fn options(self) -> (Kind, Device) {
        (self.kind, self.device)
    }

    /// The smallest number of this element type: what a masked score becomes.
    pub fn min_value(self) -> f64 {
        match self.kind {
            Kind::Half => -65504.0,
            Kind::BFloat16 => -3.3895313892515355e38,
            Kind::Double => f64::MIN,
            _ => f64::from(f32::MIN),
        }
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self::CPU
    }
}

/// The device of a name: `cpu`, `cuda` (the first), `cuda:1`, or `best` (the first CUDA device where there is one,
/// else the CPU).
///
/// One binary serves machines with and without CUDA: LibTorch's CUDA library is opened here, at run time, when a
/// CUDA device is first asked for. Ask here before any `tch::Cuda` function: LibTorch does not look again.
///
/// # Errors
/// [`Error::Device`] where there is no such device, with the reason; [`Error::Value`] for an unknown name.
pub fn device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "best" => return Ok(cuda_device(name, 0).unwrap_or(Device::Cpu)),
        "cuda" => 0,
        _ => name
            .strip_prefix("cuda:")
            .and_then(|index| usize::from_str(index).ok())
            .ok_or_else(|| Error::value("device", "cpu, cuda, cuda:N or best", name))?,
    };
    cuda_device(name, index)
}

fn cuda_device(name: &str, index: usize) -> Result<Device> {
    let absent = |reason: String| Error::Device { wanted: name.to_owned(), reason };
    sys::open_cuda().map_err(absent)?;
    if !tch::Cuda::is_available() {
        return Err(absent("LibTorch's CUDA library finds no usable NVIDIA driver and device".into()));
    }
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    if index >= count {
        return Err(absent(format!("there are {count} CUDA devices, counted from 0")));
    }
    Ok(Device::Cuda(index))
}

/// The element type of a name: `f32`, `f64`, `f16`, `bf16`, or PyTorch's `float32`, `torch.bfloat16` and so on.
///
/// # Errors
/// [`Error::Value`] for an unknown name.
pub fn kind(name: &str) -> Result<Kind> {
    Ok(match name.strip_prefix("torch.").unwrap_or(name) {
        "f32" | "float32" | "float" => Kind::Float,
        "f64" | "float64" | "double" => Kind::Double,
        "f16" | "float16" | "half" => Kind::Half,
        "bf16" | "bfloat16" => Kind::BFloat16,
        _ => return Err(Error::value("element type", "f32, f64, f16 or bf16", name)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        assert!(device("best").is_ok());
        for bad in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(matches!(device(bad), Err(Error::Value { .. })), "{bad}");
        }
        assert_eq!(kind("torch.bfloat16").unwrap(), Kind::BFloat16);
        assert!(kind("int8").is_err());
    }

    #[test]
    fn an_absent_cuda_device_is_said_to_be_absent() {
        // On a machine with CUDA the hundredth device is absent; on one without, all are.
        assert!(matches!(device("cuda:99"), Err(Error::Device { .. })));
    }
}
