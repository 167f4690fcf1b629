//! [`TorchGenerator`]: the numbers of PyTorch's CPU generator.

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::box_muller;
use super::mt19937::Mt19937;
use super::{NoiseSource, on_device};
use crate::ndarray::{Element, count, reserve, tensor_from_slice};
use crate::{Error, Result};

/// PyTorch's CPU generator: the same seed and the same calls give the same numbers, bit for bit.
///
/// `TorchGenerator::new(s)` stands for `torch.Generator().manual_seed(s)`, and each method for the `torch`
/// function of its name called with `generator=` on the CPU. Checked against PyTorch 2.11. The generator is a
/// value: it is cloned, kept and restored ([`TorchGenerator::state`]), and LibTorch's global one is never
/// touched.
///
/// What a Python user's script draws, and how it is drawn here:
///
/// * `torch.randn(shape, generator=g)`: one flat draw, [`TorchGenerator::randn`]. The numbers depend on the
///   whole shape's size, so a batch is *not* the concatenation of its samples.
/// * a list of generators, one per sample (diffusers): a `Vec<TorchGenerator>` as a [`NoiseSource`].
///
/// Two things decide the last bits. In `f32`, PyTorch computes 16 or more normals at once with polynomials
/// where the processor has AVX2, and with the C library elsewhere: see [`Arithmetic`]. Doubles, and fewer
/// than 16 numbers, always use the C library's logarithm and sine, here as there: equal on the same system;
/// on another one the last bit of a double may differ.
///
/// Not covered: `torch.bernoulli`, `exponential_` and `multinomial`. PyTorch built with Intel's MKL takes
/// MKL's own streams for them, on some processors and not on others.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::noise::TorchGenerator;
/// use tch::{Device, Kind};
///
/// // torch.randn(2, generator=torch.Generator().manual_seed(42)) -> tensor([0.3367, 0.1288])
/// let x = TorchGenerator::new(42).randn(&[2], Kind::Float, Device::Cpu)?;
/// assert!((x.double_value(&[0]) - 0.3367).abs() < 5e-5);
/// assert!((x.double_value(&[1]) - 0.1288).abs() < 5e-5);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TorchGenerator {
    pub(super) engine: Mt19937,
    /// The second normal of a pair, when normals are drawn one by one (always in double precision).
    pub(super) cached: Option<f64>,
    arithmetic: Arithmetic,
}

/// How PyTorch computes 16 or more `f32` normals; the two differ in the last bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Polynomials with fused multiply-adds: x86 processors with AVX2, that is, nearly every PC and server.
    /// This is pure arithmetic and gives the same numbers on every machine.
    #[default]
    Avx2,
    /// The C library's functions: ARM, Apple, and x86 with `ATEN_CPU_CAPABILITY=default`.
    Scalar,
}

/// From here on PyTorch draws all uniforms first and transforms them in blocks.
const BLOCK: usize = 16;
/// From here on `torch.randperm` draws 64 bits for each element.
const LARGE_PERMUTATION: u64 = (u32::MAX as u64).div_euclid(20);

