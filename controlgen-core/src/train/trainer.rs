//! The loop.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::gradients::{finite, scalar};
use super::order::Order;
use super::{Batch, Ema, Gradients, Optimizer, StepReport, Summary, Task, TrainerConfig, Watch};
use crate::noise::Noise;
use crate::progress::{CancelToken, Flow};
use crate::{EnableGrad, Error, Result};

/// Runs the steps of a task.
///
/// A step takes the next `batch_size` · `accumulation` examples, computes the loss batch by batch, and moves the
/// parameters along the gradient of the mean over all of its examples.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::progress::CancelToken;
/// use controlgen_core::train::{
///     AdamW, AdamWConfig, Batch, Loss, Parameters, Schedule, Task, Trainer, TrainerConfig,
/// };
/// use tch::{Kind, Tensor, kind::FLOAT_CPU};
///
/// /// A line through points.
/// struct Line { x: Tensor, y: Tensor, slope: Tensor }
///
/// impl Task for Line {
///     fn examples(&self) -> usize { self.x.numel() }
///     fn loss(&mut self, batch: Batch<'_>) -> controlgen_core::Result<Loss> {
///         let rows: Vec<i64> = batch.examples.iter().map(|&i| i as i64).collect();
///         let rows = Tensor::f_from_slice(&rows)?;
///         let (x, y) = (self.x.f_index_select(0, &rows)?, self.y.f_index_select(0, &rows)?);
///         Ok(x.f_mul(&self.slope)?.f_sub(&y)?.f_square()?.f_mean(None::<Kind>)?.into())
///     }
/// }
///
/// let slope = Tensor::zeros([1], FLOAT_CPU).set_requires_grad(true);
/// let x = Tensor::linspace(-1.0, 1.0, 100, FLOAT_CPU);
/// let mut line = Line { y: &x * 3.0, x, slope: slope.shallow_clone() };
/// let optimizer = AdamW::new(&Parameters::new(vec![("slope".into(), slope.shallow_clone())])?, AdamWConfig::default())?;
/// let config = TrainerConfig::new(200, 10, Schedule::linear(0.1, 200)?);
/// let summary = Trainer::new(config, optimizer)?.run(&mut line, &mut (), &CancelToken::new())?;
/// assert!(summary.finished && (slope.double_value(&[0]) - 3.0).abs() < 0.1);
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    pub(super) config: TrainerConfig,
    pub(super) optimizer: Box<dyn Optimizer>,
    pub(super) ema: Option<Ema>,
    /// Steps done.
    pub(super) step: u64,
    pub(super) skipped: u64,
    /// The last losses and norms, for spikes.
    pub(super) last: [Vec<f64>; 2],
    pub(super) best: Option<(u64, f64)>,
    /// The step of the directory's last checkpoint, if this run wrote it or was resumed from it.
    pub(super) saved: Option<u64>,
}

/// What the forward and backward passes of a step gave.
struct Passes {
    loss: f64,
    metrics: Vec<(String, f64)>,
    gradients: Gradients,
}

impl Trainer {
    /// A run that has not begun.
    ///
    /// # Errors
    /// [`Error::Value`] for settings outside their ranges.
    pub fn new(config: TrainerConfig, optimizer: impl Optimizer + 'static) -> Result<Self> {
        Self::boxed(config, Box::new(optimizer))
    }

