//! The hypotheses of one prompt: those that go on, and those that have ended.

use std::cmp::Ordering;

use controlgen_core::{Error, Result};

use super::Candidate;
use crate::search::beam::{BeamSearch, EarlyStopping};
use crate::search::{Finish, Hypothesis};

/// A prompt's hypotheses, or those of one of its groups.
pub(in crate::search) struct Beams<M> {
    pub(in crate::search) prompt: usize,
    /// Those that go on, best first.
    pub(in crate::search) running: Vec<Beam<M>>,
    /// Those that have ended, best first; `num_beams` at most.
    finished: Vec<Hypothesis>,
    over: bool,
}

/// A hypothesis that goes on. Its score is the sum, until it ends.
pub(in crate::search) struct Beam<M> {
    /// Its row of the batch.
    pub(in crate::search) row: usize,
    pub(in crate::search) so_far: Hypothesis,
    /// What the rule remembers of it.
    pub(in crate::search) memo: M,
}

impl<M> Beams<M> {
    /// Nothing said yet, in this row.
    pub(in crate::search) fn new(prompt: usize, row: usize, memo: M) -> Self {
        let so_far = Hypothesis::empty(prompt, 0);
        Self { prompt, running: vec![Beam { row, so_far, memo }], finished: Vec::new(), over: false }
    }

    /// The hypothesis that a candidate makes.
    pub(in crate::search) fn extended(&self, candidate: &Candidate, finish: Option<Finish>) -> Hypothesis {
        let before = &self.running[candidate.beam].so_far;
        let mut so_far = Hypothesis {
            ids: Vec::with_capacity(before.ids.len() + 1),
            logprobs: Vec::with_capacity(before.ids.len() + 1),
            score: candidate.score,
            finish: finish.unwrap_or(Finish::Length),
            unmet: Vec::new(),
            ..*before
        };
        so_far.ids.extend_from_slice(&before.ids);
        so_far.logprobs.extend_from_slice(&before.logprobs);
        if !matches!(so_far.finish, Finish::Eos(_)) {
            so_far.ids.push(candidate.token);
            so_far.logprobs.push(candidate.logprob);
        }
        so_far
    }

    /// Takes a hypothesis that has ended, with the controls' log-weight. Without probability it is dropped.
    pub(in crate::search) fn finish(
        &mut self,
        search: &BeamSearch,
        mut ended: Hypothesis,
        log_weight: f64,
    ) -> Result<()> {
        if log_weight.is_nan() || log_weight == f64::INFINITY {
            let (what, at) =
                ("log-weight of a finished hypothesis".into(), format!("prompt {}", self.prompt));
            return Err(Error::NotFinite { what, at, found: log_weight.to_string() });
        }
        if log_weight == f64::NEG_INFINITY {
            return Ok(());
        }
        let length = ended.ids.len() + usize::from(matches!(ended.finish, Finish::Eos(_)));
        ended.score = search.normalised(ended.score + log_weight, length);
        let better = |other: &Hypothesis| in_order(other, &ended).is_le();
        let at = self.finished.partition_point(better);
        self.finished.insert(at, ended);
        self.finished.truncate(search.num_beams);
        Ok(())
    }

    /// Decides whether the search is over, of hypotheses that have `length` tokens and may have `longest`.
    pub(in crate::search) fn settle(&mut self, search: &BeamSearch, length: usize, longest: usize) {
        let improvable = |worst: f64| {
            let length = match search.early_stopping {
                EarlyStopping::Never if search.length_penalty > 0.0 => longest,
                _ => length,
            };
            self.running.iter().any(|beam| search.normalised(beam.so_far.score, length) > worst)
        };
        let full = self.finished.len() >= search.num_beams;
        self.over = match self.finished.last() {
            _ if self.running.is_empty() => true,
            Some(worst) if full && worst.unmet.is_empty() => match search.early_stopping {
                EarlyStopping::WhenFull => true,
                EarlyStopping::Exhausted => false,
                EarlyStopping::Heuristic | EarlyStopping::Never => !improvable(worst.score),
            },
            _ => false,
        };
        if self.over {
            self.running.clear();
        }
    }

    pub(in crate::search) fn is_over(&self) -> bool {
        self.over
    }

    pub(in crate::search) fn into_finished(self) -> Vec<Hypothesis> {
        self.finished
    }

    pub(in crate::search) fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }
}

/// Whose unmet clauses are fewer comes first; of as many, whose score is higher.
pub(in crate::search) fn in_order(a: &Hypothesis, b: &Hypothesis) -> Ordering {
    a.unmet.len().cmp(&b.unmet.len()).then(b.score.total_cmp(&a.score))
}
