//! The loop.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::gradients::scalar;
use super::order::{Order, steps_an_epoch};
use super::{Batch, Ema, EmaConfig, Gradients, Optimizer, Schedule, Spikes, Task};
use crate::noise::Noise;
use crate::progress::{CancelToken, Flow};
use crate::{EnableGrad, Error, Result};

/// Settings of a [`Trainer`].
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerConfig {
    /// How many steps the run has in all; see [`steps_an_epoch`](Self::steps_an_epoch).
    pub steps: u64,
    /// Examples of one forward pass; ≥ 1.
    pub batch_size: usize,
    /// Batches of one step, whose gradients are summed so that the step is that of one large batch; ≥ 1. Default 1.
    pub accumulation: usize,
    /// The learning rate.
    pub schedule: Schedule,
    /// The seed of the order of the examples, and of the random numbers of each batch. Default 0.
    pub seed: u64,
    /// Whether each epoch sees the examples in an order of its own. Default yes.
    pub shuffle: bool,
    /// Whether the last step of an epoch is left out if it has fewer examples. Default no.
    pub drop_last: bool,
    /// Bound on the norm of the gradients; see [`Gradients::clip_norm`]. Default none.
    pub clip_norm: Option<f64>,
    /// Bound on each number of the gradients, before that on the norm. Default none.
    pub clip_value: Option<f64>,
    /// What is done about spikes. Default nothing.
    pub spikes: Option<Spikes>,
    /// Averages of the parameters. Default none.
    pub ema: Option<EmaConfig>,
    /// Evaluation after each so many steps, and after the last. Default none.
    pub evaluate_every: Option<u64>,
}

impl TrainerConfig {
    /// With the defaults.
    #[must_use]
    pub fn new(steps: u64, batch_size: usize, schedule: Schedule) -> Self {
        Self {
            steps,
            batch_size,
            accumulation: 1,
            schedule,
            seed: 0,
            shuffle: true,
            drop_last: false,
            clip_norm: None,
            clip_value: None,
            spikes: None,
            ema: None,
            evaluate_every: None,
        }
    }

    /// How many steps an epoch of so many examples has.
    #[must_use]
    pub fn steps_an_epoch(&self, examples: usize) -> u64 {
        steps_an_epoch(examples, self.batch_size.saturating_mul(self.accumulation), self.drop_last)
    }

    fn check(&self) -> Result<()> {
        for (what, value) in [("batch size", self.batch_size), ("accumulation", self.accumulation)] {
            if value == 0 {
                return Err(Error::value(what, "≥ 1", value));
            }
        }
        for (what, bound) in [("clip_norm", self.clip_norm), ("clip_value", self.clip_value)] {
            if bound.is_some_and(|bound| bound.is_nan() || bound <= 0.0) {
                return Err(Error::value(what, "a number > 0", bound.unwrap_or_default()));
            }
        }
        if self.evaluate_every == Some(0) {
            return Err(Error::value("evaluate_every", "≥ 1", 0));
        }
        self.spikes.as_ref().map_or(Ok(()), Spikes::check)
    }
}

/// What a step was like.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Its number, counted from 0.
    pub step: u64,
    /// How many steps the run has.
    pub steps: u64,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// The mean loss over its examples.
    pub loss: f64,
    /// The norm of the gradients, before they were clipped.
    pub gradient_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Whether it was a spike, so that no parameter was moved.
    pub skipped: bool,
    /// The task's own measures, means over the examples.
    pub metrics: Vec<(String, f64)>,
    /// What an evaluation after this step gave.
    pub evaluation: Option<Vec<(String, f64)>>,
    /// Steps a second since this run began, or was resumed.
    pub rate: f64,
    /// The time that the steps left will take at this rate.
    pub left: Duration,
}

/// Someone who is told of every step, and may stop the run. Every closure `FnMut(&StepReport) -> Flow` is one, and
/// `()`, which watches nothing.
pub trait Watch {
    /// Called after each step.
    fn step(&mut self, report: &StepReport) -> Flow;
}

impl<F: FnMut(&StepReport) -> Flow> Watch for F {
    fn step(&mut self, report: &StepReport) -> Flow {
        self(report)
    }
}

