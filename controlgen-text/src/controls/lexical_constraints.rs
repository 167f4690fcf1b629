//! Lexical constraints as a mask, and as a potential.

use controlgen_core::{Result, Rows, TokenControl};
use tch::Tensor;

use super::check;
use super::scores::{self, Prepared, TokenSet};
use crate::lexical::{Clauses, ClausesOf, Progress};
use crate::words::Edges;

/// Makes [`Clauses`] hold, under any search: the target is p(x) · 1\[x satisfies the clauses\].
///
/// In each step it bans
/// * the tokens that lose a clause for good, as the one that would complete a word which is not to be said;
/// * the end of the text, until all clauses hold;
/// * within a length ([`within`](Self::within)), the tokens after which too few are left for the words that are
///   missing. So that no words stand glued to the end, each missing occurrence counts as `gap` tokens more than it
///   takes: the last words are begun early, and the text has as many tokens to come back to itself after each.
///
/// A text that ends, by length for one, while a clause does not hold has a log-weight of −∞: searches that rank or
/// resample drop it. A length leaves out of the target the texts that come too late with their words. What cannot be reached within the length is not enforced; [`Clauses::unmet_after`] then tells what
/// is missing.
///
/// With a [`reward`](Self::reward) of λ nats the score of each token also has λ (φ(x₁ … xₜ) − φ(x₁ … xₜ₋₁)), where φ
/// is the number of clauses that hold, of those that do not the share of the word's characters that stand at the end.
/// It is a potential that telescopes: the log-weight at the end takes λ φ(x) back, so that sequential Monte Carlo still
/// has the target above, and is led to it (twisting functions: Naesseth, Lindsten and Schön, "Elements of Sequential
/// Monte Carlo" (2019), section 3.3; for language models: Zhao et al., "Probabilistic Inference in Language Models
/// via Twisted Sequential Monte Carlo" (ICML 2024)). Sampling alone, which weighs nothing at the end, is drawn towards
/// the words.
///
/// Under sampling, masks make another distribution than p(x) · 1\[…\], normalised: it is the model's, normalised anew
/// over the tokens left in each step. Sequential Monte Carlo corrects for it.
///
/// *Cost*: a few microseconds a row for the mask; with a reward, or near the end of a length, a pass over the tokens
/// that begin or continue a word (some hundreds for each).
#[derive(Clone, Debug)]
pub struct LexicalConstraints {
    clauses: ClausesOf,
    eos: TokenSet,
    length: Option<usize>,
    gap: usize,
    reward: f64,
}

impl LexicalConstraints {
    /// The clauses of all prompts, or of each ([`ClausesOf`]); `eos` are the tokens that end a text.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for no `eos` and for negative ones. `start` returns it where there are clauses for another
    /// number of prompts, `score` where the vocabulary lacks a token.
    pub fn new(clauses: impl Into<ClausesOf>, eos: impl IntoIterator<Item = i64>) -> Result<Self> {
        let eos = TokenSet::new("end-of-text tokens", eos)?;
        Ok(Self { clauses: clauses.into(), eos, length: None, gap: 3, reward: 0.0 })
    }

    /// Makes the clauses hold within so many new tokens; as many as the search may generate.
    #[must_use]
    pub fn within(self, max_new_tokens: usize) -> Self {
        Self { length: Some(max_new_tokens), ..self }
    }

    /// How many tokens that are free each missing occurrence is given, within a length: 3 unless said. Where the
    /// length is too short for it, less.
    #[must_use]
    pub fn gap(self, gap: usize) -> Self {
        Self { gap, ..self }
    }

    /// The reward λ for a clause, in nats; 0 unless said.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for a negative one, and one that is no finite number.
    pub fn reward(self, reward: f64) -> Result<Self> {
        let holds = reward.is_finite() && reward >= 0.0;
        Ok(Self {
            reward: check::number("reward of a clause", "a finite number >= 0", reward, holds)?,
            ..self
        })
    }
}

/// How far the rows have come.
pub struct LexicalConstraintsState {
    rows: Vec<Row>,
    /// On the device: the tokens that begin outside a word. Shared by all rows, whose vocabulary is one.
    outside: Prepared,
}

#[derive(Clone)]
struct Row {
    clauses: Clauses,
    progress: Progress,
    /// Tokens that are left, and the gap that they leave room for.
    left: Option<(usize, usize)>,
}

impl Rows for LexicalConstraintsState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.rows.reorder(rows)
    }
}

