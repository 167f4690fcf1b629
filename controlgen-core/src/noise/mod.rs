//! Seeded noise: randomness is a parameter, and LibTorch's global seed is never touched.
//!
//! Two generators, for two needs:
//!
//! | | [`Stream`] | [`TorchGenerator`] |
//! |---|---|---|
//! | for | everything of ours | a Python user's seed that shall give the same noise |
//! | algorithm | ChaCha8, ziggurat | MT19937 and Box–Muller, as PyTorch's CPU generator has them |
//! | a sample depends on | its own (seed, sample) | the shape of the whole draw |
//! | the same on every device | yes: drawn on the CPU | yes: drawn on the CPU |
//!
//! What needs noise takes a [`NoiseSource`] and asks it for whole batches. What it is given decides how the
//! batch is drawn:
//!
//! ```
//! # fn main() -> controlgen_core::Result<()> {
//! use controlgen_core::noise::{Noise, NoiseSource, TorchGenerator};
//! use tch::{Device, Kind};
//!
//! let latents = |source: &mut dyn NoiseSource| source.normal(&[2, 4, 8, 8], Kind::Float, Device::Cpu);
//!
//! // One stream for each sample: sample 1 is the same in a batch of 2 as in a batch of 200.
//! let ours = latents(&mut Noise::seeded(42).streams(2))?;
//! // torch.randn((2, 4, 8, 8), generator=torch.manual_seed(42))
//! let flat = latents(&mut TorchGenerator::new(42))?;
//! // diffusers, generator=[torch.manual_seed(42), torch.manual_seed(43)]
//! let list = latents(&mut vec![TorchGenerator::new(42), TorchGenerator::new(43)])?;
//!
//! assert_eq!(ours.get(1), Noise::seeded(42).stream(1).normal(&[4, 8, 8], Kind::Float, Device::Cpu)?);
//! assert_ne!(flat.get(1), list.get(1));
//! # Ok(())
//! # }
//! ```

mod box_muller;
mod mt19937;
mod stream;
mod torch;
mod torch_state;

pub use stream::{Stream, StreamState};
pub use torch::{Arithmetic, TorchGenerator};

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Something that draws standard normals: what samplers take.
///
/// Implemented by one generator (a flat draw: the axes mean nothing to it) and by a `Vec` of generators (the
/// first axis is the batch, and each row comes from its own generator).
pub trait NoiseSource: Send {
    /// Independent standard normals of `shape`.
    ///
    /// # Errors
    /// [`Error::Kind`] unless `kind` is a floating type that the source draws; [`Error::Value`] for a
    /// negative or oversized dimension; [`Error::Shape`] if the source is a batch of generators, and of
    /// another size than `shape[0]`.
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor>;
}

impl<S: NoiseSource + ?Sized> NoiseSource for &mut S {
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        (**self).normal(shape, kind, device)
    }
}

impl<S: NoiseSource + ?Sized> NoiseSource for Box<S> {
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        (**self).normal(shape, kind, device)
    }
}

impl<S: NoiseSource> NoiseSource for Vec<S> {
    /// Row i of the batch from generator i.
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        match shape.split_first() {
            Some((&batch, sample)) if usize::try_from(batch) == Ok(self.len()) => {
                normal_batch(self, sample, kind, device)
            }
            _ => Err(Error::shape(
                format!("noise of {} generators, one a sample", self.len()),
                format!("[{}, …]", self.len()),
                shape,
            )),
        }
    }
}

/// Standard normals `[B, shape…]` for B sources: row i is what source i draws for `shape`.
///
/// The rows are drawn on the CPU and moved to `device` together. Without sources the result is `[0, shape…]`.
///
/// # Errors
/// As [`NoiseSource::normal`] of the sources. Sources before the one that failed have drawn.
pub fn normal_batch<S: NoiseSource>(
    sources: &mut [S],
    shape: &[i64],
    kind: Kind,
    device: Device,
) -> Result<Tensor> {
    if sources.is_empty() {
        let shape = [&[0], shape].concat();
        crate::ndarray::count(&shape)?;
        return Ok(Tensor::f_empty(shape, (kind, device))?);
    }
    let rows: Vec<Tensor> =
        sources.iter_mut().map(|source| source.normal(shape, kind, Device::Cpu)).collect::<Result<_>>()?;
    on_device(Tensor::f_stack(&rows, 0)?, device)
}

/// A seed, and the streams under it.
///
/// ```
/// use controlgen_core::noise::{Noise, Stream};
///
/// let noise = Noise::seeded(42);
/// assert_eq!(noise.streams(3)[2], Stream::new(42, 2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    seed: u64,
}

impl Noise {
    /// The streams under `seed`.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { seed }
    }

    /// The stream of one sample.
    #[must_use]
    pub fn stream(self, sample: u64) -> Stream {
        Stream::new(self.seed, sample)
    }

    /// The streams of the samples `0 .. n`: a [`NoiseSource`] for a batch of n.
    #[must_use]
    pub fn streams(self, n: usize) -> Vec<Stream> {
        (0..n as u64).map(|sample| self.stream(sample)).collect()
    }
}

/// Moves a tensor that was drawn on the CPU.
fn on_device(tensor: Tensor, device: Device) -> Result<Tensor> {
    if device == Device::Cpu { Ok(tensor) } else { Ok(tensor.f_to_device(device)?) }
}
