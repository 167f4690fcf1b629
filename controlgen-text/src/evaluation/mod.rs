//! Measures of generated texts: how many wanted words they say, how fluent, how varied, how long they are.
//!
//! All but the perplexity see a text as its [`words`]: lower case, punctuation left out.
//!
//! | measure | of | what it is |
//! |---|---|---|
//! | [`coverage`] | texts and the concepts wanted of each | mean number and share of concepts said, share of texts that say all |
//! | [`Judge`], [`perplexity`] | texts after a prompt | exp of the mean negative log-probability of a token |
//! | [`distinct_n`] | texts together | different n-grams over all n-grams |
//! | [`self_bleu`] | texts together | how much of each is in the others |
//! | [`mean_words`] | texts | words in a text |
//!
//! ```
//! use controlgen_text::evaluation::{Concept, coverage, distinct_n};
//!
//! let concepts = vec![Concept::new(["dog", "dogs"])?, Concept::new(["run", "ran", "running"])?];
//! let texts = ["The dogs ran home.", "Running is fun."];
//! let covered = coverage(&texts, &[concepts.clone(), concepts])?;
//! assert_eq!((covered.count, covered.percent), (1.5, 50.0));
//! assert_eq!(distinct_n(&texts, 1)?, 1.0);
//! # Ok::<(), controlgen_core::Error>(())
//! ```

mod coverage;
mod diversity;
mod fluency;

pub use coverage::{Concept, Coverage, coverage};
pub use diversity::{distinct_n, self_bleu};
pub use fluency::{Judge, Likelihood, mean_perplexity, perplexity};

use controlgen_core::{Error, Result};

use crate::words::is_word;

/// The words of a text: runs of word characters (Unicode's `\w`: letters, marks, digits, `_`), in lower case. `don't` is
/// two.
pub fn words(text: &str) -> Vec<String> {
    let runs = text.split(|c: char| !is_word(c)).filter(|run| !run.is_empty());
    runs.map(str::to_lowercase).collect()
}

/// The mean number of words in a text.
///
/// # Errors
/// [`Error::Value`] for no texts.
pub fn mean_words(texts: &[impl AsRef<str>]) -> Result<f64> {
    some(texts)?;
    let all: usize = texts.iter().map(|text| words(text.as_ref()).len()).sum();
    Ok(all as f64 / texts.len() as f64)
}

/// Refuses a mean over nothing.
fn some<T>(texts: &[T]) -> Result<()> {
    if texts.is_empty() { Err(Error::value("texts", "at least one", "none")) } else { Ok(()) }
}
