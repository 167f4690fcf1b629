//! No repeated n-grams.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use controlgen_core::{Result, TokenControl};
use tch::Tensor;

use super::{check, scores};

/// Bans every token that would complete an n-gram that the history, prompt included, already holds. Paulus, Xiong and
/// Socher, "A Deep Reinforced Model for Abstractive Summarization" (ICLR 2018), section 2.5, with n = 3.
///
/// With n = 1 no token occurs twice.
///
/// *Cost*: one write to the banned cells; what followed each run of n − 1 tokens is remembered, the history is not
/// searched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRepeatNgram {
    n: usize,
}

impl NoRepeatNgram {
    /// `n` of at least 1.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn new(n: usize) -> Result<Self> {
        Ok(Self { n: check::count("no_repeat_ngram_size", n)? })
    }
}

/// A history and its n-grams. Forks share it until they differ.
#[derive(Clone, Default)]
pub struct Ngrams(Arc<Index>);

/// N-grams with different last tokens and the same tokens before form a chain; flat, so that a copy is cheap.
#[derive(Clone, Default)]
struct Index {
    tokens: Vec<i64>,
    /// By the hash of the tokens before the last: the chain's latest link.
    latest: HashMap<u64, usize>,
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    /// Where the n-gram begins.
    begin: usize,
    /// The next link of the chain.
    earlier: Option<usize>,
}

impl Index {
    fn push(&mut self, n: usize, token: i64) {
        self.tokens.push(token);
        let Some(begin) = self.tokens.len().checked_sub(n) else { return };
        let before = &self.tokens[begin..begin + n - 1];
        if !self.followers(before).any(|follower| follower == token) {
            let link = self.links.len();
            let earlier = self.latest.insert(hash(before), link);
            self.links.push(Link { begin, earlier });
        }
    }

    /// The tokens that followed these, each once.
    fn followers<'a>(&'a self, before: &'a [i64]) -> impl Iterator<Item = i64> + 'a {
        let mut at = self.latest.get(&hash(before)).copied();
        std::iter::from_fn(move || {
            let link = self.links[at?];
            at = link.earlier;
            Some(link.begin)
        })
        // Different tokens may have the same hash.
        .filter(|&begin| self.tokens[begin..].starts_with(before))
        .map(|begin| self.tokens[begin + before.len()])
    }

    /// The tokens that would repeat an n-gram.
    fn banned(&self, n: usize) -> impl Iterator<Item = i64> {
        let begin = (self.tokens.len() + 1).checked_sub(n);
        begin.into_iter().flat_map(|begin| self.followers(&self.tokens[begin..]))
    }
}

fn hash(tokens: &[i64]) -> u64 {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    hasher.finish()
}

impl TokenControl for NoRepeatNgram {
    type State = Vec<Ngrams>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Vec<Ngrams>> {
        scores::start_rows(prompts, |prompt| {
            let mut index = Index::default();
            prompt.iter().for_each(|&token| index.push(self.n, token));
            Ngrams(Arc::new(index))
        })
    }

    fn score(&self, state: &mut Vec<Ngrams>, logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.len())?;
        let mut cells = Vec::new();
        for (row, ngrams) in scores::numbered(state) {
            // Tokens beyond the vocabulary, which some models have as inputs, can not be chosen.
            let banned = ngrams.0.banned(self.n).filter(|&token| token < vocab);
            cells.extend(banned.map(|token| row * vocab + token));
        }
        scores::ban_cells(&logits, &cells)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Vec<Ngrams>, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(state, tokens, |ngrams, token| {
            Arc::make_mut(&mut ngrams.0).push(self.n, token);
        })
    }
}
