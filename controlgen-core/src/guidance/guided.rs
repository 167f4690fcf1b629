//! What guidance hands to the sampler.

use tch::Tensor;

use crate::{NoiseLevel, Prediction, Result};

/// A guided prediction.
///
/// The shift of the score by gradients is kept apart from the prediction, because samplers apply it each in its own
/// way: DDIM and the solvers of the probability-flow equation to ε, which [`Guided::epsilon`] and [`Guided::x0`] do
/// (Dhariwal & Nichol 2021, algorithm 2), ancestral DDPM to the mean, as μ + Σ · shift (their algorithm 1).
pub struct Guided {
    /// The x_t that this is a prediction of; a stage may have replaced part of the sampler's
    /// ([`Guidance::before`](super::Guidance::before)). Within a stage that needs gradients it is the leaf at which
    /// they are taken.
    pub x: Tensor,
    /// The prediction, combined of branches.
    pub prediction: Prediction,
    /// What gradients add to the score ∇ log p(x_t): −Σ s ∇E, of the shape of x.
    pub shift: Option<Tensor>,
}

impl Guided {
    /// Adds to the score: `shift` of the shape of x.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn shifted(self, shift: Tensor) -> Result<Self> {
        let shift = match self.shift {
            Some(so_far) => so_far.f_add(&shift)?,
            None => shift,
        };
        Ok(Self { shift: Some(shift), ..self })
    }

    /// ε of the prediction, less σ · shift.
    ///
    /// # Errors
    /// Those of [`Prediction::epsilon`].
    pub fn epsilon(&self, level: NoiseLevel) -> Result<Tensor> {
        let epsilon = self.prediction.epsilon(&self.x, level)?;
        match &self.shift {
            None => Ok(epsilon),
            Some(shift) => Ok(epsilon.f_sub(&shift.f_mul_scalar(level.sigma())?)?),
        }
    }

    /// x₀ of the prediction, plus (σ² / α) · shift: what [`Self::epsilon`] leaves of x.
    ///
    /// # Errors
    /// Those of [`Prediction::x0`]; [`Error::Value`](crate::Error::Value) for a shift where there is only noise.
    pub fn x0(&self, level: NoiseLevel) -> Result<Tensor> {
        let x0 = self.prediction.x0(&self.x, level)?;
        let Some(shift) = &self.shift else { return Ok(x0) };
        if level.alpha() == 0.0 {
            let what = "the noise at which a gradient shifts x0";
            return Err(crate::Error::value(what, "alpha > 0", level.alpha()));
        }
        Ok(x0.f_add(&shift.f_mul_scalar(level.sigma() * level.sigma() / level.alpha())?)?)
    }

    /// `clean` · x₀ + `noise` · ε of [`Self::x0`] and [`Self::epsilon`], at the cost of one of them: with α' and σ' of
    /// another level it is x there.
    ///
    /// # Errors
    /// Those of [`Prediction::mix`]; [`Error::Value`](crate::Error::Value) for a shift where there is only noise.
    pub fn mix(&self, level: NoiseLevel, clean: f64, noise: f64) -> Result<Tensor> {
        let mixed = self.prediction.mix(&self.x, level, clean, noise)?;
        let Some(shift) = &self.shift else { return Ok(mixed) };
        let (alpha, sigma) = (level.alpha(), level.sigma());
        if alpha == 0.0 {
            let what = "the noise at which a gradient shifts x0";
            return Err(crate::Error::value(what, "alpha > 0", alpha));
        }
        Ok(mixed.f_add(&shift.f_mul_scalar(sigma * (clean * sigma / alpha - noise))?)?)
    }
}
