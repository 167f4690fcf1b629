//! Ancestral sampling and greedy search: one token after the other, none taken back.

use controlgen_core::noise::Stream;
use controlgen_core::progress::Flow;
use controlgen_core::{Error, Result, TokenControl};

use super::jump_forward::{Unread, note};
use super::{After, Chosen, Finish, Hypothesis, Listener, Live, Search, Task};
use crate::sample;

/// How a token is chosen from the controlled scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The most probable; the lowest id of several.
    Greedy,
    /// One drawn from the softmax of the scores.
    ///
    /// Sample k of any prompt draws from stream k of this seed: a prompt's completions are the same whatever other
    /// prompts are in the batch, in whatever order, and whether its samples are drawn together or one by one.
    Sample {
        /// The seed.
        seed: u64,
        /// The number of the first sample: its stream. Sample k of n draws from stream `first + k`.
        first: u64,
    },
}

/// Completes each prompt `n` times. Completions come prompt by prompt, sample by sample.
impl Search for Choice {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        sampling(task, *self, listener)
    }

    fn takes_back(&self) -> bool {
        false
    }
}

fn sampling(task: &Task<'_>, choice: Choice, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
    let _guard = tch::no_grad_guard();
    task.validate()?;
    let mut live = Live::start(task)?;

    let pairs = || (0..task.prompts.len()).flat_map(|prompt| (0..task.n).map(move |sample| (prompt, sample)));
    let mut hypotheses: Vec<Hypothesis> =
        pairs().map(|(prompt, sample)| Hypothesis::empty(prompt, sample)).collect();
    let mut streams: Vec<Option<Stream>> = pairs()
        .map(|(_, sample)| match choice {
            Choice::Greedy => None,
            Choice::Sample { seed, first } => Some(Stream::new(seed, first.wrapping_add(sample as u64))),
        })
        .collect();
    if task.n > 1 {
        let rows: Vec<i64> = pairs().map(|(prompt, _)| prompt as i64).collect();
        live.reorder(&rows)?;
    }
    // Which hypothesis each row of the batch is.
    let mut rows: Vec<usize> = (0..hypotheses.len()).collect();
    let mut unread = Unread::default();

    for step in 0..task.max_new_tokens {
        // An error names the completion, not the row that it has in what is left of the batch.
        let located = |error: Error| match sample::at_step(error, step) {
            Error::AllBanned { row, step } => Error::AllBanned { row: rows[row], step },
            other => other,
        };
        let forced = unread.forced(task, &mut live, &rows, &mut hypotheses)?;
        // A forced token uses up its number too, so that those after it draw the same.
        let uniforms: Vec<f64> =
            rows.iter().map(|&row| streams[row].as_mut().map_or(0.0, Stream::uniform)).collect();
        let (tokens, scored) = match forced {
            Some(tokens) => {
                let certain = vec![0.0; tokens.len()];
                (tokens, certain)
            }
            None => {
                let controlled = if task.controls.is_empty() {
                    None
                } else {
                    Some(task.controls.score(&mut live.controls, live.logits.f_detach_copy()?)?)
                };
                let scores = controlled.as_ref().unwrap_or(&live.logits);
                let tokens = match choice {
                    Choice::Greedy => sample::greedy(scores),
                    Choice::Sample { .. } => sample::categorical(scores, &uniforms),
                }
                .map_err(located)?;
                let scored = sample::log_prob_of(scores, &tokens)?;
                (tokens, scored)
            }
        };
        let logprobs = match unread.len() {
            0 if task.controls.is_empty() => scored.clone(),
            0 => sample::log_prob_of(&live.logits, &tokens)?,
            _ => Vec::new(),
        };

        task.controls.advance(&mut live.controls, &tokens)?;
        let mut going = Vec::with_capacity(rows.len());
        for (i, (&row, &token)) in rows.iter().zip(&tokens).enumerate() {
            let hypothesis = &mut hypotheses[row];
            hypothesis.score += scored[i];
            if task.eos.contains(&token) {
                hypothesis.finish = Finish::Eos(token);
            } else {
                hypothesis.ids.push(token);
                hypothesis.logprobs.extend(logprobs.get(i));
                match listener.token(Chosen { so_far: hypothesis, token, row })? {
                    After::Finish => hypothesis.finish = Finish::Stopped,
                    After::Continue => {
                        going.push(i);
                        continue;
                    }
                }
            }
            hypothesis.score += task.controls.finish(&live.controls, i)?;
        }
        let cancelled = listener.step(tokens.len() as u64) == Flow::Stop;
        let full = live.room(task)? <= unread.len() as i64;
        let reason = match (step + 1 == task.max_new_tokens, full, cancelled) {
            (true, _, _) => Some(Finish::Length),
            (_, true, _) => Some(Finish::Context),
            (_, _, true) => Some(Finish::Cancelled),
            _ => None,
        };
        if unread.len() > 0 && (reason.is_some() || going.len() < rows.len()) {
            unread.read(task, &mut live, &rows, &mut hypotheses)?;
            note(&live.logits, &tokens, &rows, &mut hypotheses)?;
        }
        if let Some(reason) = reason {
            for &i in &going {
                hypotheses[rows[i]].finish = reason.clone();
                hypotheses[rows[i]].score += task.controls.finish(&live.controls, i)?;
            }
            break;
        }
        if going.is_empty() {
            break;
        }
        if going.len() < rows.len() {
            live.reorder(&going.iter().map(|&i| i as i64).collect::<Vec<_>>())?;
            rows = going.iter().map(|&i| rows[i]).collect();
        }
        unread.push(going.iter().map(|&i| tokens[i]).collect());
    }
    Ok(hypotheses)
}
