//! Exponential moving averages of parameters.

use serde::Serialize;
use tch::Tensor;

use super::Parameters;
use super::optimizer::{Saved, count, fraction, not_negative};
use crate::{Error, Result};

/// How fast an average follows, as diffusers' `EMAModel`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EmaConfig {
    /// The share of the average that a step keeps, at most; in 0 ≤ d < 1. Default 0.9999.
    pub decay: f64,
    /// The share that it keeps at least; at most `decay`. Default 0.
    pub min_decay: f64,
    /// Updates for which the average is the parameters themselves. Default 0.
    pub update_after_step: u64,
    /// How the share grows to `decay`.
    pub warmup: EmaWarmup,
}

/// How the share that is kept grows; n counts updates after the first, and after `update_after_step`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EmaWarmup {
    /// `decay` from the first update on.
    None,
    /// (1 + n) / (10 + n); 0 at the first update.
    Ramp,
    /// 1 − (1 + n / `inverse_gamma`)^−`power`; 0 at the first update. diffusers' `use_ema_warmup`, with 1 and 2/3.
    Power {
        /// γ⁻¹; > 0.
        inverse_gamma: f64,
        /// The exponent; > 0.
        power: f64,
    },
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.9999, min_decay: 0.0, update_after_step: 0, warmup: EmaWarmup::Ramp }
    }
}

impl EmaConfig {
    fn check(&self) -> Result<()> {
        fraction("EMA: decay", self.decay)?;
        not_negative("EMA: min_decay", self.min_decay)?;
        if self.min_decay > self.decay {
            let expected = format!("at most the decay, {}", self.decay);
            return Err(Error::value("EMA: min_decay", expected, self.min_decay));
        }
        if let EmaWarmup::Power { inverse_gamma, power } = self.warmup
            && !(inverse_gamma.is_finite() && inverse_gamma > 0.0 && power.is_finite() && power > 0.0)
        {
            let found = format!("{inverse_gamma} and {power}");
            return Err(Error::value("EMA: inverse gamma and power", "finite numbers > 0", found));
        }
        Ok(())
    }

    /// The share that update `number`, counted from 1, keeps.
    #[must_use]
    pub fn decay_at(&self, number: u64) -> f64 {
        let after = number.saturating_sub(self.update_after_step.saturating_add(1)) as f64;
        let grown = match self.warmup {
            EmaWarmup::None if number > self.update_after_step => return self.decay,
            _ if after == 0.0 => return 0.0,
            EmaWarmup::None => return self.decay,
            EmaWarmup::Ramp => (1.0 + after) / (10.0 + after),
            EmaWarmup::Power { inverse_gamma, power } => 1.0 - (1.0 + after / inverse_gamma).powf(-power),
        };
        grown.min(self.decay).max(self.min_decay)
    }
}

/// Exponential moving averages of the parameters that are trained: a ← d a + (1 − d) p after each step (Polyak & Juditsky
/// 1992 average alike; with d that grows as diffusers has it).
pub struct Ema {
    parameters: Parameters,
    config: EmaConfig,
    /// One for each parameter that is not frozen.
    averages: Vec<Option<Tensor>>,
    updates: u64,
}

impl Ema {
    /// Averages that begin at the parameters as they are.
    ///
    /// # Errors
    /// [`Error::Value`] for settings outside their ranges.
    pub fn new(parameters: &Parameters, config: EmaConfig) -> Result<Self> {
        config.check()?;
        let _no_gradients = tch::no_grad_guard();
        let averages = parameters
            .iter()
            .map(|parameter| {
                if parameter.group.frozen {
                    return Ok(None);
                }
                let mut average = parameter.value.f_detach()?.f_empty_like()?;
                average.f_copy_(&parameter.value)?;
                Ok(Some(average))
            })
            .collect::<Result<_>>()?;
        Ok(Self { parameters: parameters.share(), config, averages, updates: 0 })
    }

    /// How it follows.
    pub fn config(&self) -> &EmaConfig {
        &self.config
    }

    /// Follows the parameters: to be called after each step of the optimizer.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn update(&mut self) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        self.updates += 1;
        let new = 1.0 - self.config.decay_at(self.updates);
        for (parameter, average) in self.parameters.iter().zip(&mut self.averages) {
            if let Some(average) = average {
                let _ = average.f_lerp_(&parameter.value, new)?;
            }
        }
        Ok(())
    }

    /// Exchanges the values of parameters and averages. A second time puts all back.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn swap(&mut self) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        for (parameter, average) in self.parameters.iter().zip(&mut self.averages) {
            if let Some(average) = average {
                let mut before = average.f_empty_like()?;
                before.f_copy_(&parameter.value)?;
                parameter.value.shallow_clone().f_copy_(average)?;
                *average = before;
            }
        }
        Ok(())
    }

    /// Runs `f` with the averages for parameters, and puts these back, also if it fails.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with_averages<R>(&mut self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        self.swap()?;
        let result = f();
        self.swap()?;
        result
    }

    /// Averages by the names of the parameters.
    pub fn averages(&self) -> Vec<(String, Tensor)> {
        let named = self.parameters.iter().zip(&self.averages);
        named.filter_map(|(p, average)| Some((p.name.clone(), average.as_ref()?.shallow_clone()))).collect()
    }

    /// What it remembers, by name. Handles, no copies.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let named = self.averages().into_iter().map(|(name, average)| (format!("average.{name}"), average));
        let mut state: Vec<_> = named.collect();
        state.push(("updates".into(), count(self.updates)?));
        Ok(state)
    }

    /// Takes up a state. Nothing changes unless all fits.
    ///
    /// # Errors
    /// [`Error::Keys`], [`Error::Shape`], [`Error::Kind`], [`Error::Value`].
    pub fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        let mut saved = Saved::new("state of the averages", state);
        let named = self.parameters.iter().zip(&self.averages);
        let averages = named
            .map(|(p, average)| average.as_ref().map(|like| saved.take("average", &p.name, like)).transpose())
            .collect::<Result<_>>()?;
        let updates = saved.count("updates")?;
        saved.finish()?;
        (self.averages, self.updates) = (averages, updates);
        Ok(())
    }
}
