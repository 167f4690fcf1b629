//! AdamW.

use serde::Serialize;
use tch::Tensor;

use super::optimizer::{Saved, check_step, count, decay, fraction, not_negative, scaled};
use super::{Gradients, Optimizer, Parameter, Parameters};
use crate::Result;
use crate::sys::{AdamWUpdate, adamw};

/// Settings of [`AdamW`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AdamWConfig {
    /// β₁, the share of the mean that is kept; in 0 ≤ β₁ < 1. Default 0.9.
    pub beta1: f64,
    /// β₂, the share of the mean square that is kept; in 0 ≤ β₂ < 1. Default 0.999.
    pub beta2: f64,
    /// ε; ≥ 0. Default 10⁻⁸.
    pub epsilon: f64,
    /// λ, for parameters whose group has none of its own; ≥ 0. Default 0.01.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, as
/// PyTorch has it: the decay is multiplied by the rate):
///
/// ```text
/// p ← p − η λ p
/// m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
/// p ← p − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
/// ```
///
/// t counts the gradients of a parameter, not the steps of the optimizer. State: twice the parameters. A step is one pass
/// over memory on the CPU, ten on other devices.
pub struct AdamW {
    parameters: Parameters,
    config: AdamWConfig,
    moments: Vec<Option<Moments>>,
}

/// What is remembered of a parameter, from its first gradient on.
struct Moments {
    steps: u64,
    mean: Tensor,
    square: Tensor,
}

impl AdamW {
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for settings outside their ranges.
    pub fn new(parameters: &Parameters, config: AdamWConfig) -> Result<Self> {
        fraction("AdamW: beta1", config.beta1)?;
        fraction("AdamW: beta2", config.beta2)?;
        not_negative("AdamW: epsilon", config.epsilon)?;
        not_negative("AdamW: weight decay", config.weight_decay)?;
        let moments = parameters.iter().map(|_| None).collect();
        Ok(Self { parameters: parameters.share(), config, moments })
    }
}

impl AdamWConfig {
    fn update(
        &self,
        parameter: &Parameter,
        (gradient, scale): (&Tensor, f64),
        at: &mut Moments,
        rate: f64,
    ) -> Result<()> {
        let rate = rate * parameter.group.rate;
        let mut pull = rate * parameter.group.weight_decay.unwrap_or(self.weight_decay);
        if parameter.group.decay_touched_rows {
            decay(parameter, gradient, std::mem::take(&mut pull))?;
        }
        at.steps += 1;
        let steps = at.steps as f64;
        let (short1, short2) = (1.0 - self.beta1.powf(steps), 1.0 - self.beta2.powf(steps));
        let (rate, correction) = (rate / short1, 1.0 / short2.sqrt());
        let update = AdamWUpdate {
            scale: scale as f32,
            decay: (1.0 - pull) as f32,
            new1: (1.0 - self.beta1) as f32,
            kept2: self.beta2 as f32,
            new2: (1.0 - self.beta2) as f32,
            rate: rate as f32,
            correction: correction as f32,
            epsilon: self.epsilon as f32,
        };
        if adamw([&parameter.value, &at.mean, &at.square], gradient, &update)? {
            return Ok(());
        }
        let (mut value, gradient) = (parameter.value.shallow_clone(), scaled(gradient, scale)?);
        let _ = value.f_mul_scalar_(1.0 - pull)?;
        let _ = at.mean.f_lerp_(&gradient, 1.0 - self.beta1)?;
        let square = gradient.f_mul(&gradient)?.f_mul_scalar_(1.0 - self.beta2)?;
        let _ = at.square.f_mul_scalar_(self.beta2)?.f_add_(&square)?;
        let deviation = at.square.f_sqrt()?.f_mul_scalar_(correction)?.f_add_scalar_(self.epsilon)?;
        let _ = value.f_sub_(&at.mean.f_div(&deviation)?.f_mul_scalar_(rate)?)?;
        Ok(())
    }
}

impl Optimizer for AdamW {
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        check_step(&self.parameters, gradients, learning_rate)?;
        let _no_gradients = tch::no_grad_guard();
        for (number, (parameter, moments)) in self.parameters.iter().zip(&mut self.moments).enumerate() {
            let Some(gradient) = gradients.get(number) else { continue };
            let at = match moments {
                Some(at) => at,
                None => moments.insert(Moments::zeros(parameter)?),
            };
            self.config.update(parameter, gradient, at, learning_rate)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::with_capacity(3 * self.moments.len());
        for (Parameter { name, .. }, moments) in self.parameters.iter().zip(&self.moments) {
            let Some(Moments { steps, mean, square }) = moments else { continue };
            state.push((format!("step.{name}"), count(*steps)?));
            state.push((format!("exp_avg.{name}"), mean.shallow_clone()));
            state.push((format!("exp_avg_sq.{name}"), square.shallow_clone()));
        }
        Ok(state)
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let mut saved = Saved::new("state of AdamW", state);
        let mut moments = Vec::with_capacity(self.moments.len());
        for Parameter { name, value, group } in self.parameters.iter() {
            let known = ["step", "exp_avg", "exp_avg_sq"].iter().any(|key| saved.has(key, name));
            moments.push(if known && !group.frozen {
                Some(Moments {
                    steps: saved.count(&format!("step.{name}"))?,
                    mean: saved.take("exp_avg", name, value)?,
                    square: saved.take("exp_avg_sq", name, value)?,
                })
            } else {
                None
            });
        }
        saved.finish()?;
        self.moments = moments;
        Ok(())
    }

    fn configuration(&self) -> serde_json::Value {
        serde_json::json!({ "AdamW": self.config })
    }
}

impl Moments {
    fn zeros(parameter: &Parameter) -> Result<Self> {
        let zeros = || parameter.value.f_zeros_like();
        Ok(Self { steps: 0, mean: zeros()?, square: zeros()? })
    }
}
