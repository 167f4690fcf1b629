//! What a cheaper source thinks comes next, for [`Speculative`](super::Speculative) to verify.

use controlgen_core::noise::Stream;
use controlgen_core::{Error, LanguageModel, LmInput, Pass, Result, State, TokenControl, TokenControls};
use tch::{Kind, Tensor};

use super::{begin, next_logits};
use crate::sample;

/// Tokens that may come next.
#[derive(Default)]
pub(super) struct Drafted {
    pub(super) tokens: Vec<i64>,
    /// log q `[1, V]` that each was drawn from, f64; none where they were not drawn.
    pub(super) log_q: Vec<Tensor>,
}

/// The continuation of the latest place where the text said its last few tokens before, `ngram` of them or, if that was
/// never, fewer: prompt look-up. A copy that reaches the end of the text goes on with what it has copied.
pub(super) fn look_up(text: &[i64], ngram: usize, count: usize) -> Drafted {
    let place = (1..=ngram.min(text.len().saturating_sub(1))).rev().find_map(|n| {
        let last = &text[text.len() - n..];
        (0..text.len() - n).rev().find(|&at| &text[at..at + n] == last).map(|at| at + n)
    });
    let Some(place) = place else { return Drafted::default() };
    let mut tokens: Vec<i64> = Vec::with_capacity(count);
    for at in place..place + count {
        tokens.push(text.get(at).copied().unwrap_or_else(|| tokens[at - text.len()]));
    }
    Drafted { tokens, log_q: Vec::new() }
}

/// A smaller model, and what it has read of one text.
pub(super) struct DraftModel<'d> {
    lm: &'d dyn LanguageModel,
    controls: &'d TokenControls,
    state: State,
}

impl<'d> DraftModel<'d> {
    /// A model that has read nothing, or as an encoder–decoder the prompt.
    pub(super) fn new(
        lm: &'d dyn LanguageModel,
        controls: &'d TokenControls,
        prompt: &[i64],
    ) -> Result<Self> {
        let state = begin(lm, &[prompt.to_vec()], &Pass::default(), 0)?.state;
        Ok(Self { lm, controls, state })
    }

    /// The `count` tokens that it would say after the text, or as many as its context holds: drawn, or the most probable
    /// where there is no stream.
    pub(super) fn draft(
        &mut self,
        text: &[i64],
        count: usize,
        mut stream: Option<&mut Stream>,
    ) -> Result<Drafted> {
        // The last is not read.
        let context = usize::try_from(self.lm.spec().context).unwrap_or(usize::MAX);
        let count = count.min((context + 1).saturating_sub(text.len()));
        let mut drafted = Drafted::default();
        if count == 0 {
            return Ok(drafted);
        }
        let mut controls = self.controls.start(&[text.to_vec()])?;
        let read = usize::try_from(self.state.len()).unwrap_or(0);
        let mut logits = self.read(&text[read..])?;
        loop {
            if !self.controls.is_empty() {
                logits = self.controls.score(&mut controls, logits)?;
            }
            let token = match &mut stream {
                None => sample::greedy(&logits)?,
                Some(stream) => {
                    drafted.log_q.push(logits.f_log_softmax(-1, Kind::Double)?);
                    sample::categorical(&logits, &[stream.uniform()])?
                }
            };
            self.controls.advance(&mut controls, &token)?;
            drafted.tokens.extend(&token);
            if drafted.tokens.len() == count {
                return Ok(drafted);
            }
            logits = self.read(&token)?;
        }
    }

    /// Forgets what it has read beyond the text's first `len` tokens.
    pub(super) fn keep(&mut self, len: usize) -> Result<()> {
        self.state.truncate(self.state.len().min(i64::try_from(len).unwrap_or(i64::MAX)))
    }

    /// The logits `[1, V]` after these tokens, f32.
    fn read(&mut self, tokens: &[i64]) -> Result<Tensor> {
        let ids =
            Tensor::f_from_slice(tokens)?.f_unsqueeze(0)?.f_to_device(self.lm.spec().placement.device)?;
        let output = self.lm.forward(LmInput::ids(&ids).last(), &mut self.state, &Pass::default())?;
        next_logits(&output.logits)
    }
}

/// Refuses a draft of another vocabulary.
pub(super) fn check_vocabulary(lm: &dyn LanguageModel, draft: &dyn LanguageModel) -> Result<()> {
    let (expected, found) = (lm.spec().vocab, draft.spec().vocab);
    if expected == found {
        return Ok(());
    }
    Err(Error::value("vocabulary of the draft model", format!("{expected} tokens, as the model has"), found))
}
