//! What a trainer trains.

use tch::Tensor;

use crate::Result;
use crate::noise::Stream;

/// Something to be trained: examples, and the loss of a batch of them. What it trains, the optimizer knows.
pub trait Task {
    /// How many examples there are.
    fn examples(&self) -> usize;

    /// The mean loss of a batch. Gradients are being recorded.
    ///
    /// # Errors
    /// Whatever keeps it from being computed; it ends the run.
    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss>;

    /// Measures on held-out data, by name: the same names each time, in the same order. No gradients are recorded, and
    /// the averages are in the place of the parameters if the run keeps averages.
    ///
    /// # Errors
    /// Whatever keeps them from being computed; it ends the run.
    fn evaluate(&mut self) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }

    /// What a run that is resumed must have in common with the one before: the data's name or hash, the model's, settings
    /// of the loss.
    fn configuration(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// What a loss is asked of.
pub struct Batch<'a> {
    /// Which examples, counted from 0 in the order of the data.
    pub examples: &'a [usize],
    /// The step, counted from 0.
    pub step: u64,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Random numbers of this batch: a function of the seed, the step and the batch within the step.
    pub stream: &'a mut Stream,
}

/// The loss of a batch.
pub struct Loss {
    /// One number, in the graph.
    pub value: Tensor,
    /// Measures beside it, means over the batch: the same names each time, in the same order.
    pub metrics: Vec<(String, f64)>,
}

impl From<Tensor> for Loss {
    fn from(value: Tensor) -> Self {
        Self { value, metrics: Vec::new() }
    }
}
