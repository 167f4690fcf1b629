//! Beam search: the best few hypotheses of each prompt, extended together.

use controlgen_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::beams::{Plan, run};
use super::{Finish, Hypothesis, Listener, Task};

/// Keeps the `num_beams` most probable hypotheses of a prompt, and extends all of them at each step.
///
/// With x the new tokens, y the prompt and s the scores that controls leave of log p (log p itself without them), not
/// normalised again, a hypothesis that has ended scores
///
/// ```text
/// (Σₜ s(xₜ | y, x₁ … xₜ₋₁) + Σ log-weights of the controls' `finish`) / length ** length_penalty
/// ```
///
/// where the length counts the token that ended it. At each step the candidates are all hypotheses with all tokens
/// after them. Of the best `num_beams` candidates, those that end are finished; the best `num_beams` that do not end go
/// on. `num_beams` finished ones are kept. All of this is transformers' (5.23, `_beam_search`), but for two things: a
/// hypothesis that nothing may follow, or whose log-weight is −∞, is dropped, where transformers ranks it last; and
/// `EarlyStopping::Never` counts on no more tokens than the model's context holds.
///
/// Wu et al., "Google's Neural Machine Translation System" (2016), section 7, is where the normalisation by length
/// comes from, in another form.
///
/// *Cost*: one pass of the model with `num_beams` rows a prompt each step, a log-softmax and a top-k over the
/// vocabulary of each row, and, where a hypothesis is forked or dropped, one copy of the model's cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamSearch {
    pub(super) num_beams: usize,
    pub(super) length_penalty: f64,
    pub(super) early_stopping: EarlyStopping,
}

/// When a prompt's search is over, beside the limits of length. In all cases `num_beams` hypotheses must be finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Spelled", into = "Spelled")]
pub enum EarlyStopping {
    /// Once the best that goes on, ended here, would not be better than the worst that is finished: transformers'
    /// `false`. With a positive length penalty a longer one might still have been.
    #[default]
    Heuristic,
    /// At once: transformers' `true`.
    WhenFull,
    /// Once the best that goes on could not be better than the worst that is finished, at any length that is
    /// allowed: transformers' `"never"`. It holds if no score is positive and no control gives a log-weight.
    Never,
}

/// [`EarlyStopping`] as transformers writes it.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"never\"")]
enum Spelled {
    Flag(bool),
    Word(String),
}

impl From<EarlyStopping> for Spelled {
    fn from(early_stopping: EarlyStopping) -> Self {
        match early_stopping {
            EarlyStopping::Heuristic => Self::Flag(false),
            EarlyStopping::WhenFull => Self::Flag(true),
            EarlyStopping::Never => Self::Word("never".into()),
        }
    }
}

impl TryFrom<Spelled> for EarlyStopping {
    type Error = Error;

    fn try_from(spelled: Spelled) -> Result<Self> {
        match spelled {
            Spelled::Flag(false) => Ok(Self::Heuristic),
            Spelled::Flag(true) => Ok(Self::WhenFull),
            Spelled::Word(word) if word == "never" => Ok(Self::Never),
            Spelled::Word(word) => Err(Error::value("early_stopping", "true, false or \"never\"", word)),
        }
    }
}

impl BeamSearch {
    /// `num_beams` of at least 1; a length penalty of 1, and the heuristic for stopping. One beam is greedy search.
    ///
    /// # Errors
    /// [`Error::Value`] for no beams.
    pub fn new(num_beams: usize) -> Result<Self> {
        if num_beams == 0 {
            return Err(Error::value("num_beams", "at least 1", 0));
        }
        Ok(Self { num_beams, length_penalty: 1.0, early_stopping: EarlyStopping::default() })
    }

