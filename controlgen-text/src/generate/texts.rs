//! Tokens into text while a search runs.

use std::time::Instant;

use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::{Result, Rows};

use super::{Completion, OnText, Piece};
use crate::search::{After, Chosen, Hypothesis, Listener};
use crate::tokenizer::{StopStrings, TextStream, Tokenizer};

/// One completion's text as it grows. A clone continues on its own.
#[derive(Clone)]
struct Text {
    tokenizer: Tokenizer,
    stream: TextStream,
    stop: StopStrings,
}

impl Text {
    fn new(tokenizer: &Tokenizer, stop: &StopStrings) -> Self {
        Self { tokenizer: tokenizer.handle(), stream: TextStream::new(tokenizer, true), stop: stop.clone() }
    }

    /// The text that a token makes final.
    fn push(&mut self, token: i64) -> Result<String> {
        // A model whose vocabulary was padded has ids that are no token's: they have no text, as in transformers.
        let decoded = match self.tokenizer.id_to_token(token) {
            Some(_) => self.stream.push(token)?,
            None => String::new(),
        };
        Ok(self.stop.push(&decoded))
    }

    /// The rest of the text, and which stop string ended it.
    fn finish(&mut self) -> Result<(String, Option<usize>)> {
        let mut rest = self.stop.push(&self.stream.finish()?);
        let hit = self.stop.hit().map(|hit| hit.index);
        if hit.is_none() {
            rest.push_str(&self.stop.finish());
        }
        Ok((rest, hit))
    }

    fn after(&self) -> After {
        if self.stop.hit().is_some() { After::Finish } else { After::Continue }
    }
}

/// Who is told of steps, and may stop the run.
pub(super) struct Watch<'a> {
    pub(super) on_step: Option<Box<dyn FnMut(u64) -> Flow + 'a>>,
    pub(super) cancel: Option<CancelToken>,
    /// When the first tokens were there.
    pub(super) prefilled: Option<Instant>,
}

impl Watch<'_> {
    fn step(&mut self, tokens: u64) -> Flow {
        self.prefilled.get_or_insert_with(Instant::now);
        let cancelled = self.cancel.as_ref().is_some_and(CancelToken::is_cancelled);
        let flow = self.on_step.as_mut().map_or(Flow::Continue, |on_step| on_step(tokens));
        if cancelled { Flow::Stop } else { flow }
    }
}

/// The texts of a search that takes nothing back, given out as they come.
pub(super) struct Texts<'a, 'w> {
    rows: Vec<(Text, String)>,
    on_text: Option<OnText<'a>>,
    watch: &'w mut Watch<'a>,
}

impl<'a, 'w> Texts<'a, 'w> {
    pub(super) fn new(
        count: usize,
        tokenizer: &Tokenizer,
        stop: &StopStrings,
        on_text: Option<OnText<'a>>,
        watch: &'w mut Watch<'a>,
    ) -> Self {
        let rows = (0..count).map(|_| (Text::new(tokenizer, stop), String::new())).collect();
        Self { rows, on_text, watch }
    }

    fn emit(&mut self, completion: usize, piece: &str) {
        if piece.is_empty() {
            return;
        }
        self.rows[completion].1.push_str(piece);
        if let Some(on_text) = &mut self.on_text {
            on_text(Piece { completion, text: piece });
        }
    }

    pub(super) fn complete(
        mut self,
        hypotheses: Vec<Hypothesis>,
        stop: &[String],
    ) -> Result<Vec<Completion>> {
        let mut completions = Vec::with_capacity(hypotheses.len());
        for (i, hypothesis) in hypotheses.into_iter().enumerate() {
            let (rest, hit) = self.rows[i].0.finish()?;
            self.emit(i, &rest);
            let text = std::mem::take(&mut self.rows[i].1);
            completions.push(completion(hypothesis, text, hit, stop));
        }
        Ok(completions)
    }
}

impl Listener for Texts<'_, '_> {
    fn token(&mut self, chosen: Chosen<'_>) -> Result<After> {
        self.watch.prefilled.get_or_insert_with(Instant::now);
        let text = &mut self.rows[chosen.row].0;
        let piece = text.push(chosen.token)?;
        let after = text.after();
        self.emit(chosen.row, &piece);
        Ok(after)
    }

    fn step(&mut self, tokens: u64) -> Flow {
        self.watch.step(tokens)
    }
}

/// The texts of a search that takes text back, followed only as far as stop strings need it: what is final is known at the end.
pub(super) struct ForkingTexts<'a, 'w> {
    /// None where there are no stop strings.
    rows: Vec<Text>,
    start: Text,
    watch: &'w mut Watch<'a>,
}

impl<'a, 'w> ForkingTexts<'a, 'w> {
    /// `stop` are the strings that `matcher` looks for.
    pub(super) fn new(
        prompts: usize,
        tokenizer: &Tokenizer,
        matcher: &StopStrings,
        stop: &[String],
        watch: &'w mut Watch<'a>,
    ) -> Self {
        let start = Text::new(tokenizer, matcher);
        let rows = if stop.is_empty() { Vec::new() } else { vec![start.clone(); prompts] };
        Self { rows, start, watch }
    }

    pub(super) fn complete(self, hypotheses: Vec<Hypothesis>, stop: &[String]) -> Result<Vec<Completion>> {
        let complete = |hypothesis: Hypothesis| {
            let mut stream = self.start.clone();
            let mut text = String::new();
            for &id in &hypothesis.ids {
                text.push_str(&stream.push(id)?);
            }
            let (rest, hit) = stream.finish()?;
            Ok(completion(hypothesis, text + &rest, hit, stop))
        };
        hypotheses.into_iter().map(complete).collect()
    }
}

impl Listener for ForkingTexts<'_, '_> {
    fn token(&mut self, chosen: Chosen<'_>) -> Result<After> {
        let Some(text) = self.rows.get_mut(chosen.row) else { return Ok(After::Continue) };
        text.push(chosen.token)?;
        Ok(text.after())
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        if self.rows.is_empty() { Ok(()) } else { self.rows.reorder(rows) }
    }

    fn step(&mut self, tokens: u64) -> Flow {
        self.watch.step(tokens)
    }
}

fn completion(hypothesis: Hypothesis, text: String, hit: Option<usize>, stop: &[String]) -> Completion {
    Completion {
        prompt: hypothesis.prompt,
        ids: hypothesis.ids,
        text,
        logprobs: hypothesis.logprobs,
        score: hypothesis.score,
        finish: hypothesis.finish,
        unmet: hypothesis.unmet,
        stopped_by: hit.and_then(|hit| stop.get(hit).cloned()),
    }
}
