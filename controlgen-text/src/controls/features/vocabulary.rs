//! What the tokens of a vocabulary do to words.

use std::collections::HashMap;
use std::sync::Arc;

use crate::words::{TokenTrie, is_word};

/// A text as its words: what a row of features remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Text {
    /// The words that have ended. Forks share them.
    pub(super) before: Arc<Vec<Arc<str>>>,
    /// The word that the text ends with, which may go on.
    pub(super) word: String,
    /// The bytes of a character that is not complete.
    pub(super) pending: Vec<u8>,
}

impl Text {
    /// Reads more bytes; what can be no character ends a word.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(bytes);
        let mut chunks = all.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            chunk.valid().chars().for_each(|c| self.read(c));
            let invalid = chunk.invalid();
            let cut_off = chunks.peek().is_none()
                && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if cut_off {
                self.pending = invalid.to_vec();
            } else if !invalid.is_empty() {
                self.end();
            }
        }
    }

    fn read(&mut self, c: char) {
        if is_word(c) {
            self.word.extend(c.to_lowercase());
        } else {
            self.end();
        }
    }

    fn end(&mut self) {
        if !self.word.is_empty() {
            let word = std::mem::take(&mut self.word);
            Arc::make_mut(&mut self.before).push(word.into());
        }
    }

    /// The same with its last word ended.
    pub(super) fn ended(&self) -> Self {
        let mut ended = self.clone();
        ended.pending.clear();
        ended.end();
        ended
    }
}

/// What a token does.
#[derive(Debug)]
pub(super) enum Kind {
    /// No word character.
    Silent,
    /// Goes on with a word by these, or begins one, and says no other.
    Head(Box<str>),
    /// Begins this word after characters that are none of a word, and says no other.
    Fresh(Box<str>),
    /// Has several words, or parts of characters.
    Odd,
}

/// The tokens, and where to find those that do a certain thing.
pub(super) struct Vocabulary {
    trie: TokenTrie,
    pub(super) kinds: Vec<Kind>,
    /// The tokens of [`Kind::Head`], rising.
    pub(super) continuing: Vec<u32>,
    pub(super) odd: Vec<u32>,
    heads: HashMap<Box<str>, Vec<u32>>,
    fresh: HashMap<Box<str>, Vec<u32>>,
}

impl Vocabulary {
    pub(super) fn new(trie: &TokenTrie) -> Self {
        let kinds: Vec<Kind> = (0..trie.vocab_size()).map(|token| kind(trie.bytes(token))).collect();
        let those = |wanted: fn(&Kind) -> bool| -> Vec<u32> {
            (0..).zip(&kinds).filter(|(_, kind)| wanted(kind)).map(|(token, _)| token).collect()
        };
        let mut heads: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        let mut fresh: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        for (token, kind) in (0..).zip(&kinds) {
            match kind {
                Kind::Head(word) => heads.entry(word.clone()).or_default().push(token),
                Kind::Fresh(word) => fresh.entry(word.clone()).or_default().push(token),
                Kind::Silent | Kind::Odd => {}
            }
        }
        let continuing = those(|kind| matches!(kind, Kind::Head(_)));
        let odd = those(|kind| matches!(kind, Kind::Odd));
        Self { trie: trie.clone(), continuing, odd, heads, fresh, kinds }
    }

    /// The tokens that go on with these characters and nothing else.
    pub(super) fn heads(&self, word: &str) -> &[u32] {
        self.heads.get(word).map_or(&[], Vec::as_slice)
    }

    /// The tokens that begin this word.
    pub(super) fn fresh(&self, word: &str) -> &[u32] {
        self.fresh.get(word).map_or(&[], Vec::as_slice)
    }

    pub(super) fn bytes(&self, token: u32) -> &[u8] {
        self.trie.bytes(i64::from(token))
    }

    /// None for a token that the tokenizer lacks.
    pub(super) fn bytes_of(&self, token: i64) -> &[u8] {
        self.trie.bytes(token)
    }
}

fn kind(bytes: &[u8]) -> Kind {
    let Ok(text) = std::str::from_utf8(bytes) else { return Kind::Odd };
    let mut words = text.split(|c: char| !is_word(c)).filter(|word| !word.is_empty());
    match (words.next(), words.next()) {
        (None, _) => Kind::Silent,
        (Some(_), Some(_)) => Kind::Odd,
        (Some(word), None) => {
            let lower = word.to_lowercase().into();
            if text.chars().next().is_some_and(is_word) { Kind::Head(lower) } else { Kind::Fresh(lower) }
        }
    }
}
