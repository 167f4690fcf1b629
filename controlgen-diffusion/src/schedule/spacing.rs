//! Which timesteps a sampler visits.

use controlgen_core::{Error, Result};

use super::linspace;

/// Which of the T timesteps a sampler visits: diffusers' `timestep_spacing`; table 2 of Lin et al., "Common Diffusion
/// Noise Schedules and Sample Steps are Flawed" (2023).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// 0, k, 2 k, .., with k = T div n, and all of them `offset` later: the last timestep is not among them.
    Leading {
        /// diffusers' `steps_offset`: 0, or 1 for Stable Diffusion.
        offset: i64,
    },
    /// From 0 to T − 1, both included, rounded.
    Linspace,
    /// T − 1, T − 1 − T / n, ..: the last timestep is among them, the first is not.
    Trailing,
}

impl Spacing {
    /// n of T timesteps, from the noisiest.
    pub(super) fn timesteps(self, n: usize, all: usize) -> Result<Vec<f64>> {
        count(n, all)?;
        Ok(match self {
            Self::Leading { offset } => leading(n, all.div_euclid(n), offset),
            Self::Linspace if n == 1 => vec![0.0],
            Self::Linspace => linspace(0.0, (all - 1) as f64, n).rev().map(f64::round_ties_even).collect(),
            Self::Trailing => trailing(n, all, all),
        })
    }

    /// n of n + 1 among the first `of` of T timesteps, from the noisiest, without the last.
    pub(crate) fn solver_timesteps(self, n: usize, of: usize, all: usize) -> Result<Vec<f64>> {
        count(n, of.saturating_sub(1))?;
        let mut timesteps = match self {
            Self::Leading { offset } => leading(n + 1, of.div_euclid(n + 1), offset),
            Self::Linspace => linspace(0.0, (of - 1) as f64, n + 1).rev().map(f64::round_ties_even).collect(),
            Self::Trailing => return Ok(trailing(n, of, all)),
        };
        timesteps.pop();
        Ok(timesteps)
    }
}

fn count(n: usize, most: usize) -> Result<()> {
    if n == 0 || n > most {
        return Err(Error::value("number of steps", format!("1 ..= {most}"), n));
    }
    Ok(())
}

fn leading(n: usize, stride: usize, offset: i64) -> Vec<f64> {
    (0..n).rev().map(|i| (i * stride) as f64 + offset as f64).collect()
}

/// From `of` − 1 down by T / n, as NumPy's `arange` counts.
fn trailing(n: usize, of: usize, all: usize) -> Vec<f64> {
    let (start, stride) = (of as f64, all as f64 / n as f64);
    let step = (start - stride) - start;
    let timesteps = (0..n).map(|i| start + i as f64 * step).take_while(|&t| t > 0.0);
    timesteps.map(|t| t.round_ties_even() - 1.0).collect()
}
