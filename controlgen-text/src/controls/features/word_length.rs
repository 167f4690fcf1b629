//! The length of words.

use std::sync::Arc;

use super::Feature;

/// How many characters a word has. With a positive weight words are longer, with a negative one shorter; and as a word
/// is worth something, there are more of them: compare texts of as many words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WordLength;

impl Feature for WordLength {
    fn value(&self, word: &str, _before: &[Arc<str>]) -> f64 {
        word.chars().count() as f64
    }

    fn key(&self, _before: &[Arc<str>]) -> Option<u64> {
        Some(0)
    }
}