impl TokenControl for LexicalConstraints {
    type State = LexicalConstraintsState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        self.clauses.check(prompts.len())?;
        let start = |(i, prompt): (usize, &Vec<i64>)| {
            check::tokens(&format!("prompt {i}"), prompt)?;
            let clauses = self.clauses.get(i)?;
            let progress = clauses.start(prompt);
            let fits = |length: usize| {
                let room = |gap: &usize| clauses.need(&progress, *gap).is_some_and(|need| need <= length);
                (length, (0..=self.gap).rev().find(room).unwrap_or(0))
            };
            Ok(Row { clauses: clauses.clone(), left: self.length.map(fits), progress })
        };
        let rows = prompts.iter().enumerate().map(start).collect::<Result<_>>()?;
        Ok(LexicalConstraintsState { rows, outside: Prepared::default() })
    }

    fn score(&self, state: &mut Self::State, logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.rows.len())?;
        self.eos.check(vocab)?;
        let mut cells = Vec::new();
        for (i, row) in (0i64..).zip(&state.rows) {
            scores::in_vocabulary(
                "last token of the clauses' vocabulary",
                row.clauses.words().trie().vocab_size() - 1,
                vocab,
            )?;
            if self.reward > 0.0 {
                self.reward_row(row, &logits.f_get(i)?, &mut state.outside)?;
            }
            if !row.progress.lost().is_empty() {
                continue;
            }
            let (held, lost) = row.clauses.ended(&row.progress);
            if held != row.clauses.all() {
                cells.extend(self.eos.ids().iter().map(|&id| i * vocab + id));
            }
            for step in row.clauses.moves(&row.progress).iter().filter(|step| !step.words.is_empty()) {
                if !row.clauses.after(&row.progress, step).lost().is_empty() {
                    cells.push(i * vocab + step.token);
                }
            }
            if !lost.is_empty() && row.progress.place().is_between() {
                cells.extend(row.clauses.words().trie().outside().iter().map(|&token| i * vocab + token));
            }
            row.keep_reachable(&logits.f_get(i)?)?;
        }
        scores::ban_cells(&logits, &cells)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.rows, tokens, |row, token| {
            row.clauses.advance(&mut row.progress, token);
            if let Some((left, _)) = &mut row.left {
                *left = left.saturating_sub(1);
            }
        })
    }

    /// −∞ where a clause does not hold; else what takes the reward back.
    fn finish(&self, state: &Self::State, row: usize) -> Result<f64> {
        let Some(row) = state.rows.get(row) else { return Ok(0.0) };
        let (held, _) = row.clauses.ended(&row.progress);
        let began = row.clauses.worth(&row.clauses.start(&[]));
        let reward = self.reward * (row.clauses.worth(&row.progress) - began);
        Ok(if held == row.clauses.all() { -reward } else { f64::NEG_INFINITY })
    }
}

impl LexicalConstraints {
    /// Adds λ (φ after − φ before) to each token of a row `[V]`.
    fn reward_row(&self, row: &Row, scores: &Tensor, outside: &mut Prepared) -> Result<()> {
        let Row { clauses, progress, .. } = row;
        let now = clauses.worth(progress);
        // What all tokens change that lead to no word, and, where a word stands at the end, those that end it.
        let other = |edges: Edges| clauses.worth(&clauses.after_other(progress, edges)) - now;
        let [ends, goes_on] = [Edges::ALL[0], Edges::ALL[3]].map(other);
        if goes_on != 0.0 {
            let _ = scores.shallow_clone().f_add_scalar_(self.reward * goes_on)?;
        }
        let trie = clauses.words().trie();
        if ends != goes_on {
            let index = outside.get(scores.device(), || Ok(Tensor::f_from_slice(trie.outside())?))?;
            let step =
                Tensor::f_full([1], self.reward * (ends - goes_on), (scores.f_kind()?, scores.device()))?;
            let step = step.f_expand([index.numel() as i64], false)?;
            let _ = scores.shallow_clone().f_index_add_(0, index, &step)?;
        }
        let (mut tokens, mut values) = (Vec::new(), Vec::new());
        if goes_on != 0.0 {
            // Without text nothing changes. A model may have more tokens than its tokenizer.
            let vocab = scores.numel() as i64;
            tokens.extend(trie.silent().iter().copied().chain(trie.vocab_size()..vocab));
            values.resize(tokens.len(), (-self.reward * goes_on) as f32);
        }
        for step in clauses.moves(progress).iter() {
            let added = if trie.begins_outside(step.token) { ends } else { goes_on };
            let value = clauses.worth(&clauses.after(progress, step)) - now - added;
            if value != 0.0 {
                tokens.push(step.token);
                values.push((self.reward * value) as f32);
            }
        }
        scores::add_to_cells(scores, &tokens, &values)
    }
}

impl Row {
    /// Bans the tokens of a row `[V]` after which too few are left; none where all are such.
    fn keep_reachable(&self, scores: &Tensor) -> Result<()> {
        let Self { clauses, progress, left: Some((left, gap)) } = self else { return Ok(()) };
        let Some(after) = left.checked_sub(1) else { return Ok(()) };
        // No token makes it need more than everything anew.
        if clauses.most(*gap) <= after {
            return Ok(());
        }
        let fits = |progress: &Progress| clauses.need(progress, *gap).is_some_and(|need| need <= after);
        let others = Edges::ALL.map(|edges| fits(&clauses.after_other(progress, edges)));
        let silent = fits(progress);
        let moves = clauses.moves(progress);
        let (allowed, banned): (Vec<_>, Vec<_>) =
            moves.iter().partition(|step| fits(&clauses.after(progress, step)));
        let ids = |moves: &[&crate::words::Move]| moves.iter().map(|step| step.token).collect::<Vec<_>>();
        if others == [true; 4] && silent {
            return scores::ban_cells(scores, &ids(&banned));
        }
        let mut kept = ids(&allowed);
        let trie = clauses.words().trie();
        for (kind, _) in others.iter().enumerate().filter(|(_, fits)| **fits) {
            kept.extend(trie.of_kind(kind).iter().filter(|&&token| moves.get(token).is_none()));
        }
        if silent {
            kept.extend(trie.silent().iter().copied().chain(trie.vocab_size()..scores.numel() as i64));
        }
        if kept.is_empty() {
            return Ok(());
        }
        let kept = Tensor::f_from_slice(&kept)?.f_to_device(scores.device())?;
        let values = scores.f_index_select(0, &kept)?;
        let _ = scores.shallow_clone().f_fill_(f64::NEG_INFINITY)?.f_index_copy_(0, &kept, &values)?;
        Ok(())
    }
}
