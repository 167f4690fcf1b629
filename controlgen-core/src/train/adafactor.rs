//! Adafactor.

use serde::Serialize;
use tch::{Kind, Tensor};

use super::optimizer::{Saved, check_step, count, decay, fraction, not_negative, scaled};
use super::{Gradients, Optimizer, Parameter, Parameters};
use crate::{Error, Result};

/// Settings of [`Adafactor`]; the defaults are transformers'.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AdafactorConfig {
    /// ε₁, added to squared gradients; ≥ 0. Default 10⁻³⁰.
    pub epsilon1: f64,
    /// ε₂, the least scale of a parameter; ≥ 0. Default 10⁻³.
    pub epsilon2: f64,
    /// d, the root mean square that an update is clipped to; > 0. Default 1.
    pub clip_threshold: f64,
    /// β̂₂ₜ = 1 − t^`decay_rate`; < 0. Default −0.8.
    pub decay_rate: f64,
    /// β₁, the share of the mean update that is kept; `None` for no momentum, and no memory of it.
    pub beta1: Option<f64>,
    /// λ, for parameters whose group has none of its own; ≥ 0. Default 0.
    pub weight_decay: f64,
    /// Multiplies the rate by the root mean square of the parameter, or ε₂ if that is more.
    pub scale_parameter: bool,
    /// Takes the rate min(10⁻², 1/√t), which the learning rate of a step multiplies: give 1.
    pub relative_step: bool,
    /// With `relative_step`: min(10⁻⁶ t, 1/√t).
    pub warmup_init: bool,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self {
            epsilon1: 1e-30,
            epsilon2: 1e-3,
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        }
    }
}

impl AdafactorConfig {
    /// With a learning rate of one's own: no relative steps, parameters scaled. At 3·10⁻³ it is what T-Few is trained
    /// with (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    /// Learning").
    #[must_use]
    pub fn absolute() -> Self {
        Self { relative_step: false, ..Self::default() }
    }
}

/// Adafactor (Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithm 6, as
/// transformers has it). Of a matrix, or more dimensions, only the means of the squared gradients' rows and columns are
/// kept:
///
/// ```text
/// u = g² + ε₁
/// R ← β̂₂ R + (1 − β̂₂) mean_columns(u),    C ← β̂₂ C + (1 − β̂₂) mean_rows(u)
/// U = g / √(R C / mean(R))                 (of a vector: V ← β̂₂ V + (1 − β̂₂) u, U = g / √V)
/// U ← U / max(1, RMS(U) / d)
/// p ← p − α U,    α = η · max(ε₂, RMS(p))  with `scale_parameter`, else η
/// ```
///
/// With β₁, α U is averaged: M ← β₁ M + (1 − β₁) α U, p ← p − M. Weight decay is decoupled: p ← p − α λ p before the
/// update. State: a row and a column for a matrix.
pub struct Adafactor {
    parameters: Parameters,
    config: AdafactorConfig,
    moments: Vec<Option<Moments>>,
}

/// What is remembered of a parameter, from its first gradient on.
struct Moments {
    steps: u64,
    square: Square,
    mean: Option<Tensor>,
}

enum Square {
    /// `[.., rows]` and `[.., columns]`
    Factored { row: Tensor, column: Tensor },
    /// Of the parameter's shape.
    Whole(Tensor),
}

impl Adafactor {
    /// # Errors
    /// [`Error::Value`] for settings outside their ranges, and for `warmup_init` without `relative_step`.
    pub fn new(parameters: &Parameters, config: AdafactorConfig) -> Result<Self> {
        not_negative("Adafactor: epsilon1", config.epsilon1)?;
        not_negative("Adafactor: epsilon2", config.epsilon2)?;
        not_negative("Adafactor: weight decay", config.weight_decay)?;
        if !config.clip_threshold.is_finite() || config.clip_threshold <= 0.0 {
            return Err(Error::value(
                "Adafactor: clip threshold",
                "a finite number > 0",
                config.clip_threshold,
            ));
        }
        if !config.decay_rate.is_finite() || config.decay_rate >= 0.0 {
            return Err(Error::value("Adafactor: decay rate", "a finite number < 0", config.decay_rate));
        }
        if let Some(beta1) = config.beta1 {
            fraction("Adafactor: beta1", beta1)?;
        }
        if config.warmup_init && !config.relative_step {
            return Err(Error::value("Adafactor: warmup_init", "relative_step with it", "no relative_step"));
        }
        let moments = parameters.iter().map(|_| None).collect();
        Ok(Self { parameters: parameters.share(), config, moments })
    }
}

impl AdafactorConfig {
    /// α of step `steps`, counted from 1.
    fn rate(&self, value: &Tensor, steps: f64, learning_rate: f64) -> Result<f64> {
        let relative = match (self.relative_step, self.warmup_init) {
            (false, _) => 1.0,
            (true, false) => (1.0 / steps.sqrt()).min(1e-2),
            (true, true) => (1.0 / steps.sqrt()).min(1e-6 * steps),
        };
        let scale = if self.scale_parameter {
            root_mean_square(value)?.f_double_value(&[])?.max(self.epsilon2)
        } else {
            1.0
        };
        Ok(learning_rate * relative * scale)
    }

