//! Losses and gradients far above what they were.

use serde::Serialize;

use crate::{Error, Result};

/// What counts as a spike, and what is done about it.
///
/// A loss, or a norm of gradients, is a spike if it lies above the median m of the last values by more than `factor`
/// times their median distance from m, or a twentieth of |m| where that is more. The step is then skipped: the
/// parameters stay, and the next step takes the next examples. The value still counts for later medians, so that a run
/// whose losses have risen for good goes on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spikes {
    /// How many of the last steps the medians are of; ≥ 2. Default 64.
    pub window: usize,
    /// How many steps there must have been; 2 to `window`. Default 16.
    pub least: usize,
    /// > 0. Default 20.
    pub factor: f64,
    /// After how many spikes in all the run is stopped with an error; `None` for never.
    pub stop_after: Option<u64>,
}

impl Default for Spikes {
    fn default() -> Self {
        Self { window: 64, least: 16, factor: 20.0, stop_after: None }
    }
}

impl Spikes {
    pub(super) fn check(&self) -> Result<()> {
        if self.least < 2 || self.least > self.window {
            let found = format!("{} of {}", self.least, self.window);
            return Err(Error::value("spikes: steps that there must have been", "2 to the window", found));
        }
        if !self.factor.is_finite() || self.factor <= 0.0 {
            return Err(Error::value("spikes: factor", "a finite number > 0", self.factor));
        }
        Ok(())
    }

    /// The most that a value may be after these; infinity while there are too few.
    pub(super) fn most(&self, last: &[f64]) -> f64 {
        if last.len() < self.least {
            return f64::INFINITY;
        }
        let middle = median(last.to_vec());
        let distance = median(last.iter().map(|value| (value - middle).abs()).collect());
        middle + self.factor * distance.max(0.05 * middle.abs())
    }

    /// Remembers a value.
    pub(super) fn remember(&self, last: &mut Vec<f64>, value: f64) {
        if last.len() >= self.window {
            last.drain(..=last.len() - self.window);
        }
        last.push(value);
    }
}

/// The upper median.
fn median(mut values: Vec<f64>) -> f64 {
    let middle = values.len() >> 1;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_a_distance_from_the_median() {
        let spikes = Spikes { window: 5, least: 3, factor: 10.0, stop_after: None };
        assert_eq!(spikes.most(&[1.0, 2.0]), f64::INFINITY);
        assert_eq!(spikes.most(&[1.0, 2.0, 3.0]), 12.0);
        assert_eq!(spikes.most(&[2.0; 4]), 3.0, "a twentieth of the median");
        let mut last = Vec::new();
        for value in 0..9 {
            spikes.remember(&mut last, f64::from(value));
        }
        assert_eq!(last, [4.0, 5.0, 6.0, 7.0, 8.0]);
    }
}
