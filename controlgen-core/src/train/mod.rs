//! Training: optimizers, schedules, averages, and a loop that can be interrupted at any point.
//!
//! [`Parameters`] are named f32 leaves. A loss gives their [`Gradients`], an [`Optimizer`] moves them, a [`Schedule`] says
//! how far:
//!
//! | | |
//! |---|---|
//! | [`AdamW`] | as PyTorch's; rows of embedding tables that got no gradient need not decay |
//! | [`Sgd`] | momentum, Nesterov's momentum |
//! | [`Adafactor`] | as transformers'; factored second moments |
//! | [`Ema`] | averages of the parameters |
//!
//! A [`Trainer`] runs the whole loop over a [`Task`]. What it does in a step is a function of the seed and the number of
//! the step, so a run that was interrupted and resumed ends with the same bits as one that was not, on the CPU and with as
//! many threads.
//!
//! Whatever is loaded from a checkpoint is trained without more ado: [`initial`] makes the [`Parameters`] of a model that is
//! not there yet, and in each step the model is loaded from them.
//!
//! Losses are not here: they live beside their models.

mod adafactor;
mod adamw;
mod checkpoint;
mod config;
mod ema;
mod gradients;
mod initial;
mod metrics;
mod optimizer;
mod order;
mod parameters;
#[cfg(feature = "plot")]
mod plot;
mod report;
mod saving;
mod schedule;
mod sgd;
mod spikes;
mod task;
mod trainer;

pub use adafactor::{Adafactor, AdafactorConfig};
pub use adamw::{AdamW, AdamWConfig};
pub use checkpoint::Checkpoint;
pub use config::{Best, TrainerConfig};
pub use ema::{Ema, EmaConfig, EmaWarmup};
pub use gradients::Gradients;
pub use initial::{Asked, Initial, initial};
pub use optimizer::Optimizer;
pub use parameters::{Group, Parameter, Parameters};
#[cfg(feature = "plot")]
pub use plot::plot;
pub use report::{StepReport, Summary, Watch};
pub use schedule::Schedule;
pub use sgd::{Sgd, SgdConfig};
pub use spikes::Spikes;
pub use task::{Batch, Loss, Task};
pub use trainer::Trainer;
