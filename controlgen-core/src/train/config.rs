//! Settings of a run.

use std::path::PathBuf;

use super::order::steps_an_epoch;
use super::{EmaConfig, Schedule, Spikes};
use crate::{Error, Result};

/// Settings of a [`Trainer`](super::Trainer).
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
    /// Bound on the norm of the gradients; see [`Gradients::clip_norm`](super::Gradients::clip_norm). Default none.
    pub clip_norm: Option<f64>,
    /// Bound on each number of the gradients, before that on the norm. Default none.
    pub clip_value: Option<f64>,
    /// What is done about spikes. Default nothing.
    pub spikes: Option<Spikes>,
    /// Averages of the parameters. Default none.
    pub ema: Option<EmaConfig>,
    /// Evaluation after each so many steps, and after the last. Default none.
    pub evaluate_every: Option<u64>,
    /// Which evaluation is the best; its checkpoint is kept. Needs `evaluate_every`. Default none.
    pub best: Option<Best>,
    /// Where `last.safetensors`, `best.safetensors` and the tables `train.csv` and `evaluation.csv` are written, and
    /// taken up. Made if it is not there. Default none: nothing is written.
    pub directory: Option<PathBuf>,
    /// A checkpoint after each so many steps; there is also one at the end, and when the run is stopped. Default none.
    pub save_every: Option<u64>,
}

/// Which evaluation is the best.
#[derive(Clone, Debug, PartialEq)]
pub enum Best {
    /// That with the highest value of a metric.
    Highest(String),
    /// That with the lowest value of a metric.
    Lowest(String),
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
            best: None,
            directory: None,
            save_every: None,
        }
    }

    /// As many steps as so many epochs of so many examples have, with the schedule that `schedule` gives for that many;
    /// and the defaults.
    ///
    /// ```
    /// # fn main() -> controlgen_core::Result<()> {
    /// use controlgen_core::train::{Schedule, TrainerConfig};
    ///
    /// let config = TrainerConfig::epochs(3, 1000, 16, |steps| Schedule::cosine(1e-3, steps)?.with_warmup(20))?;
    /// assert_eq!(config.steps, 3 * 63);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `schedule`.
    pub fn epochs(
        epochs: u64,
        examples: usize,
        batch_size: usize,
        schedule: impl FnOnce(u64) -> Result<Schedule>,
    ) -> Result<Self> {
        let steps = epochs.saturating_mul(steps_an_epoch(examples, batch_size, false));
        Ok(Self::new(steps, batch_size, schedule(steps)?))
    }

    /// How many steps an epoch of so many examples has.
    #[must_use]
    pub fn steps_an_epoch(&self, examples: usize) -> u64 {
        steps_an_epoch(examples, self.batch_size.saturating_mul(self.accumulation), self.drop_last)
    }

    /// What decides which numbers a step computes.
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "schedule": self.schedule,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "clip_norm": self.clip_norm,
            "clip_value": self.clip_value,
            "spikes": self.spikes,
            "ema": self.ema,
        })
    }

    pub(super) fn check(&self) -> Result<()> {
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
        for (what, every) in [("evaluate_every", self.evaluate_every), ("save_every", self.save_every)] {
            if every == Some(0) {
                return Err(Error::value(what, "≥ 1", 0));
            }
        }
        if self.save_every.is_some() && self.directory.is_none() {
            return Err(Error::value("directory", "one, to save to", "none"));
        }
        if self.best.is_some() && self.evaluate_every.is_none() {
            return Err(Error::value("evaluate_every", "≥ 1, to find the best", "none"));
        }
        self.spikes.as_ref().map_or(Ok(()), Spikes::check)
    }
}
