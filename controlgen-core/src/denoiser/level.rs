//! How much noise there is.

use crate::{Error, Result};

/// The level of noise of x = α x₀ + σ ε with ε ~ N(0, 1): two scalars in f64.
///
/// Diffusion keeps the variance, α² + σ² = 1 ([`Self::from_alpha_bar`]); rectified flow goes straight,
/// α + σ = 1 ([`Self::from_flow`]); variance-exploding models keep α = 1 ([`Self::from_sigma`]). The notation is that
/// of Kingma et al. 2021, *Variational Diffusion Models*.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevel {
    alpha: f64,
    sigma: f64,
}

impl NoiseLevel {
    /// No noise: α = 1, σ = 0.
    pub const CLEAN: Self = Self { alpha: 1.0, sigma: 0.0 };

    /// α and σ, both at least 0 and not both 0.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn new(alpha: f64, sigma: f64) -> Result<Self> {
        let fine = |x: f64| x.is_finite() && x >= 0.0;
        if !fine(alpha) || !fine(sigma) || alpha + sigma == 0.0 {
            let found = format!("{alpha} and {sigma}");
            return Err(Error::value("alpha and sigma", "finite numbers >= 0, not both 0", found));
        }
        Ok(Self { alpha, sigma })
    }

    /// α = √ᾱ, σ = √(1 − ᾱ) for ᾱ in 0 ..= 1 (Ho et al. 2020): an entry of `alphas_cumprod`.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn from_alpha_bar(alpha_bar: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&alpha_bar) {
            return Err(Error::value("alpha_bar", "0 ..= 1", alpha_bar));
        }
        Ok(Self { alpha: alpha_bar.sqrt(), sigma: (1.0 - alpha_bar).sqrt() })
    }

    /// α = 1 − t, σ = t for t in 0 ..= 1 (Liu et al. 2022; Lipman et al. 2022).
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn from_flow(t: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&t) {
            return Err(Error::value("flow time", "0 ..= 1", t));
        }
        Ok(Self { alpha: 1.0 - t, sigma: t })
    }

    /// α = 1 and this σ ≥ 0 (Song et al. 2021; Karras et al. 2022).
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn from_sigma(sigma: f64) -> Result<Self> {
        Self::new(1.0, sigma)
    }

    /// α: how much of the clean sample there is.
    pub fn alpha(self) -> f64 {
        self.alpha
    }

    /// σ: how much noise there is.
    pub fn sigma(self) -> f64 {
        self.sigma
    }

    /// ᾱ = α² / (α² + σ²), which for diffusion is α².
    pub fn alpha_bar(self) -> f64 {
        let (a, s) = (self.alpha * self.alpha, self.sigma * self.sigma);
        a / (a + s)
    }

    /// ln(α² / σ²), the log of the ratio of signal to noise: +∞ without noise.
    pub fn log_snr(self) -> f64 {
        2.0 * (self.alpha.ln() - self.sigma.ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        let level = NoiseLevel::from_alpha_bar(0.36).unwrap();
        assert_eq!((level.alpha(), level.sigma()), (0.6, 0.8));
        assert!((level.alpha_bar() - 0.36).abs() < 1e-15);
        assert!((level.log_snr() - (0.36f64 / 0.64).ln()).abs() < 1e-15);
        assert_eq!(NoiseLevel::from_alpha_bar(1.0).unwrap(), NoiseLevel::CLEAN);
        assert_eq!(NoiseLevel::from_flow(0.25).unwrap(), NoiseLevel::new(0.75, 0.25).unwrap());
        // A variance-exploding level is the diffusion level of the same ratio.
        assert!((NoiseLevel::from_sigma(2.0).unwrap().alpha_bar() - 0.2).abs() < 1e-15);
        assert_eq!(NoiseLevel::CLEAN.log_snr(), f64::INFINITY);
    }

    #[test]
    fn levels_out_of_range_are_refused() {
        for bad in [-0.1, 1.1, f64::NAN] {
            assert!(matches!(NoiseLevel::from_alpha_bar(bad), Err(Error::Value { .. })));
            assert!(matches!(NoiseLevel::from_flow(bad), Err(Error::Value { .. })));
        }
        assert!(NoiseLevel::new(0.0, 0.0).is_err() && NoiseLevel::from_sigma(-1.0).is_err());
        assert!(NoiseLevel::new(1.0, f64::INFINITY).is_err());
    }
}
