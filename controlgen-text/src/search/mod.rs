//! Searches: how tokens are chosen, one a file, all over the same prefill, controls and bookkeeping.

mod beam;
mod beams;
mod best_of;
mod clause_beams;
mod contrastive;
mod diverse_beam;
mod draft;
mod energies;
mod grid_beam;
pub(crate) mod hidden;
mod jump_forward;
mod look_ahead;
mod neurologic;
mod resampling;
mod sampling;
mod smc;
mod speculative;
mod stochastic_beam;

use std::borrow::Cow;

use controlgen_core::progress::Flow;
use controlgen_core::{
    Error, Lanes, LanguageModel, LmInput, Pass, Result, Rows, Source, State, TokenControl, TokenControls,
};
use tch::{Kind, Tensor};

use crate::controls::in_vocabulary;

pub use beam::{BeamSearch, EarlyStopping};
pub use best_of::BestOf;
pub use contrastive::ContrastiveSearch;
pub use diverse_beam::DiverseBeamSearch;
pub use grid_beam::GridBeamSearch;
pub use neurologic::NeuroLogic;
pub use sampling::Choice;
pub use smc::{Particles, Smc};
pub use speculative::{Acceptance, Speculative};
pub use stochastic_beam::{Drawn, StochasticBeamSearch};

/// A way to find completions. Its settings are the value; a run changes nothing in it.
pub trait Search {
    /// Completes each prompt, and tells the listener of the tokens that it weighs.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Context`] for what cannot be run; [`Error::AllBanned`] where the controls leave
    /// nothing; [`Error::NotFinite`] for NaN logits; the model's, the controls' and the listener's.
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>>;

    /// Whether a token that the listener was told of may be taken back. If not, the listener has one row a completion,
    /// prompt by prompt and sample by sample, and text can be given out as it comes; else [`Listener::reorder`] says
    /// what its rows are.
    fn takes_back(&self) -> bool {
        true
    }
}

impl<S: Search + ?Sized> Search for Box<S> {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        (**self).run(task, listener)
    }

    fn takes_back(&self) -> bool {
        (**self).takes_back()
    }
}

/// What every search is given.
pub struct Task<'a> {
    /// The model.
    pub lm: &'a dyn LanguageModel,
    /// Token ids of each prompt; at least one token each. An encoder–decoder's encoder reads them.
    pub prompts: &'a [Vec<i64>],
    /// Controls over the next token.
    pub controls: &'a TokenControls,
    /// Controls inside the model, and the lane of each prompt, which its completions keep.
    pub pass: Pass<'a>,
    /// How many tokens may be generated.
    pub max_new_tokens: usize,
    /// Tokens that end a completion.
    pub eos: &'a [i64],
    /// Completions of each prompt.
    pub n: usize,
}

impl Task<'_> {
    /// What each prompt's completions go on from, which controls and rules look back at: the prompt itself; of an
    /// encoder–decoder, the token that its decoder starts with.
    pub fn openings(&self) -> Cow<'_, [Vec<i64>]> {
        openings(self.lm, self.prompts)
    }

    /// Refuses what cannot be run.
    fn validate(&self) -> Result<()> {
        let spec = self.lm.spec();
        self.pass.check(self.lm.sites(), i64::try_from(self.prompts.len()).unwrap_or(i64::MAX))?;
        let offset = self.pass.position_offset()?.most();
        if self.prompts.is_empty() {
            return Err(Error::value("prompts", "at least one", 0));
        }
        completions(self.prompts.len(), self.n)?;
        for (i, prompt) in self.prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(Error::value(format!("prompt {i}"), "at least one token", "none"));
            }
            let what = format!("token id in prompt {i}");
            prompt.iter().try_for_each(|&id| in_vocabulary(&what, id, spec.vocab))?;
            let read = if spec.decoder_start.is_some() { 1 } else { prompt.len() };
            let len = i64::try_from(read).unwrap_or(i64::MAX);
            let needed = len.saturating_add(offset);
            if needed > spec.context {
                return Err(Error::Context { limit: spec.context, needed });
            }
        }
        self.eos.iter().try_for_each(|&id| in_vocabulary("EOS token id", id, spec.vocab))
    }
}

/// How many completions `n` of each prompt make: a number that memory can hold.
pub(crate) fn completions(prompts: usize, n: usize) -> Result<usize> {
    rows_of("n, completions of each prompt", prompts, n)
}

/// How many rows there are with `n` of each prompt.
fn rows_of(what: &str, prompts: usize, n: usize) -> Result<usize> {
    const MOST: usize = 1 << 20;
    if n == 0 {
        return Err(Error::value(what, "at least 1", 0));
    }
    prompts
        .checked_mul(n)
        .filter(|&all| all <= MOST)
        .ok_or_else(|| Error::value(what, format!("at most {MOST} of {prompts} prompts in all"), n))
}

