//! Spacings of noise itself, whatever the timesteps.

use controlgen_core::{Error, Result};

use super::linspace;

/// n values of σ/α between the most and the least noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SigmaSpacing {
    /// Equal steps of σ^(1/ρ), diffusers' `use_karras_sigmas`. Karras et al., "Elucidating the Design Space of
    /// Diffusion-Based Generative Models" (2022), eq. 5: ρ = 7.
    Karras {
        /// ρ > 0: the greater, the more steps are at low noise.
        rho: f64,
    },
    /// Equal steps of ln σ, diffusers' `use_exponential_sigmas`: ρ without end.
    Exponential,
}

impl SigmaSpacing {
    /// n values from `most` to `least`, both included.
    ///
    /// # Errors
    /// [`Error::Value`] for n = 0, ρ not above 0, or unless most ≥ least > 0.
    pub fn sigmas(self, most: f64, least: f64, n: usize) -> Result<Vec<f64>> {
        if n == 0 {
            return Err(Error::value("number of steps", ">= 1", n));
        }
        if !(most.is_finite() && most >= least && least > 0.0) {
            return Err(Error::value("sigmas", "most >= least > 0", format!("{most} and {least}")));
        }
        Ok(match self {
            Self::Karras { rho } => {
                if !(rho.is_finite() && rho > 0.0) {
                    return Err(Error::value("rho", "a finite number > 0", rho));
                }
                let (from, to) = (most.powf(1.0 / rho), least.powf(1.0 / rho));
                linspace(0.0, 1.0, n).map(|u| (from + u * (to - from)).powf(rho)).collect()
            }
            Self::Exponential => linspace(most.ln(), least.ln(), n).map(f64::exp).collect(),
        })
    }
}
