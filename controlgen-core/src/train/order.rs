//! In which order examples are seen: a function of the seed and the step.

use crate::noise::Noise;
use crate::{Error, Result};

/// Which examples each step takes: those of its epoch, in an order that is a function of the seed and the epoch, cut
/// into steps. So the place in the data is a count of steps, and nothing else need be saved.
pub(super) struct Order {
    examples: usize,
    a_step: usize,
    seed: u64,
    shuffle: bool,
    steps_an_epoch: u64,
    /// The order of the epoch asked for last.
    epoch: Option<(u64, Vec<usize>)>,
}

/// How many steps of `a_step` examples an epoch of `examples` has; the last may have fewer of them, unless it is dropped.
pub(super) fn steps_an_epoch(examples: usize, a_step: usize, drop_last: bool) -> u64 {
    let a_step = a_step.max(1);
    (if drop_last { examples.div_euclid(a_step) } else { examples.div_ceil(a_step) }) as u64
}

impl Order {
    /// # Errors
    /// [`Error::Value`] if there are no examples, or with `drop_last` fewer than a step takes.
    pub(super) fn new(
        examples: usize,
        a_step: usize,
        seed: u64,
        shuffle: bool,
        drop_last: bool,
    ) -> Result<Self> {
        let steps_an_epoch = steps_an_epoch(examples, a_step, drop_last);
        if steps_an_epoch == 0 {
            let expected =
                if drop_last { format!("at least the {a_step} of a step") } else { "at least one".into() };
            return Err(Error::value("examples to train on", expected, examples));
        }
        Ok(Self { examples, a_step, seed, shuffle, steps_an_epoch, epoch: None })
    }

    /// The epoch of a step, and its examples.
    pub(super) fn step(&mut self, step: u64) -> (u64, &[usize]) {
        let (epoch, within) = (step.div_euclid(self.steps_an_epoch), step.rem_euclid(self.steps_an_epoch));
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, self.order_of(epoch)));
        }
        let order = self.epoch.as_ref().map_or(&[][..], |(_, order)| order);
        let from = within as usize * self.a_step;
        (epoch, &order[from.min(order.len())..(from + self.a_step).min(order.len())])
    }

    /// Shuffled from a stream that no step draws from.
    fn order_of(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.examples).collect();
        if self.shuffle {
            Noise::seeded(self.seed).stream(u64::MAX - epoch).shuffle(&mut order);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_sees_every_example_once_in_an_order_of_its_own() {
        let mut order = Order::new(10, 4, 7, true, false).unwrap();
        let mut epochs = Vec::new();
        for epoch in 0..4 {
            let mut seen: Vec<usize> = Vec::new();
            for step in 0..3 {
                let (found, examples) = order.step(epoch * 3 + step);
                assert_eq!((found, examples.len()), (epoch, if step == 2 { 2 } else { 4 }));
                seen.extend(examples);
            }
            epochs.push(seen.clone());
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..10));
        }
        epochs.sort();
        epochs.dedup();
        assert_eq!(epochs.len(), 4);
    }

    #[test]
    fn a_step_is_a_function_of_its_number() {
        let mut ahead = Order::new(100, 8, 3, true, true).unwrap();
        let all: Vec<Vec<usize>> = (0..40).map(|step| ahead.step(step).1.to_vec()).collect();
        for step in (0..40).rev() {
            let mut fresh = Order::new(100, 8, 3, true, true).unwrap();
            assert_eq!(fresh.step(step).1, all[step as usize], "step {step}");
        }
        let mut other = Order::new(100, 8, 4, true, true).unwrap();
        assert_ne!(other.step(0).1, all[0]);
    }

    #[test]
    fn without_shuffling_it_is_the_order_of_the_data() {
        let mut order = Order::new(5, 2, 0, false, true).unwrap();
        assert_eq!([0, 1, 2].map(|step| order.step(step).1.to_vec()), [vec![0, 1], vec![2, 3], vec![0, 1]]);
    }

    #[test]
    fn no_data_is_refused() {
        assert!(matches!(Order::new(0, 4, 0, true, false), Err(Error::Value { .. })));
        assert!(matches!(Order::new(3, 4, 0, true, true), Err(Error::Value { .. })));
    }

    #[test]
    fn the_first_order_is_pinned() {
        let mut order = Order::new(8, 8, 42, true, false).unwrap();
        assert_eq!(order.step(0).1, [6, 2, 7, 4, 3, 5, 0, 1]);
    }
}
