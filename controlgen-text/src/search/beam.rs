//! Beam search: the best few hypotheses of each prompt, extended together.

use controlgen_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::beams::{ByScore, Plan, run};
use super::{Hypothesis, Listener, Search, Task};

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
    /// Not before nothing goes on: for controls whose scores may be positive or come with the end, such as
    /// regularisers that later tokens can lower. Not in transformers.
    Exhausted,
}

/// [`EarlyStopping`] as transformers writes it.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false, \"never\" or \"exhausted\"")]
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
            EarlyStopping::Exhausted => Self::Word("exhausted".into()),
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
            Spelled::Word(word) if word == "exhausted" => Ok(Self::Exhausted),
            Spelled::Word(word) => {
                Err(Error::value("early_stopping", "true, false, \"never\" or \"exhausted\"", word))
            }
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
/// More completions than beams are refused; [`Error::AllBanned`] names the prompt of which no hypothesis is left.
impl Search for BeamSearch {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        run(task, &Plan::ungrouped(*self), &ByScore, listener)
    }
}
