//! Look-ahead: how likely the words that are missing come next.

use controlgen_core::{Error, LmInput, Result, Rows};
use tch::{Kind, Tensor};

use super::Live;
use super::beams::Sight;
use super::clause_beams::Choice;
use crate::controls::to_vec;
use crate::lexical::{ClausesOf, Progress};

/// The heuristic of NeuroLogic A*esque decoding, with greedy continuations; see
/// [`NeuroLogic::look_ahead`](super::NeuroLogic::look_ahead).
#[derive(Clone, Copy, Debug)]
pub(super) struct LookAhead {
    tokens: usize,
    weight: f64,
}

/// What is continued.
struct Row {
    /// Which of the pools, and which choice of it.
    of: (usize, usize),
    progress: Progress,
    /// The best log-probability so far of a token that leads to a word.
    best: f64,
}

impl LookAhead {
    pub(super) fn new(tokens: usize, weight: f64) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::value("tokens to look ahead", "at least 1", 0));
        }
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(Error::value("weight of the look-ahead", "a finite number >= 0", weight));
        }
        Ok(Self { tokens, weight })
    }

    /// Adds the heuristic to the rank of the choices of each pool.
    pub(super) fn rank(&self, sight: &Sight<'_>, clauses: &ClausesOf, all: &mut [Vec<Choice>]) -> Result<()> {
        let (mut rows, mut parents, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for (pool, choices) in all.iter().enumerate() {
            for (i, choice) in choices.iter().enumerate() {
                let Choice { pick, row, .. } = choice;
                if choice.ends || pick.memo.held == clauses.get(pick.memo.prompt)?.all() {
                    continue;
                }
                let progress = pick.memo.progress.clone();
                rows.push(Row { of: (pool, i), progress, best: f64::NEG_INFINITY });
                parents.push(*row as i64);
                tokens.push(pick.candidate.token);
            }
        }
        let Live { state, lanes, .. } = sight.live;
        let steps =
            self.tokens.min(sight.left - 1).min(usize::try_from(sight.live.room(sight.task)?).unwrap_or(0));
        if rows.is_empty() || steps == 0 {
            return Ok(());
        }
        let (mut state, mut lanes) = (state.fork()?, lanes.clone());
        state.reorder(&parents)?;
        if let Some(lanes) = &mut lanes {
            lanes.reorder(&parents)?;
        }
        let device = sight.task.lm.spec().placement.device;
        let mut next = Tensor::f_from_slice(&tokens)?.f_to_device(device)?; // (R)
        for step in 0..steps {
            let pass = controlgen_core::Pass { lanes: lanes.as_ref(), ..sight.task.pass };
            let input = next.f_unsqueeze(1)?;
            let output = sight.task.lm.forward(LmInput::ids(&input).last(), &mut state, &pass)?;
            let logprobs = super::next_logits(&output.logits)?.f_log_softmax(-1, Kind::Float)?; // (R, V)
            look(clauses, &mut rows, all, &logprobs)?;
            if step + 1 < steps {
                next = logprobs.f_argmax(-1, false)?;
                for (row, token) in rows.iter_mut().zip(Vec::<i64>::try_from(&next)?) {
                    let prompt = all[row.of.0][row.of.1].pick.memo.prompt;
                    clauses.get(prompt)?.advance(&mut row.progress, token);
                }
            }
        }
        for row in rows {
            // What does not come at all is no worse than what comes one time in e³⁰.
            all[row.of.0][row.of.1].rank += self.weight * row.best.max(-30.0);
        }
        Ok(())
    }
}

/// Notes how likely the tokens are that lead to words.
fn look(clauses: &ClausesOf, rows: &mut [Row], all: &[Vec<Choice>], logprobs: &Tensor) -> Result<()> {
    let vocab = logprobs.size()[1];
    let (mut cells, mut counts) = (Vec::new(), Vec::with_capacity(rows.len()));
    for (i, row) in (0i64..).zip(rows.iter()) {
        let memo = &all[row.of.0][row.of.1].pick.memo;
        let leads = clauses.get(memo.prompt)?.leads(&row.progress, memo.held);
        counts.push(leads.len());
        cells.extend(leads.into_iter().map(|token| i * vocab + token));
    }
    if cells.is_empty() {
        return Ok(());
    }
    let cells = Tensor::f_from_slice(&cells)?.f_to_device(logprobs.device())?;
    let found = to_vec(&logprobs.f_take(&cells)?)?;
    let mut found = found.as_slice();
    for (row, count) in rows.iter_mut().zip(counts) {
        let (own, rest) = found.split_at(count);
        row.best = own.iter().fold(row.best, |best, &logprob| best.max(logprob.into()));
        found = rest;
    }
    Ok(())
}
