//! Times of rectified flow.

use controlgen_core::{Error, Result};

use super::linspace;

/// n times σ of rectified flow, x = (1 − σ) x₀ + σ ε, from 1 to about 1 / T: evenly spaced and then shifted towards
/// noise, σ' = s σ / (1 + (s − 1) σ). Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
/// Synthesis" (2024), eq. 23: s is √(pixels / pixels of training), 3 for Stable Diffusion 3.
///
/// As in diffusers' `FlowMatchEulerDiscreteScheduler` the least time is shifted twice: it is s / T' of the T' that was
/// shifted already.
///
/// # Errors
/// [`Error::Value`] for n = 0, T = 0, or s that is not above 0.
pub fn flow_sigmas(n: usize, training_timesteps: usize, shift: f64) -> Result<Vec<f64>> {
    if n == 0 || training_timesteps == 0 {
        let found = format!("{n} and {training_timesteps}");
        return Err(Error::value("steps and training timesteps", ">= 1", found));
    }
    if !(shift.is_finite() && shift > 0.0) {
        return Err(Error::value("shift", "a finite number > 0", shift));
    }
    let shifted = |sigma: f64| shift * sigma / (1.0 + (shift - 1.0) * sigma);
    let least = shifted(1.0 / training_timesteps as f64);
    Ok(linspace(1.0, least, n).map(shifted).collect())
}
