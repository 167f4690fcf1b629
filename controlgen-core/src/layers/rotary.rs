//! Rotary position embeddings.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::{Error, Placement, Result};

/// How frequencies are changed to reach past the length a model was trained at.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// They are not.
    None,
    /// All divided by `factor` (Chen et al. 2023, position interpolation).
    Linear {
        /// ≥ 1
        factor: f64,
    },
    /// Llama 3's: long wavelengths divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// ≥ 1
        factor: f64,
        /// Wavelengths over `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths under `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The length the model was trained at.
        original_context: f64,
    },
}

/// Rotary position embeddings (Su et al. 2021), in the layout of Hugging Face: component i of a head is paired with
/// component i + head_dim/2.
///
/// Angles are computed in f64 for the positions of a pass, so no table limits the context.
pub struct Rotary {
    /// θᵢ, f64 `[head_dim / 2]`
    frequencies: Tensor,
    placement: Placement,
}

/// Cosines and sines for the positions of one pass.
pub struct Rotations {
    /// `[B or 1, T, 1, head_dim]`
    cos: Tensor,
    /// The same, negative in its first half.
    sin: Tensor,
    half: i64,
}

impl Rotary {
    /// Frequencies θᵢ = base^(−2i / head_dim), scaled.
    ///
    /// # Errors
    /// [`Error::Value`] for an odd or non-positive `head_dim`, or a base that is not positive.
    pub fn new(head_dim: i64, base: f64, scaling: RotaryScaling, placement: Placement) -> Result<Self> {
        if head_dim <= 0 || head_dim % 2 != 0 {
            return Err(Error::value("head_dim under rotary positions", "an even number > 0", head_dim));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(Error::value("rope_theta", "> 0", base));
        }
        let frequencies: Vec<f64> = (0..head_dim)
            .step_by(2)
            .map(|i| scale(base.powf(-(i as f64) / head_dim as f64), scaling))
            .collect();
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_to_device(placement.device)?;
        Ok(Self { frequencies, placement })
    }

    /// Another handle over the same frequencies.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { frequencies: self.frequencies.shallow_clone(), placement: self.placement }
    }

    /// Rotations for positions `[B, T]` or `[1, T]`, int64.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn at(&self, positions: &Tensor) -> Result<Rotations> {
        let half = self.frequencies.size1()?;
        let angles = positions.f_to_kind(Kind::Double)?.f_unsqueeze(-1)?.f_mul(&self.frequencies)?;
        let angles = angles.f_unsqueeze(2)?; // (B, T, 1, head_dim / 2)
        let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
        let cos = Tensor::f_cat(&[&cos, &cos], -1)?.f_to_kind(self.placement.kind)?;
        let sin = Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)?.f_to_kind(self.placement.kind)?;
        Ok(Rotations { cos, sin, half })
    }

    /// Rotations for positions `start .. start + len`, the same in every row.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn range(&self, start: i64, len: i64) -> Result<Rotations> {
        let positions = Tensor::f_arange_start(start, start + len, (Kind::Int64, Device::Cpu))?;
        self.at(&positions.f_unsqueeze(0)?.f_to_device(self.placement.device)?)
    }
}

impl Rotations {
    /// Rotates heads `[B, T, heads, head_dim]`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        // (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin)
        let swapped = x.f_roll(self.half, -1)?;
        Ok(x.f_mul(&self.cos)?.f_addcmul(&swapped, &self.sin)?)
    }
}

fn scale(frequency: f64, scaling: RotaryScaling) -> f64 {
    match scaling {
        RotaryScaling::None => frequency,
        RotaryScaling::Linear { factor } => frequency / factor,
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = 2.0 * PI / frequency;
            if wavelength < original_context / high_freq_factor {
                return frequency;
            }
            if wavelength > original_context / low_freq_factor {
                return frequency / factor;
            }
            let smooth =
                (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    #[test]
    fn a_rotation_turns_each_pair_by_position_times_frequency() {
        let rotary = Rotary::new(4, 100.0, RotaryScaling::None, Placement::CPU).unwrap();
        let x = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 2.0]).view([1, 1, 1, 4]);
        let y = rotary.range(3, 1).unwrap().apply(&x).unwrap();
        let y: Vec<f32> = Vec::try_from(y.view([4])).unwrap();
        // Pairs (0, 2) at frequency 1 and (1, 3) at 0.1.
        let expected = [3f64.cos(), -2.0 * 0.3f64.sin(), 3f64.sin(), 2.0 * 0.3f64.cos()].map(|v| v as f32);
        for (a, b) in y.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{y:?} {expected:?}");
        }
    }

    #[test]
    fn rows_may_stand_at_their_own_positions() {
        let rotary = Rotary::new(8, 10000.0, RotaryScaling::None, Placement::CPU).unwrap();
        let x = Tensor::arange(2 * 3 * 2 * 8, FLOAT_CPU).view([2, 3, 2, 8]).sin();
        let positions = Tensor::from_slice(&[0i64, 1, 2, 5, 6, 7]).view([2, 3]);
        let y = rotary.at(&positions).unwrap().apply(&x).unwrap();
        let second = rotary.range(5, 3).unwrap().apply(&x.narrow(0, 1, 1)).unwrap();
        assert!(y.narrow(0, 1, 1).allclose(&second, 1e-6, 1e-6, false));
    }

    #[test]
    fn impossible_dimensions_are_refused() {
        for (dim, base) in [(3, 1e4), (0, 1e4), (-2, 1e4), (4, 0.0), (4, f64::NAN)] {
            assert!(Rotary::new(dim, base, RotaryScaling::None, Placement::CPU).is_err());
        }
    }
}