impl Watch for () {
    fn step(&mut self, _report: &StepReport) -> Flow {
        Flow::Continue
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Steps done in all, with those before the run was resumed.
    pub steps: u64,
    /// Whether all are done; otherwise it was stopped.
    pub finished: bool,
    /// Steps that were skipped as spikes.
    pub skipped: u64,
    /// The loss of the last step; NaN if there was none.
    pub loss: f64,
}

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
    config: TrainerConfig,
    optimizer: Box<dyn Optimizer>,
    ema: Option<Ema>,
    /// Steps done.
    step: u64,
    skipped: u64,
    /// The last losses and norms, for spikes.
    last: [Vec<f64>; 2],
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
        config.check()?;
        let ema = config.ema.map(|ema| Ema::new(optimizer.parameters(), ema)).transpose()?;
        Ok(Self {
            config,
            optimizer: Box::new(optimizer),
            ema,
            step: 0,
            skipped: 0,
            last: Default::default(),
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
    /// [`Error::Value`] for a task without examples, and when spikes stop the run; [`Error::NotFinite`], with the step,
    /// for a loss or a norm of the gradients that is no number, in which case no parameter has been moved by it;
    /// [`Error::Shape`] and [`Error::NotDifferentiable`] for a loss that is none; the task's own.
    pub fn run(
        &mut self,
        task: &mut dyn Task,
        watch: &mut dyn Watch,
        cancel: &CancelToken,
    ) -> Result<Summary> {
        let TrainerConfig { batch_size, accumulation, seed, shuffle, drop_last, steps, .. } = self.config;
        let a_step = batch_size.saturating_mul(accumulation);
        let mut order = Order::new(task.examples(), a_step, seed, shuffle, drop_last)?;
        let (began, first) = (Instant::now(), self.step);
        let mut loss = f64::NAN;
        while self.step < steps {
            let mut report = self.one(task, &mut order)?;
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
        Ok(Summary { steps: self.step, finished: self.step >= steps, skipped: self.skipped, loss })
    }

    /// One step.
    fn one(&mut self, task: &mut dyn Task, order: &mut Order) -> Result<StepReport> {
        let step = self.step;
        let (epoch, examples) = order.step(step);
        let Passes { loss, metrics, mut gradients } = self.passes(task, epoch, examples)?;
        if let Some(most) = self.config.clip_value {
            gradients.clip_value(most)?;
        }
        let norm = gradients.norm()?;
        finite("norm of the gradients", norm, step)?;
        if let Some(most) = self.config.clip_norm {
            gradients.clip_to(norm, most);
        }
        let learning_rate = self.config.schedule.at(step);
        let skipped = self.is_spike(loss, norm)?;
        if !skipped {
            self.optimizer.step(&gradients, learning_rate)?;
            self.ema.as_mut().map_or(Ok(()), Ema::update)?;
        }
        drop(gradients);
        self.step += 1;
        let due = self.config.evaluate_every.is_some_and(|every| self.step.is_multiple_of(every));
        let last = self.config.evaluate_every.is_some() && self.step == self.config.steps;
        let evaluation = if due || last { Some(self.evaluate(task)?) } else { None };
        let (rate, left, steps) = (0.0, Duration::MAX, self.config.steps);
        Ok(StepReport {
            step,
            steps,
            epoch,
            loss,
            gradient_norm: norm,
            learning_rate,
            skipped,
            metrics,
            evaluation,
            rate,
            left,
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
            finite("loss", value, step)?;
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

    fn evaluate(&mut self, task: &mut dyn Task) -> Result<Vec<(String, f64)>> {
        let _no_gradients = tch::no_grad_guard();
        match &mut self.ema {
            Some(ema) => ema.with_averages(|| task.evaluate()),
            None => task.evaluate(),
        }
    }
}

/// Refuses NaN and infinities.
fn finite(what: &str, value: f64, step: u64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let found = if value.is_nan() { "NaN" } else { "infinity" };
    Err(Error::NotFinite { what: what.to_owned(), at: format!("step {step}"), found: found.into() })
}