    /// The same of an optimizer whose type is not known.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn boxed(config: TrainerConfig, optimizer: Box<dyn Optimizer>) -> Result<Self> {
        config.check()?;
        let ema = config.ema.map(|ema| Ema::new(optimizer.parameters(), ema)).transpose()?;
        Ok(Self {
            config,
            optimizer,
            ema,
            step: 0,
            skipped: 0,
            last: Default::default(),
            best: None,
            saved: None,
        })
    }

    /// The settings.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// How many steps are done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The averages, if the run keeps them.
    pub fn ema(&mut self) -> Option<&mut Ema> {
        self.ema.as_mut()
    }

    /// Runs the steps that are left, or until it is stopped.
    ///
    /// # Errors
    /// [`Error::Value`] for a task without examples, when spikes stop the run, and for a directory that holds the
    /// checkpoint of a run that was not [resumed](Self::resume); [`Error::NotFinite`], with the step,
    /// for a loss or a norm of the gradients that is no number: no parameter has been moved by it, and if there is a
    /// checkpoint, this run stands at it again; [`Error::Io`] where nothing can be written, in which case the checkpoint
    /// before is as it was; [`Error::Shape`] and [`Error::NotDifferentiable`] for a loss that is none; the task's own.
    pub fn run(
        &mut self,
        task: &mut dyn Task,
        watch: &mut dyn Watch,
        cancel: &CancelToken,
    ) -> Result<Summary> {
        let TrainerConfig { batch_size, accumulation, seed, shuffle, drop_last, steps, .. } = self.config;
        let a_step = batch_size.saturating_mul(accumulation);
        let mut order = Order::new(task.examples(), a_step, seed, shuffle, drop_last)?;
        let mut metrics = self.metrics()?;
        let (began, first) = (Instant::now(), self.step);
        let mut loss = f64::NAN;
        while self.step < steps {
            let done = self.update(task, &mut order).and_then(|mut report| {
                self.after(task, &mut report, &mut metrics)?;
                Ok(report)
            });
            let mut report = done.map_err(|error| self.stopped(error))?;
            loss = report.loss;
            let seconds = began.elapsed().as_secs_f64();
            report.rate = if seconds > 0.0 { (self.step - first) as f64 / seconds } else { 0.0 };
            let left = (steps - self.step) as f64 / report.rate;
            report.left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
            let flow = watch.step(&report);
            if flow == Flow::Stop || cancel.is_cancelled() {
                break;
            }
        }
        if self.config.directory.is_some() && self.saved != Some(self.step) {
            self.save(task).map_err(|error| self.stopped(error))?;
        }
        let (finished, skipped, best) = (self.step >= steps, self.skipped, self.best);
        Ok(Summary { steps: self.step, finished, skipped, loss, best })
    }

    /// Forward, backward and update.
    fn update(&mut self, task: &mut dyn Task, order: &mut Order) -> Result<StepReport> {
        let step = self.step;
        let (epoch, examples) = order.step(step);
        let Passes { loss, metrics, mut gradients } = self.passes(task, epoch, examples)?;
        if let Some(most) = self.config.clip_value {
            gradients.clip_value(most)?;
        }
        let gradient_norm = gradients.norm()?;
        finite("norm of the gradients", &format!("step {step}"), gradient_norm)?;
        if let Some(most) = self.config.clip_norm {
            gradients.clip_to(gradient_norm, most);
        }
        let learning_rate = self.config.schedule.at(step);
        let skipped = self.is_spike(loss, gradient_norm)?;
        if !skipped {
            self.optimizer.step(&gradients, learning_rate)?;
            self.ema.as_mut().map_or(Ok(()), Ema::update)?;
        }
        self.step += 1;
        Ok(StepReport {
            step,
            steps: self.config.steps,
            epoch,
            loss,
            gradient_norm,
            learning_rate,
            skipped,
            metrics,
            evaluation: None,
            rate: 0.0,
            left: Duration::MAX,
        })
    }

    /// The loss of a step's examples and its gradients, batch by batch.
    fn passes(&self, task: &mut dyn Task, epoch: u64, examples: &[usize]) -> Result<Passes> {
        let (step, parameters) = (self.step, self.optimizer.parameters());
        let mut found = Passes { loss: 0.0, metrics: Vec::new(), gradients: Gradients::none(parameters) };
        for (number, batch) in examples.chunks(self.config.batch_size).enumerate() {
            let sample = step.wrapping_mul(self.config.accumulation as u64).wrapping_add(number as u64);
            let mut stream = Noise::seeded(self.config.seed).stream(sample);
            let share = batch.len() as f64 / examples.len() as f64;
            let _gradients = EnableGrad::new();
            let loss = task.loss(Batch { examples: batch, step, epoch, stream: &mut stream })?;
            let value = scalar(&loss.value)?;
            finite("loss", &format!("step {step}"), value)?;
            found.loss += share * value;
            if number == 0 {
                found.metrics = loss.metrics.iter().map(|(name, _)| (name.clone(), 0.0)).collect();
            }
            if found.metrics.iter().map(|(name, _)| name).ne(loss.metrics.iter().map(|(name, _)| name)) {
                let names = |of: &[(String, f64)]| {
                    format!("{:?}", of.iter().map(|(name, _)| name).collect::<Vec<_>>())
                };
                return Err(Error::value("names of metrics", names(&found.metrics), names(&loss.metrics)));
            }
            for ((_, sum), (_, value)) in found.metrics.iter_mut().zip(&loss.metrics) {
                *sum += share * value;
            }
            let weighted: Tensor = if share == 1.0 { loss.value } else { loss.value.f_mul_scalar(share)? };
            found.gradients.add(&weighted, parameters)?;
        }
        Ok(found)
    }

    /// Whether a step is to be skipped. Its numbers are remembered.
    fn is_spike(&mut self, loss: f64, norm: f64) -> Result<bool> {
        let Some(spikes) = self.config.spikes else { return Ok(false) };
        let mut found = None;
        for ((what, value), last) in
            [("loss", loss), ("norm of the gradients", norm)].into_iter().zip(&mut self.last)
        {
            let most = spikes.most(last);
            spikes.remember(last, value);
            if value > most && found.is_none() {
                found = Some((what, most, value));
            }
        }
        let Some((what, most, value)) = found else { return Ok(false) };
        self.skipped += 1;
        tracing::warn!(step = self.step, value, most, "{what}: a spike; the step is skipped");
        if spikes.stop_after.is_some_and(|bound| self.skipped >= bound) {
            let (what, expected) = (format!("{what} at step {}", self.step), format!("at most {most}"));
            return Err(Error::value(what, expected, format!("{value}, spike number {}", self.skipped)));
        }
        Ok(true)
    }
}