impl TorchGenerator {
    /// The generator of `torch.Generator().manual_seed(seed)`.
    ///
    /// The engine uses the low 32 bits, as PyTorch's does: seeds that agree in them give the same numbers. A
    /// negative seed of Python's is its two's complement: `-1_i64 as u64`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { engine: Mt19937::new(seed), cached: None, arithmetic: Arithmetic::default() }
    }

    /// The same generator, computing `f32` normals in the given way.
    #[must_use]
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// The seed it was made from (`Generator.initial_seed()`).
    #[must_use]
    pub fn initial_seed(&self) -> u64 {
        self.engine.seed()
    }

    /// Standard normals of `shape`: `torch.randn`.
    ///
    /// The numbers are drawn on the CPU and moved to `device`: the same on each.
    ///
    /// # Errors
    /// [`Error::Kind`] unless `kind` is double, float, half or bfloat16; [`Error::Value`] for a negative or
    /// oversized dimension; LibTorch's error if the device refuses.
    pub fn randn(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let n = count(shape)?;
        let tensor = match kind {
            Kind::Double => tensor_from_slice(&self.normals(n, double, box_muller::double, |x| x)?, shape),
            Kind::Float => {
                let pair = match self.arithmetic {
                    Arithmetic::Avx2 => box_muller::vector,
                    Arithmetic::Scalar => box_muller::scalar,
                };
                tensor_from_slice(&self.normals(n, float, pair, |x| x as f32)?, shape)
            }
            Kind::Half => {
                let round = |x| f16::from_f32(x as f32);
                tensor_from_slice(&self.normals(n, half, box_muller::half, round)?, shape)
            }
            Kind::BFloat16 => {
                let round = |x| bf16::from_f32(x as f32);
                tensor_from_slice(&self.normals(n, bfloat, box_muller::bfloat, round)?, shape)
            }
            other => return Err(floating("randn", other)),
        };
        on_device(tensor?, device)
    }

    /// Uniforms in [0, 1) of `shape`: `torch.rand`.
    ///
    /// Multiples of 2^−53 in double, 2^−24 in float, 2^−11 in half and 2^−8 in bfloat16.
    ///
    /// # Errors
    /// As [`TorchGenerator::randn`].
    pub fn rand(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        let n = count(shape)?;
        let tensor = match kind {
            Kind::Double => tensor_from_slice(&self.draws(n, double)?, shape),
            Kind::Float => tensor_from_slice(&self.draws(n, float)?, shape),
            Kind::Half => tensor_from_slice(&self.draws(n, half)?, shape),
            Kind::BFloat16 => tensor_from_slice(&self.draws(n, bfloat)?, shape),
            other => return Err(floating("rand", other)),
        };
        on_device(tensor?, device)
    }

    /// Integers in `low .. high` of `shape`, 64 bits wide: `torch.randint`.
    ///
    /// Drawn by remainder, as PyTorch draws them: for a range below 2^28 the skew is at most one in 16.
    ///
    /// # Errors
    /// [`Error::Value`] unless `low < high`, and for a negative or oversized dimension; LibTorch's error if
    /// the device refuses.
    pub fn randint(&mut self, low: i64, high: i64, shape: &[i64], device: Device) -> Result<Tensor> {
        if low >= high {
            return Err(Error::value("randint: high", format!("> low = {low}"), high));
        }
        let n = count(shape)?;
        let range = high.wrapping_sub(low) as u64;
        let draw = |engine: &mut Mt19937| {
            let bits = if range >= 1 << 28 { engine.random64() } else { u64::from(engine.random()) };
            low.wrapping_add((bits % range) as i64)
        };
        on_device(tensor_from_slice(&self.draws(n, draw)?, shape)?, device)
    }

    /// A random order of `0 .. n`, 64-bit integers: `torch.randperm`.
    ///
    /// # Errors
    /// [`Error::Value`] if `n` is negative or too large for memory; LibTorch's error if the device refuses.
    pub fn randperm(&mut self, n: i64, device: Device) -> Result<Tensor> {
        let shape = [n];
        let size = count(&shape)?;
        let mut order: Vec<i64> = reserve(size, &shape)?;
        order.extend(0..n);
        if (size as u64) < LARGE_PERMUTATION {
            for i in 0..size.saturating_sub(1) {
                let z = u64::from(self.engine.random()) % (size - i) as u64;
                order.swap(i, i + z as usize);
            }
        } else {
            // The inside-out variant of Fisher and Yates's shuffle.
            for i in 0..size {
                let z = (self.engine.random64() % (i as u64 + 1)) as usize;
                order[i] = order[z];
                order[z] = i as i64;
            }
        }
        on_device(tensor_from_slice(&order, &shape)?, device)
    }

    fn draws<T>(&mut self, n: usize, draw: impl Fn(&mut Mt19937) -> T) -> Result<Vec<T>> {
        let mut values = reserve(n, &[n as i64])?;
        values.extend((0..n).map(|_| draw(&mut self.engine)));
        Ok(values)
    }

    /// Normals: in blocks of 16 uniforms, or one by one if they are fewer.
    fn normals<T: Element>(
        &mut self,
        n: usize,
        uniform: impl Fn(&mut Mt19937) -> T,
        pair: impl Fn(T, T) -> (T, T),
        round: impl Fn(f64) -> T,
    ) -> Result<Vec<T>> {
        if n < BLOCK {
            let mut values = reserve(n, &[n as i64])?;
            values.extend((0..n).map(|_| round(self.next_normal())));
            return Ok(values);
        }
        let transform = |block: &mut [T]| {
            for j in 0..8 {
                (block[j], block[j + 8]) = pair(block[j], block[j + 8]);
            }
        };
        let mut values = self.draws(n, &uniform)?;
        values.chunks_exact_mut(BLOCK).for_each(transform);
        if !n.is_multiple_of(BLOCK) {
            // The last 16 values are drawn anew, the already transformed among them.
            let tail = &mut values[n - BLOCK..];
            for value in tail.iter_mut() {
                *value = uniform(&mut self.engine);
            }
            transform(tail);
        }
        Ok(values)
    }

    fn next_normal(&mut self) -> f64 {
        if let Some(value) = self.cached.take() {
            return value + 0.0;
        }
        let u1 = double(&mut self.engine);
        let u2 = double(&mut self.engine);
        let (now, later) = box_muller::one_by_one(u1, u2);
        self.cached = Some(later);
        now
    }
}

impl NoiseSource for TorchGenerator {
    /// [`TorchGenerator::randn`]: one flat draw.
    fn normal(&mut self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
        self.randn(shape, kind, device)
    }
}

// Uniforms in [0, 1): as many random bits as the type's significand has.

fn double(engine: &mut Mt19937) -> f64 {
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    (engine.random64() & ((1 << 53) - 1)) as f64 * UNIT
}

fn float(engine: &mut Mt19937) -> f32 {
    low_bits(engine, 24)
}

fn half(engine: &mut Mt19937) -> f16 {
    f16::from_f32(low_bits(engine, 11))
}

fn bfloat(engine: &mut Mt19937) -> bf16 {
    bf16::from_f32(low_bits(engine, 8))
}

fn low_bits(engine: &mut Mt19937, bits: u32) -> f32 {
    let size = 1_u32 << bits;
    (engine.random() & (size - 1)) as f32 / size as f32
}

fn floating(what: &str, found: Kind) -> Error {
    Error::Kind {
        what: what.into(),
        expected: "Double, Float, Half or BFloat16".into(),
        found: format!("{found:?}"),
    }
}
