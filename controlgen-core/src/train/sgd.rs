//! Stochastic gradient descent.

use serde::Serialize;
use tch::Tensor;

use super::optimizer::{Saved, check_step, not_negative, scaled, touched};
use super::{Gradients, Optimizer, Parameter, Parameters};
use crate::sys::{SgdUpdate, sgd};
use crate::{Error, Result};

/// Settings of [`Sgd`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SgdConfig {
    /// μ; ≥ 0. Default 0.
    pub momentum: f64,
    /// δ, the share of a gradient that the momentum leaves out. Default 0.
    pub dampening: f64,
    /// Nesterov's momentum: needs μ > 0 and δ = 0.
    pub nesterov: bool,
    /// λ, for parameters whose group has none of its own; ≥ 0. Default 0.
    pub weight_decay: f64,
}

/// Stochastic gradient descent with momentum (Sutskever et al. 2013, "On the importance of initialization and momentum
/// in deep learning", as PyTorch has it: the rate is outside the momentum):
///
/// ```text
/// g ← g + λ p
/// b ← μ b + (1 − δ) g            (b ← g at first)
/// p ← p − η (g + μ b)  with Nesterov's momentum,  p ← p − η b  with momentum,  p ← p − η g  without
/// ```
///
/// State: with momentum as large as the parameters, without none.
pub struct Sgd {
    parameters: Parameters,
    config: SgdConfig,
    momentum: Vec<Option<Tensor>>,
}

const KEY: &str = "momentum_buffer";

impl Sgd {
    /// # Errors
    /// [`Error::Value`] for settings outside their ranges.
    pub fn new(parameters: &Parameters, config: SgdConfig) -> Result<Self> {
        not_negative("SGD: momentum", config.momentum)?;
        not_negative("SGD: weight decay", config.weight_decay)?;
        if !config.dampening.is_finite() {
            return Err(Error::value("SGD: dampening", "a finite number", config.dampening));
        }
        if config.nesterov && (config.momentum == 0.0 || config.dampening != 0.0) {
            let found = format!("momentum {} and dampening {}", config.momentum, config.dampening);
            return Err(Error::value("SGD: nesterov", "momentum > 0 and dampening 0", found));
        }
        let momentum = parameters.iter().map(|_| None).collect();
        Ok(Self { parameters: parameters.share(), config, momentum })
    }
}

impl SgdConfig {
    fn update(
        &self,
        parameter: &Parameter,
        (gradient, scale): (&Tensor, f64),
        momentum: &mut Option<Tensor>,
        rate: f64,
    ) -> Result<()> {
        let (mut value, rate) = (parameter.value.shallow_clone(), rate * parameter.group.rate);
        let lambda = parameter.group.weight_decay.unwrap_or(self.weight_decay);
        let in_rows = parameter.group.decay_touched_rows && lambda != 0.0;
        if self.momentum != 0.0 && !in_rows {
            let first = momentum.is_none();
            let buffer = match momentum {
                Some(buffer) => buffer,
                None => momentum.insert(value.f_zeros_like()?),
            };
            let update = SgdUpdate {
                scale: scale as f32,
                decay: lambda as f32,
                kept: if first { 0.0 } else { self.momentum as f32 },
                new: if first { 1.0 } else { (1.0 - self.dampening) as f32 },
                nesterov: self.nesterov.then_some(self.momentum as f32),
                rate: rate as f32,
            };
            if sgd([&value, buffer], gradient, &update)? {
                return Ok(());
            }
            if first {
                *momentum = None;
            }
        }
        let mut g = scaled(gradient, scale)?;
        if lambda != 0.0 {
            let mut pull = value.f_mul_scalar(lambda)?;
            if in_rows {
                let _ = pull.f_mul_(&touched(&g)?)?;
            }
            g = pull.f_add_(&g)?;
        }
        if self.momentum != 0.0 {
            let buffer = match momentum {
                Some(buffer) => {
                    let new = g.f_mul_scalar(1.0 - self.dampening)?;
                    let _ = buffer.f_mul_scalar_(self.momentum)?.f_add_(&new)?;
                    buffer
                }
                None => momentum.insert(copy_like(&value, &g)?),
            };
            g = if self.nesterov {
                g.f_add(&buffer.f_mul_scalar(self.momentum)?)?
            } else {
                buffer.shallow_clone()
            };
        }
        let _ = value.f_sub_(&g.f_mul_scalar(rate)?)?;
        Ok(())
    }
}

/// A copy that lies in memory as `like` does.
fn copy_like(like: &Tensor, from: &Tensor) -> Result<Tensor> {
    let mut to = like.f_empty_like()?;
    to.f_copy_(from)?;
    Ok(to)
}

impl Optimizer for Sgd {
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        check_step(&self.parameters, gradients, learning_rate)?;
        let _no_gradients = tch::no_grad_guard();
        for (number, (parameter, momentum)) in self.parameters.iter().zip(&mut self.momentum).enumerate() {
            let Some(gradient) = gradients.get(number) else { continue };
            self.config.update(parameter, gradient, momentum, learning_rate)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let named = self.parameters.iter().zip(&self.momentum);
        Ok(named
            .filter_map(|(p, buffer)| Some((format!("{KEY}.{}", p.name), buffer.as_ref()?.shallow_clone())))
            .collect())
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let mut saved = Saved::new("state of SGD", state);
        let mut momentum = Vec::with_capacity(self.momentum.len());
        for Parameter { name, value, group } in self.parameters.iter() {
            let known = saved.has(KEY, name) && !group.frozen && self.config.momentum != 0.0;
            momentum.push(if known { Some(saved.take(KEY, name, value)?) } else { None });
        }
        saved.finish()?;
        self.momentum = momentum;
        Ok(())
    }

    fn configuration(&self) -> serde_json::Value {
        serde_json::json!({ "SGD": self.config })
    }
}