/// Why a completion ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends sequences; it is not among the completion's ids.
    Eos(i64),
    /// `max_new_tokens`.
    Length,
    /// The model's last position.
    Context,
    /// The listener: a stop string.
    Stopped,
    /// The run was cancelled; the completion is what there was.
    Cancelled,
}

/// A completion in token ids.
#[derive(Clone, Debug)]
pub struct Hypothesis {
    /// Index of its prompt.
    pub prompt: usize,
    /// Its number among the completions of that prompt.
    pub sample: usize,
    /// The new tokens, without the one that ended them.
    pub ids: Vec<i64>,
    /// log p(token | tokens before it) under the model alone, of each of `ids`.
    pub logprobs: Vec<f64>,
    /// The sum of log-probabilities under the model and its controls, the ending token's included. A search by beams
    /// has it as [`BeamSearch`] says: scores not normalised again, and divided by a power of the length; [`Smc`] has
    /// log γ, [`BestOf`] its scorer's.
    pub score: f64,
    /// Why it ended.
    pub finish: Finish,
    /// The clauses that the search was to meet and this does not, by number; none in a search without clauses.
    pub unmet: Vec<usize>,
}

impl Hypothesis {
    /// Nothing said yet.
    fn empty(prompt: usize, sample: usize) -> Self {
        let (ids, logprobs, unmet) = (Vec::new(), Vec::new(), Vec::new());
        Self { prompt, sample, ids, logprobs, score: 0.0, finish: Finish::Length, unmet }
    }
}

/// A token was chosen.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'h> {
    /// The completion so far, this token included. The log-probabilities of the last tokens are not there yet where the
    /// controls forced them: the model has not been asked.
    pub so_far: &'h Hypothesis,
    /// The token.
    pub token: i64,
    /// The listener's row: prompt by prompt and sample by sample in sampling, what [`Listener::reorder`] made it
    /// elsewhere.
    pub row: usize,
}

/// What a listener decides after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Go on.
    Continue,
    /// This completion is finished.
    Finish,
}

/// Told of every token as it is chosen, and of every step.
pub trait Listener {
    /// A token was chosen, not one that ends the sequence.
    ///
    /// # Errors
    /// The listener's own; they end the run.
    fn token(&mut self, chosen: Chosen<'_>) -> Result<After> {
        let _ = chosen;
        Ok(After::Continue)
    }

    /// Makes row `i` what row `rows[i]` was. A listener begins with one row a prompt, and forks a row for each token
    /// that a search weighs, before it is told of it; rows that are not among the next ones are lost, and so is the
    /// text of the tokens that they were told of. A search that takes nothing back has one row a completion instead
    /// and never calls this.
    ///
    /// # Errors
    /// The listener's own; they end the run.
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let _ = rows;
        Ok(())
    }

    /// A step is done: every unfinished completion has one token more. `tokens` were chosen in it.
    fn step(&mut self, tokens: u64) -> Flow {
        let _ = tokens;
        Flow::Continue
    }
}

impl Listener for () {}

/// [`Task::openings`] of prompts by themselves.
pub(crate) fn openings<'p>(lm: &dyn LanguageModel, prompts: &'p [Vec<i64>]) -> Cow<'p, [Vec<i64>]> {
    match lm.spec().decoder_start {
        None => Cow::Borrowed(prompts),
        Some(token) => Cow::Owned(vec![vec![token]; prompts.len()]),
    }
}

/// Runs the prompts through the model: the state and the next token's logits `[prompts, V]`.
///
/// Shorter prompts are padded on the left, where no token sees them. The encoder of an encoder–decoder reads them, and
/// its decoder the token that it starts with.
///
/// # Errors
/// The model's.
pub fn prefill(
    lm: &dyn LanguageModel,
    prompts: &[Vec<i64>],
    pass: &Pass<'_>,
    room: usize,
) -> Result<(State, Tensor)> {
    let Begun { mut state, ids, keep } = begin(lm, prompts, pass, room)?;
    let output = lm.forward(LmInput::ids(&ids).keep(keep.as_ref()).last(), &mut state, pass)?;
    Ok((state, next_logits(&output.logits)?))
}

/// A state that has read nothing, and what it is to read first.
pub(crate) struct Begun {
    pub(crate) state: State,
    /// `[B, T]`
    pub(crate) ids: Tensor,
    /// Boolean `[B, T]`; `None` without padding.
    pub(crate) keep: Option<Tensor>,
}

/// Starts a state for the prompts, with room for so many tokens more than the openings.
pub(crate) fn begin(
    lm: &dyn LanguageModel,
    prompts: &[Vec<i64>],
    pass: &Pass<'_>,
    room: usize,
) -> Result<Begun> {
    let (ids, keep) = padded(lm, prompts)?;
    let &[rows, longest] = ids.size().as_slice() else {
        return Err(Error::shape("token ids", "[B, T]", &ids.size()));
    };
    let mut begun = match lm.spec().decoder_start {
        None => Begun { state: lm.start(Source::Rows(rows), pass)?, ids, keep },
        Some(token) => {
            let state = lm.start(Source::Encoder(LmInput::ids(&ids).keep(keep.as_ref())), pass)?;
            let ids = Tensor::f_full([rows, 1], token, (Kind::Int64, lm.spec().placement.device))?;
            Begun { state, ids, keep: None }
        }
    };
    let first = if lm.spec().decoder_start.is_some() { 1 } else { longest };
    begun.state.reserve(first.saturating_add(i64::try_from(room).unwrap_or(i64::MAX)))?;
    Ok(begun)
}

