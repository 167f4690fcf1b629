//! Denoisers, autoencoders and encoders, each read from top to bottom in one file. `blocks` is what they share.

mod blocks;
mod dit;

pub use dit::{Dit, DitConfig};

use controlgen_core::Parameterisation;

/// What a denoiser's own config.json does not say: it stands in the scheduler's file, or is known of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicts {
    /// What it predicts: `prediction_type` of the scheduler.
    pub parameterisation: Parameterisation,
    /// Whether half of its output is the variance of a step: `variance_type` `learned` or `learned_range`. The channels
    /// of a sample are then half of `out_channels`. Channels in beyond those of a sample are a condition's: its feature
    /// `concat` `[C', H, W]`.
    pub learned_variance: bool,
}

impl Predicts {
    /// ε, and no variance.
    pub const EPSILON: Self = Self { parameterisation: Parameterisation::Epsilon, learned_variance: false };

    /// How many channels a sample has, of a model of so many channels out.
    pub fn channels(self, out_channels: i64) -> i64 {
        if self.learned_variance { out_channels.div_euclid(2) } else { out_channels }
    }
}
