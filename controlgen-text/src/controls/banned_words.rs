//! Banned words and phrases.

use std::sync::Arc;

use controlgen_core::{Result, Rows, TokenControl};
use tch::Tensor;

use super::check;
use super::phrases::Phrases;
use super::scores::{self, Prepared, TokenSet};
use crate::tokenizer::Tokenizer;

/// Bans words, given as sequences of token ids: of each sequence the last token is banned where the history, prompt
/// included, ends with the tokens before it. A sequence of one token is always banned.
///
/// A word has several spellings in tokens, with and without a leading space for one: ban each. A ban on an
/// end-of-text id holds like any other.
///
/// *Cost*: one write to the banned cells; the history is followed by an automaton, in constant time a token.
#[derive(Clone, Debug)]
pub struct BannedWords {
    /// Sequences of one token.
    single: Option<TokenSet>,
    phrases: Arc<Phrases<()>>,
    largest: i64,
}

impl BannedWords {
    /// One or more sequences of one or more token ids.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for no sequences, empty ones and negative ids; `score` returns
    /// it for ids that the vocabulary lacks.
    pub fn new(words: impl IntoIterator<Item: AsRef<[i64]>>) -> Result<Self> {
        const WHAT: &str = "banned words";
        let words: Vec<Vec<i64>> = words.into_iter().map(|word| word.as_ref().to_vec()).collect();
        check::at_least_one(WHAT, "sequence", words.len())?;
        words.iter().try_for_each(|word| check::sequence(WHAT, word))?;
        let single: Vec<i64> = words.iter().filter(|word| word.len() == 1).map(|word| word[0]).collect();
        let single = if single.is_empty() { None } else { Some(TokenSet::new(WHAT, single)?) };
        Ok(Self {
            single,
            phrases: Arc::new(Phrases::new(words.iter().map(|word| (word.as_slice(), ())))),
            largest: words.iter().flatten().copied().max().unwrap_or(0),
        })
    }

    /// Bans words, in every spelling of [`Tokenizer::spellings`].
    ///
    /// # Errors
    /// As there, and as [`BannedWords::new`].
    pub fn words<S: AsRef<str>>(tokenizer: &Tokenizer, words: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut spelled = Vec::new();
        for word in words {
            spelled.extend(tokenizer.spellings(word.as_ref())?);
        }
        Self::new(spelled)
    }
}

/// The rows' places in sequences.
pub struct BannedWordsState {
    single: Prepared,
    nodes: Vec<usize>,
}

impl Rows for BannedWordsState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.nodes.reorder(rows)
    }
}

impl TokenControl for BannedWords {
    type State = BannedWordsState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<BannedWordsState> {
        let nodes = scores::start_rows(prompts, |prompt| self.phrases.start(prompt))?;
        Ok(BannedWordsState { single: Prepared::default(), nodes })
    }

    fn score(&self, state: &mut BannedWordsState, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.nodes.len())?;
        scores::in_vocabulary("banned words", self.largest, vocab)?;
        if let Some(single) = &self.single {
            single.ban(&mut state.single, &mut logits)?;
        }
        let completions = |(row, &node): (i64, &usize)| {
            self.phrases.completions(node).iter().map(move |(token, ())| row * vocab + token)
        };
        let cells: Vec<i64> = scores::numbered(&state.nodes).flat_map(completions).collect();
        scores::ban_cells(&logits, &cells)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut BannedWordsState, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.nodes, tokens, |node, token| *node = self.phrases.next(*node, token))
    }
}
