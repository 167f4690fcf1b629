//! What is told of a run.

use std::time::Duration;

use crate::progress::Flow;

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
    /// The best evaluation's value, and how many steps were done at it.
    pub best: Option<(u64, f64)>,
}
