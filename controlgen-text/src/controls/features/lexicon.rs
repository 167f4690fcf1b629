//! Words with values: wanted and unwanted ones, sentiment, concreteness.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use controlgen_core::{Error, Result};

use super::Feature;
use crate::controls::check;
use crate::words::is_word;

/// The value that a word has in a table, 0 for words that it lacks: sentiment, concreteness, any score of words.
#[derive(Clone, Debug, PartialEq)]
pub struct Lexicon {
    values: BTreeMap<Arc<str>, f64>,
    left_out: usize,
}

impl Lexicon {
    /// Words with their values, in whatever case. What is no single word (a phrase, a part with a hyphen) never occurs as
    /// one, and is left out; [`left_out`](Self::left_out) counts it.
    ///
    /// # Errors
    /// [`Error::Value`] where no word is left, for a value that is no finite number, and for a word with two values.
    pub fn new<S: AsRef<str>>(words: impl IntoIterator<Item = (S, f64)>) -> Result<Self> {
        let (mut values, mut left_out) = (BTreeMap::new(), 0);
        for (word, value) in words {
            let word = word.as_ref().to_lowercase();
            check::number(&format!("value of {word:?}"), "a finite number", value, value.is_finite())?;
            if word.is_empty() || !word.chars().all(is_word) {
                left_out += 1;
                continue;
            }
            if let Some(other) =
                values.insert(Arc::from(word.as_str()), value).filter(|other| *other != value)
            {
                return Err(Error::value(
                    format!("value of {word:?}"),
                    "one",
                    format!("{other} and {value}"),
                ));
            }
        }
        check::at_least_one("words of a lexicon", "word", values.len())?;
        Ok(Self { values, left_out })
    }

    /// A file with a word or phrase, a tab and its value on each line, as AFINN's; empty lines and those that begin with
    /// `#` are passed over.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a line of another form, which it names; as [`Lexicon::new`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        let lines =
            (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        let words = lines.map(|(number, line)| {
            let entry = line.rsplit_once('\t').and_then(|(word, value)| {
                Some((word.trim(), value.trim().parse().ok().filter(|value: &f64| value.is_finite())?))
            });
            entry.ok_or_else(|| {
                let problem = format!("line {number}: expected a word, a tab and a number, found {line:?}");
                Error::format(path, problem)
            })
        });
        Self::new(words.collect::<Result<Vec<(&str, f64)>>>()?)
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// How many entries were no single words.
    pub fn left_out(&self) -> usize {
        self.left_out
    }
}

impl Feature for Lexicon {
    fn value(&self, word: &str, _before: &[Arc<str>]) -> f64 {
        self.values.get(word).copied().unwrap_or(0.0)
    }

    fn key(&self, _before: &[Arc<str>]) -> Option<u64> {
        Some(0)
    }

    fn beginning_with(&self, prefix: &str, _before: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
        let from = self.values.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        Some(from.map(|(word, _)| word).take_while(|word| word.starts_with(prefix)).cloned().collect())
    }
}

/// 1 for the words of a list, else 0: wanted words with a positive weight, unwanted ones with a negative one.
#[derive(Clone, Debug, PartialEq)]
pub struct WordList(Lexicon);

impl WordList {
    /// One or more words, in whatever case.
    ///
    /// # Errors
    /// [`Error::Value`] for none, and for one that is not a single word.
    pub fn new<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> Result<Self> {
        let words: Vec<S> = words.into_iter().collect();
        if let Some(other) =
            words.iter().map(S::as_ref).find(|word| word.is_empty() || !word.chars().all(is_word))
        {
            return Err(Error::value("word of a list", "a single word", format!("{other:?}")));
        }
        Ok(Self(Lexicon::new(words.iter().map(|word| (word, 1.0)))?))
    }
}

impl Feature for WordList {
    fn value(&self, word: &str, before: &[Arc<str>]) -> f64 {
        self.0.value(word, before)
    }

    fn key(&self, before: &[Arc<str>]) -> Option<u64> {
        self.0.key(before)
    }

    fn beginning_with(&self, prefix: &str, before: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
        self.0.beginning_with(prefix, before)
    }
}
