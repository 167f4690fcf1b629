//! [`Stream`]: the random numbers of one sample.

use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{NoiseSource, on_device};
use crate::ndarray::{count, reserve, tensor_from_slice};
use crate::{Error, Result};

/// The rest of the key: what sets these numbers apart from anyone else's ChaCha with the same seed.
const DOMAIN: &[u8; 24] = b"controlgen::noise stream";

/// The random numbers of one sample: a function of (seed, sample) and of what was drawn before, and of
/// nothing else.
///
/// Give each sample of a batch its own stream, and it comes out the same alone, in any batch, in any order
/// and on any device. Streams of different samples, or seeds, are independent for every practical purpose.
///
/// # What is drawn, exactly
///
/// These numbers are part of the interface: they change only with a new minor version (0.x) of this crate,
/// and a test pins them.
///
/// * The generator is ChaCha with 8 rounds (Bernstein, 2008), 64-bit block counter and 64-bit stream number.
///   The key is the seed in 8 little-endian bytes followed by the 24 bytes `controlgen::noise stream`; the
///   stream number is the sample; the counter starts at 0. A 64-bit draw is two 32-bit words, the low one
///   first.
/// * [`Stream::uniform`]: the upper 53 bits of a 64-bit draw, times 2^−53.
/// * [`Stream::normal`] and [`Stream::standard_normal`]: the ziggurat of `rand_distr` 0.6's `StandardNormal`
///   (Marsaglia and Tsang, J. Stat. Softw. 5(8), 2000; Doornik, 2005) in double precision, then rounded. A
///   `f32` tensor holds the rounded numbers of the `f64` tensor drawn in its place.
///
/// # Clone and fork
///
/// A clone repeats its original's future: that is what a retry or a recomputation needs. Hypotheses that part
/// (beams, particles) and must from now on draw differently each take a [`Stream::fork`].
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::noise::Stream;
/// use tch::{Device, Kind};
///
/// let mut a = Stream::new(7, 0);
/// let mut b = a.clone();
/// let x = a.normal(&[2, 3], Kind::Float, Device::Cpu)?;
/// assert_eq!(x, b.normal(&[2, 3], Kind::Float, Device::Cpu)?);
/// assert_ne!(a.fork().uniform(), b.uniform());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, PartialEq, Eq)]
pub struct Stream {
    rng: ChaCha8Rng,
}

impl Clone for Stream {
    fn clone(&self) -> Self {
        Self::at(&self.state())
    }
}

/// Where a [`Stream`] stands: to be saved, and taken up again with [`Stream::resume`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamState {
    /// ChaCha's key.
    pub key: [u8; 32],
    /// ChaCha's stream number: the sample.
    pub sample: u64,
    /// 32-bit words drawn so far, below 2^68.
    pub position: u128,
}

impl Stream {
    /// The stream of a sample under a seed, at its start.
    #[must_use]
    pub fn new(seed: u64, sample: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].copy_from_slice(DOMAIN);
        Self::keyed(key, sample)
    }

    fn keyed(key: [u8; 32], sample: u64) -> Self {
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(sample);
        Self { rng }
    }

    /// The sample it belongs to.
    #[must_use]
    pub fn sample(&self) -> u64 {
        self.rng.get_stream()
    }

    /// A number in [0, 1), a multiple of 2^−53.
    pub fn uniform(&mut self) -> f64 {
        const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
        (self.rng.next_u64() >> 11) as f64 * UNIT
    }

    /// A whole number in 0 .. n, all equally likely, from one [`uniform`](Self::uniform); 0 where n is 0.
    pub fn index(&mut self, n: usize) -> usize {
        ((self.uniform() * n as f64) as usize).min(n.saturating_sub(1))
    }

    /// Brings values into random order (Fisher and Yates 1938).
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.index(last + 1));
        }
    }

    /// One standard normal: density exp(−x²/2) / √(2π).
    pub fn standard_normal(&mut self) -> f64 {
        StandardNormal.sample(&mut self.rng)
    }

    /// Standard normals of `shape`, drawn in row-major order on the CPU and moved to `device`.
    ///
    /// # Errors
    /// [`Error::Kind`] unless `kind` is double, float, half or bfloat16; [`Error::Value`] for a negative or
    /// oversized dimension; LibTorch's error if the device refuses.
    pub fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let n = count(shape)?;
        let tensor = match kind {
            Kind::Double => {
                let mut values: Vec<f64> = reserve(n, shape)?;
                values.extend((0..n).map(|_| self.standard_normal()));
                tensor_from_slice(&values, shape)?
            }
            Kind::Float | Kind::Half | Kind::BFloat16 => {
                let mut values: Vec<f32> = reserve(n, shape)?;
                values.extend((0..n).map(|_| self.standard_normal() as f32));
                tensor_from_slice(&values, shape)?.f_to_kind(kind)?
            }
            other => {
                return Err(Error::Kind {
                    what: "normal".into(),
                    expected: "Double, Float, Half or BFloat16".into(),
                    found: format!("{other:?}"),
                });
            }
        };
        on_device(tensor, device)
    }

    /// The generator underneath, for the distributions of `rand` and `rand_distr`.
    pub fn rng(&mut self) -> &mut ChaCha8Rng {
        &mut self.rng
    }

    /// A new stream, independent of what this one draws from now on.
    ///
    /// Its key is the next 32 bytes of this stream; it keeps the sample. A second fork gives another stream.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        let mut key = [0; 32];
        self.rng.fill_bytes(&mut key);
        Self::keyed(key, self.sample())
    }

    /// Where the stream stands.
    #[must_use]
    pub fn state(&self) -> StreamState {
        StreamState {
            key: self.rng.get_seed(),
            sample: self.rng.get_stream(),
            position: self.rng.get_word_pos(),
        }
    }

    /// The stream that stood at `state`, which draws on from there.
    ///
    /// # Errors
    /// [`Error::Value`] for a position of 2^68 or more.
    pub fn resume(state: &StreamState) -> Result<Self> {
        if state.position >= 1 << 68 {
            return Err(Error::value("stream state: position", "< 2^68", state.position));
        }
        Ok(Self::at(state))
    }

    fn at(state: &StreamState) -> Self {
        let mut stream = Self::keyed(state.key, state.sample);
        stream.rng.set_word_pos(state.position);
        stream
    }
}

impl NoiseSource for Stream {
    /// [`Stream::normal`]: one draw, whatever the axes mean. For a batch take one stream for each sample.
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        Self::normal(self, shape, kind, device)
    }
}