/// The prompts' ids `[B, T]`, the shorter ones padded on the left, and which are no padding, where some are.
pub(crate) fn padded(lm: &dyn LanguageModel, prompts: &[Vec<i64>]) -> Result<(Tensor, Option<Tensor>)> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let fill = lm.spec().pad.or(lm.spec().eos.first().copied()).unwrap_or(0);
    let mut ids = Vec::with_capacity(prompts.len() * longest);
    let mut keep = Vec::with_capacity(prompts.len() * longest);
    for prompt in prompts {
        let padding = longest - prompt.len();
        ids.extend(std::iter::repeat_n(fill, padding));
        ids.extend_from_slice(prompt);
        keep.extend(std::iter::repeat_n(false, padding));
        keep.extend(std::iter::repeat_n(true, prompt.len()));
    }
    let device = lm.spec().placement.device;
    let shape = [prompts.len() as i64, longest as i64];
    let ids = Tensor::f_from_slice(&ids)?.f_view(shape)?.f_to_device(device)?;
    let ragged = keep.contains(&false);
    let keep =
        if ragged { Some(Tensor::f_from_slice(&keep)?.f_view(shape)?.f_to_device(device)?) } else { None };
    Ok((ids, keep))
}

/// `[B, T, V]` to the last position's `[B, V]`, f32 and contiguous.
fn next_logits(logits: &Tensor) -> Result<Tensor> {
    Ok(logits.f_select(1, -1)?.f_to_kind(Kind::Float)?.f_contiguous()?)
}

/// Everything with one entry per unfinished row, reordered together.
struct Live {
    state: State,
    controls: <TokenControls as TokenControl>::State,
    logits: Tensor,
    lanes: Option<Lanes>,
}

impl Live {
    /// The prompts, read: one row each.
    fn start(task: &Task<'_>) -> Result<Self> {
        let (state, logits) = prefill(task.lm, task.prompts, &task.pass, task.max_new_tokens)?;
        let controls = task.controls.start(&task.openings())?;
        Ok(Self { state, controls, logits, lanes: task.pass.lanes.cloned() })
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.reorder_read(rows)?;
        self.controls.reorder(rows)?;
        self.logits.reorder(rows)
    }

    /// Reorders what the next pass needs: before it, the controls may have rows of their own.
    fn reorder_read(&mut self, rows: &[i64]) -> Result<()> {
        self.state.reorder(rows)?;
        self.lanes.as_mut().map_or(Ok(()), |lanes| lanes.reorder(rows))
    }

    /// The task's pass over these rows.
    fn pass<'p>(&'p self, task: &Task<'p>) -> Pass<'p> {
        Pass { lanes: self.lanes.as_ref(), ..task.pass }
    }

    /// How many tokens more the model has positions for.
    fn room(&self, task: &Task<'_>) -> Result<i64> {
        Ok(task.lm.spec().context - self.state.len() - self.pass(task).position_offset()?.most())
    }

    /// Reads several tokens of each row in one pass, step by step `[B]` each: the logits `[B, V]` that followed each
    /// step but the last, whose are the row's.
    fn extend_by(&mut self, task: &Task<'_>, steps: &[Vec<i64>]) -> Result<Vec<Tensor>> {
        if let [tokens] = steps {
            self.extend(task, tokens)?;
            return Ok(Vec::new());
        }
        let device = task.lm.spec().placement.device;
        let ids = Tensor::f_from_slice(&steps.concat())?.f_view([steps.len() as i64, -1])?; // (T, B)
        let ids = ids.f_tr()?.f_contiguous()?.f_to_device(device)?;
        let pass = Pass { lanes: self.lanes.as_ref(), ..task.pass };
        let logits = task.lm.forward(LmInput::ids(&ids), &mut self.state, &pass)?.logits; // (B, T, V)
        self.logits = next_logits(&logits)?;
        let of = |step| Ok(logits.f_select(1, step)?.f_to_kind(Kind::Float)?.f_contiguous()?);
        (0..steps.len() as i64 - 1).map(of).collect()
    }

    /// Reads the token chosen for each row.
    fn extend(&mut self, task: &Task<'_>, tokens: &[i64]) -> Result<()> {
        let ids =
            Tensor::f_from_slice(tokens)?.f_unsqueeze(1)?.f_to_device(task.lm.spec().placement.device)?;
        let pass = Pass { lanes: self.lanes.as_ref(), ..task.pass };
        self.logits =
            next_logits(&task.lm.forward(LmInput::ids(&ids).last(), &mut self.state, &pass)?.logits)?;
        Ok(())
    }
}