    /// The power of the length by which scores are divided, in −50 ..= 50: 0 leaves the sum; the higher, the longer
    /// the hypotheses that win.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn length_penalty(self, length_penalty: f64) -> Result<Self> {
        if !(-50.0..=50.0).contains(&length_penalty) {
            return Err(Error::value("length_penalty", "-50 ..= 50", length_penalty));
        }
        Ok(Self { length_penalty, ..self })
    }

    /// When a prompt's search is over.
    #[must_use]
    pub fn early_stopping(self, early_stopping: EarlyStopping) -> Self {
        Self { early_stopping, ..self }
    }

    /// The score of a hypothesis of this sum and length.
    pub(super) fn normalised(&self, sum: f64, length: usize) -> f64 {
        sum / (length.max(1) as f64).powf(self.length_penalty)
    }
}

/// Completes each prompt with the best `task.n` hypotheses found, best first. They are fewer where the controls leave
/// fewer.
///
/// # Errors
/// [`Error::Value`], [`Error::Context`] for what cannot be run, more completions than beams for one;
/// [`Error::AllBanned`] where the controls leave no hypothesis of a prompt, which `row` then names;
/// [`Error::NotFinite`] for NaN logits; the model's, the controls' and the listener's.
pub fn beam_search(
    task: &Task<'_>,
    search: &BeamSearch,
    listener: &mut dyn Listener,
) -> Result<Vec<Hypothesis>> {
    run(task, &Plan { beams: *search, groups: 1, diversity_penalty: 0.0 }, listener)
}

/// A prompt's hypotheses, or those of one of its groups.
pub(super) struct Beams {
    pub(super) prompt: usize,
    /// Those that go on, best first.
    pub(super) running: Vec<Beam>,
    /// Those that have ended, best first; `num_beams` at most.
    finished: Vec<Hypothesis>,
    over: bool,
}

/// A hypothesis that goes on. Its score is the sum, until it ends.
pub(super) struct Beam {
    /// Its row of the batch.
    pub(super) row: usize,
    pub(super) so_far: Hypothesis,
}

/// A token that may follow a beam.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    /// Which of the running ones.
    pub(super) beam: usize,
    pub(super) token: i64,
    /// The whole hypothesis' sum of scores.
    pub(super) score: f64,
    /// Of the token, under the model alone.
    pub(super) logprob: f64,
}

impl Beams {
    /// Nothing said yet, in this row.
    pub(super) fn new(prompt: usize, row: usize) -> Self {
        let so_far = Hypothesis {
            prompt,
            sample: 0,
            ids: Vec::new(),
            logprobs: Vec::new(),
            score: 0.0,
            finish: Finish::Length,
        };
        Self { prompt, running: vec![Beam { row, so_far }], finished: Vec::new(), over: false }
    }

    /// The hypothesis that a candidate makes.
    pub(super) fn extended(&self, candidate: &Candidate, finish: Option<Finish>) -> Hypothesis {
        let before = &self.running[candidate.beam].so_far;
        let mut so_far = Hypothesis {
            ids: Vec::with_capacity(before.ids.len() + 1),
            logprobs: Vec::with_capacity(before.ids.len() + 1),
            score: candidate.score,
            finish: finish.unwrap_or(Finish::Length),
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
    pub(super) fn finish(
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
        let at = self.finished.partition_point(|better| better.score >= ended.score);
        self.finished.insert(at, ended);
        self.finished.truncate(search.num_beams);
        Ok(())
    }

    /// Decides whether the search is over, of hypotheses that have `length` tokens and may have `longest`.
    pub(super) fn settle(&mut self, search: &BeamSearch, length: usize, longest: usize) {
        let improvable = |best: &Beam| {
            let length = match search.early_stopping {
                EarlyStopping::Never if search.length_penalty > 0.0 => longest,
                _ => length,
            };
            let worst = self.finished.last().map_or(f64::NEG_INFINITY, |worst| worst.score);
            search.normalised(best.so_far.score, length) > worst
        };
        let full = self.finished.len() >= search.num_beams;
        self.over = match self.running.first() {
            None => true,
            Some(_) if !full => false,
            Some(best) => search.early_stopping == EarlyStopping::WhenFull || !improvable(best),
        };
        if self.over {
            self.running.clear();
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    pub(super) fn into_finished(self) -> Vec<Hypothesis> {
        self.finished
    }

    pub(super) fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }
}