    fn update(&self, parameter: &Parameter, gradient: &Tensor, at: &mut Moments, rate: f64) -> Result<()> {
        let mut value = parameter.value.shallow_clone();
        at.steps += 1;
        let steps = at.steps as f64;
        let rate = self.rate(&value, steps, rate * parameter.group.rate)?;
        let kept = 1.0 - steps.powf(self.decay_rate);
        let square = gradient.f_mul(gradient)?.f_add_scalar_(self.epsilon1)?;
        let average = |mean: &mut Tensor, new: &Tensor| -> Result<()> {
            let _ = mean.f_mul_scalar_(kept)?.f_add_(&new.f_mul_scalar(1.0 - kept)?)?;
            Ok(())
        };
        let mut update = match &mut at.square {
            Square::Factored { row, column } => {
                average(row, &mean(&square, -1)?)?;
                average(column, &mean(&square, -2)?)?;
                let row = row.f_div(&row.f_mean_dim([-1i64].as_slice(), true, None::<Kind>)?)?;
                let (row, column) = (row.f_rsqrt()?.f_unsqueeze(-1)?, column.f_rsqrt()?.f_unsqueeze(-2)?);
                row.f_mul(&column)?.f_mul_(gradient)?
            }
            Square::Whole(mean) => {
                average(mean, &square)?;
                mean.f_rsqrt()?.f_mul_(gradient)?
            }
        };
        let clip = root_mean_square(&update)?.f_mul_scalar(1.0 / self.clip_threshold)?.f_clamp_min(1.0)?;
        update = update.f_div_(&clip)?.f_mul_scalar_(rate)?;
        if let (Some(beta1), Some(mean)) = (self.beta1, &mut at.mean) {
            let _ = mean.f_mul_scalar_(beta1)?.f_add_(&update.f_mul_scalar_(1.0 - beta1)?)?;
            update = mean.shallow_clone();
        }
        let lambda = parameter.group.weight_decay.unwrap_or(self.weight_decay);
        decay(parameter, gradient, rate * lambda)?;
        let _ = value.f_sub_(&update)?;
        Ok(())
    }

    fn zeros(&self, value: &Tensor) -> Result<Moments> {
        let square = if value.dim() < 2 {
            Square::Whole(value.f_zeros_like()?)
        } else {
            Square::Factored { row: mean(value, -1)?.f_zero_()?, column: mean(value, -2)?.f_zero_()? }
        };
        let mean = self.beta1.map(|_| value.f_zeros_like()).transpose()?;
        Ok(Moments { steps: 0, square, mean })
    }
}

fn mean(of: &Tensor, dimension: i64) -> Result<Tensor> {
    Ok(of.f_mean_dim([dimension].as_slice(), false, None::<Kind>)?)
}

/// √mean(x²), of no dimension.
fn root_mean_square(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_norm()?.f_mul_scalar(1.0 / (x.numel().max(1) as f64).sqrt())?)
}

impl Optimizer for Adafactor {
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        check_step(&self.parameters, gradients, learning_rate)?;
        let _no_gradients = tch::no_grad_guard();
        for (number, (parameter, moments)) in self.parameters.iter().zip(&mut self.moments).enumerate() {
            let Some((gradient, scale)) = gradients.get(number) else { continue };
            let at = match moments {
                Some(at) => at,
                None => moments.insert(self.config.zeros(&parameter.value)?),
            };
            self.config.update(parameter, &scaled(gradient, scale)?, at, learning_rate)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::with_capacity(4 * self.moments.len());
        for (Parameter { name, .. }, moments) in self.parameters.iter().zip(&self.moments) {
            let Some(Moments { steps, square, mean }) = moments else { continue };
            let mut push = |key: &str, tensor: &Tensor| {
                state.push((format!("{key}.{name}"), tensor.shallow_clone()));
            };
            push("step", &count(*steps)?);
            match square {
                Square::Factored { row, column } => {
                    push("exp_avg_sq_row", row);
                    push("exp_avg_sq_col", column);
                }
                Square::Whole(square) => push("exp_avg_sq", square),
            }
            if let Some(mean) = mean {
                push("exp_avg", mean);
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        const KEYS: [&str; 5] = ["step", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"];
        let _no_gradients = tch::no_grad_guard();
        let mut saved = Saved::new("state of Adafactor", state);
        let mut moments = Vec::with_capacity(self.moments.len());
        for Parameter { name, value, group } in self.parameters.iter() {
            if group.frozen || KEYS.iter().all(|key| !saved.has(key, name)) {
                moments.push(None);
                continue;
            }
            let zeros = self.config.zeros(value)?;
            let square = match zeros.square {
                Square::Factored { row, column } => Square::Factored {
                    row: saved.take("exp_avg_sq_row", name, &row)?,
                    column: saved.take("exp_avg_sq_col", name, &column)?,
                },
                Square::Whole(whole) => Square::Whole(saved.take("exp_avg_sq", name, &whole)?),
            };
            let mean = zeros.mean.map(|mean| saved.take("exp_avg", name, &mean)).transpose()?;
            moments.push(Some(Moments { steps: saved.count(&format!("step.{name}"))?, square, mean }));
        }
        saved.finish()?;
        self.moments = moments;
        Ok(())
    }

    fn configuration(&self) -> serde_json::Value {
        serde_json::json!({ "Adafactor": self.config })
    }
}
