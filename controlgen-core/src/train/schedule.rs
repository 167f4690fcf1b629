//! Schedules of learning rates.

use std::f64::consts::PI;

use serde::Serialize;

use super::optimizer::not_negative;
use crate::{Error, Result};

/// The learning rate as a function of the step, counted from 0, as transformers' `get_*_schedule_with_warmup` have it.
///
/// During w steps of warm-up it is the peak times step / w, so 0 at the first step. Then, with x from 0 to 1 between
/// there and the last step n:
///
/// | | times the peak |
/// |---|---|
/// | constant | 1 |
/// | linear | 1 − x |
/// | cosine | ½ (1 + cos 2π c x), with c = ½ waves unless said otherwise |
///
/// From step n on, a linear rate is 0, and so is a cosine of half a wave.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::train::Schedule;
///
/// let schedule = Schedule::linear(3e-3, 1000)?.with_warmup(60)?;
/// assert_eq!(schedule.at(0), 0.0);
/// assert_eq!(schedule.at(60), 3e-3);
/// assert_eq!(schedule.at(530), 1.5e-3);
/// assert_eq!(schedule.at(1000), 0.0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Schedule {
    peak: f64,
    warmup: u64,
    decay: Decay,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Decay {
    Constant,
    Linear { steps: u64 },
    Cosine { steps: u64, waves: f64 },
}

impl Schedule {
    /// Always the same rate.
    ///
    /// # Errors
    /// [`Error::Value`] for a rate that is negative or no number.
    pub fn constant(rate: f64) -> Result<Self> {
        Self::new(rate, Decay::Constant)
    }

    /// Down to 0 at step `steps`, in a straight line.
    ///
    /// # Errors
    /// [`Error::Value`] for a rate that is negative or no number.
    pub fn linear(peak: f64, steps: u64) -> Result<Self> {
        Self::new(peak, Decay::Linear { steps })
    }

    /// Down to 0 at step `steps`, along half a cosine (Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with
    /// Warm Restarts", equation 5).
    ///
    /// # Errors
    /// [`Error::Value`] for a rate that is negative or no number.
    pub fn cosine(peak: f64, steps: u64) -> Result<Self> {
        Self::new(peak, Decay::Cosine { steps, waves: 0.5 })
    }

    /// [`cosine`](Self::cosine) with another number of waves than a half.
    ///
    /// # Errors
    /// [`Error::Value`] for a rate or a number that is negative or no number.
    pub fn cosine_waves(peak: f64, steps: u64, waves: f64) -> Result<Self> {
        not_negative("waves of the schedule", waves)?;
        Self::new(peak, Decay::Cosine { steps, waves })
    }

    fn new(peak: f64, decay: Decay) -> Result<Self> {
        not_negative("learning rate", peak)?;
        Ok(Self { peak, warmup: 0, decay })
    }

    /// The same with so many steps of warm-up, which are the first of its steps.
    ///
    /// # Errors
    /// [`Error::Value`] for more than there are steps.
    pub fn with_warmup(self, warmup: u64) -> Result<Self> {
        match self.decay {
            Decay::Linear { steps } | Decay::Cosine { steps, .. } if warmup > steps => Err(Error::value(
                "steps of warm-up",
                format!("at most {steps}, which the schedule has"),
                warmup,
            )),
            _ => Ok(Self { warmup, ..self }),
        }
    }

    /// The learning rate of a step, counted from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let (now, warmup) = (step as f64, self.warmup as f64);
        if step < self.warmup {
            return self.peak * now / warmup;
        }
        let left = |steps: u64| {
            (steps.saturating_sub(step)) as f64 / (steps.saturating_sub(self.warmup).max(1)) as f64
        };
        let factor = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear { steps } => left(steps),
            Decay::Cosine { steps, waves } => {
                let x = (now - warmup) / (steps.saturating_sub(self.warmup).max(1)) as f64;
                // transformers lets a cosine rise again after its last step.
                (0.5 * (1.0 + (PI * 2.0 * waves * x.min(1.0)).cos())).max(0.0)
            }
        };
        self.peak * factor
    }
}
