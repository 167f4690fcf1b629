//! Coverage: how many of the wanted words are said.

use std::collections::HashSet;

use controlgen_core::{Error, Result};

use super::{some, words};

/// A word that a text should say, in any of its forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Concept {
    /// Each as its words: a form may be a phrase.
    forms: Vec<Vec<String>>,
}

impl Concept {
    /// One or more forms, inflections of one word: any will do. Case is of no account.
    ///
    /// # Errors
    /// [`Error::Value`] for no forms, and for one without a letter or a digit.
    pub fn new<S: AsRef<str>>(forms: impl IntoIterator<Item = S>) -> Result<Self> {
        let forms = forms
            .into_iter()
            .map(|form| match words(form.as_ref()) {
                words if words.is_empty() => Err(Error::value(
                    "form of a concept",
                    "at least one word",
                    format!("{:?}", form.as_ref()),
                )),
                words => Ok(words),
            })
            .collect::<Result<Vec<_>>>()?;
        if forms.is_empty() {
            return Err(Error::value("concept", "at least one form", "none"));
        }
        Ok(Self { forms })
    }

    /// Whether a text says it: one of its forms, as whole words.
    pub fn is_in(&self, text: &str) -> bool {
        self.is_among(&words(text))
    }

    fn is_among(&self, said: &[String]) -> bool {
        self.forms.iter().any(|form| said.windows(form.len()).any(|window| window == form.as_slice()))
    }
}

/// How much of what was wanted is said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coverage {
    /// The mean number of its concepts that a text says.
    pub count: f64,
    /// The share of texts that say all of their concepts, in per cent.
    pub percent: f64,
    /// The mean share of its concepts that a text says, in per cent: CommonGen's coverage.
    pub share: f64,
}

/// The coverage of texts, each with its own concepts, whole words in any of their forms. Lin et al., "CommonGen" (EMNLP
/// Findings 2020), section 4, and Kumar, Paria and Tsvetkov, "Gradient-based constrained sampling from language models"
/// (EMNLP 2022), section 4.3.
///
/// # Errors
/// [`Error::Value`] for no texts, not one set of concepts a text, and for an empty set or the same concept twice in one.
pub fn coverage(texts: &[impl AsRef<str>], concepts: &[Vec<Concept>]) -> Result<Coverage> {
    some(texts)?;
    if texts.len() != concepts.len() {
        return Err(Error::value("sets of concepts", format!("{}, one a text", texts.len()), concepts.len()));
    }
    let (mut count, mut all, mut share) = (0usize, 0usize, 0.0);
    for (i, (text, set)) in texts.iter().zip(concepts).enumerate() {
        let different: HashSet<&Vec<Vec<String>>> = set.iter().map(|concept| &concept.forms).collect();
        if set.is_empty() || different.len() < set.len() {
            let found = if set.is_empty() { "none" } else { "one of them twice" };
            return Err(Error::value(format!("concepts of text {i}"), "one or more, all different", found));
        }
        let said = words(text.as_ref());
        let covered = set.iter().filter(|concept| concept.is_among(&said)).count();
        count += covered;
        all += usize::from(covered == set.len());
        share += covered as f64 / set.len() as f64;
    }
    let n = texts.len() as f64;
    Ok(Coverage { count: count as f64 / n, percent: 100.0 * all as f64 / n, share: 100.0 * share / n })
}
