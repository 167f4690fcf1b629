//! Diverse beam search: groups of beams, each kept away from what the groups before it chose.

use controlgen_core::{Error, Result};

use super::beam::BeamSearch;
use super::beams::{ByScore, Plan, run};
use super::{Hypothesis, Listener, Search, Task};

/// Beam search in groups that take turns at each step: a group's candidates lose `diversity_penalty` for each beam of
/// an earlier group that just chose the same token. Vijayakumar, Cogswell, Selvaraju, Sun, Lee, Crandall and
/// Batra, "Diverse Beam Search for Improved Description of Complex Scenes" (AAAI 2018), algorithm 1 with the Hamming
/// diversity of section 5.1.
///
/// Each group is a [`BeamSearch`] of num_beams / num_beam_groups beams that ends by itself; the first is undisturbed.
/// What a hypothesis lost stays lost: its score is lower by it. A token that ends a hypothesis, by itself or with a
/// stop string, is no choice that later groups avoid. The penalty comes after the controls. The best `n` of all groups are given; with n = num_beams they
/// are all there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiverseBeamSearch {
    beams: BeamSearch,
    groups: usize,
    diversity_penalty: f64,
}

impl DiverseBeamSearch {
    /// Parts the beams of `search` in `num_beam_groups` groups, 2 or more of the same size, with a `diversity_penalty`
    /// above 0, in nats; the paper finds 0.2 to 0.8 good.
    ///
    /// # Errors
    /// [`Error::Value`] for groups that do not divide the beams, and for a penalty out of its range.
    pub fn new(search: BeamSearch, num_beam_groups: usize, diversity_penalty: f64) -> Result<Self> {
        let num_beams = search.num_beams;
        if num_beam_groups < 2 || !num_beams.is_multiple_of(num_beam_groups) {
            let expected = format!("at least 2, and a divisor of num_beams = {num_beams}");
            return Err(Error::value("num_beam_groups", expected, num_beam_groups));
        }
        if !(diversity_penalty.is_finite() && diversity_penalty > 0.0) {
            return Err(Error::value("diversity_penalty", "a finite number > 0", diversity_penalty));
        }
        let beams = BeamSearch { num_beams: num_beams.div_euclid(num_beam_groups), ..search };
        Ok(Self { beams, groups: num_beam_groups, diversity_penalty })
    }
}

/// Completes each prompt with the best `task.n` hypotheses of all groups, best first, as [`BeamSearch`] does.
impl Search for DiverseBeamSearch {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        let &Self { beams, groups, diversity_penalty } = self;
        run(task, &Plan { beams, groups, diversity_penalty }, &ByScore, listener)
    }
}

/// What a prompt's groups have chosen in this step.
#[derive(Default)]
pub(super) struct Taken(Vec<i64>);

impl Taken {
    pub(super) fn add(&mut self, token: i64) {
        self.0.push(token);
    }

    /// How often this token was taken.
    pub(super) fn count(&self, token: i64) -> usize {
        self.0.iter().filter(|&&taken| taken == token).count()
    }
}
