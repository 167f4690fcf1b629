//! Repetition.

use std::collections::HashSet;
use std::sync::Arc;

use super::Feature;

/// How often the word was said before, the prompt included: with a negative weight, fewer words come again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repetition {
    except: HashSet<String>,
}

impl Repetition {
    /// Of all words.
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves words out of account, in whatever case: articles, pronouns.
    #[must_use]
    pub fn except<S: AsRef<str>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.except.extend(words.into_iter().map(|word| word.as_ref().to_lowercase()));
        self
    }
}

impl Feature for Repetition {
    fn value(&self, word: &str, before: &[Arc<str>]) -> f64 {
        if self.except.contains(word) {
            return 0.0;
        }
        before.iter().filter(|other| &***other == word).count() as f64
    }

    fn beginning_with(&self, prefix: &str, before: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
        let mut found: Vec<Arc<str>> = before
            .iter()
            .filter(|word| word.starts_with(prefix) && !self.except.contains(&***word))
            .cloned()
            .collect();
        found.sort_unstable();
        found.dedup();
        Some(found)
    }
}
