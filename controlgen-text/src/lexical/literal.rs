//! What constraints are made of.

use std::fmt;

use controlgen_core::{Error, Result};

/// What a text says of words. Each word is one or more phrases, its inflections for one, that count as the same.
///
/// A literal settles as the text grows: at least so often is *true for good* once it was said so often; at most so
/// often holds until it was said once more, and is *false for good* then; before holds until the first of either, which
/// settles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Literal(pub(super) Says);

/// A literal over words of any kind: as they are given, or their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Says<W = Vec<String>> {
    AtLeast(u16, W),
    AtMost(u16, W),
    Before(W, W),
}

impl Literal {
    /// The text says the word.
    ///
    /// # Errors
    /// [`Error::Value`] for no phrases and for one without a character that is no space.
    pub fn said<S: Into<String>>(word: impl IntoIterator<Item = S>) -> Result<Self> {
        Self::at_least(1, word)
    }

    /// The text does not say the word.
    ///
    /// # Errors
    /// As [`Literal::said`].
    pub fn never<S: Into<String>>(word: impl IntoIterator<Item = S>) -> Result<Self> {
        Self::at_most(0, word)
    }

    /// The text says the word `count` times or more; 1 or more.
    ///
    /// # Errors
    /// As [`Literal::said`]; [`Error::Value`] for a count of 0.
    pub fn at_least<S: Into<String>>(count: u16, word: impl IntoIterator<Item = S>) -> Result<Self> {
        if count == 0 {
            return Err(Error::value("least count of a word", "at least 1", 0));
        }
        Ok(Self(Says::AtLeast(count, phrases(word)?)))
    }

    /// The text says the word `count` times or less.
    ///
    /// # Errors
    /// As [`Literal::said`]; [`Error::Value`] for a count of 65535.
    pub fn at_most<S: Into<String>>(count: u16, word: impl IntoIterator<Item = S>) -> Result<Self> {
        if count == u16::MAX {
            return Err(Error::value("greatest count of a word", format!("0 .. {}", u16::MAX), count));
        }
        Ok(Self(Says::AtMost(count, phrases(word)?)))
    }

    /// The text does not say `second` before it has said `first`. It need not say either: that is for other clauses.
    ///
    /// # Errors
    /// As [`Literal::said`].
    pub fn before<S: Into<String>>(
        first: impl IntoIterator<Item = S>,
        second: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        Ok(Self(Says::Before(phrases(first)?, phrases(second)?)))
    }
}

fn phrases<S: Into<String>>(word: impl IntoIterator<Item = S>) -> Result<Vec<String>> {
    let word: Vec<String> = word.into_iter().map(Into::into).collect();
    if word.is_empty() {
        return Err(Error::value("phrases of a word", "at least one", "none"));
    }
    match word.iter().find(|phrase| phrase.trim().is_empty()) {
        None => Ok(word),
        Some(phrase) => {
            Err(Error::value("phrase", "at least one character that is no space", format!("{phrase:?}")))
        }
    }
}

/// Written as `dog`, and `!dog`; the phrases of a word with `/` between them.
impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Says::AtLeast(1, word) => write!(f, "{}", word.join("/")),
            Says::AtLeast(count, word) => write!(f, "{} at least {count} times", word.join("/")),
            Says::AtMost(0, word) => write!(f, "!{}", word.join("/")),
            Says::AtMost(count, word) => write!(f, "{} at most {count} times", word.join("/")),
            Says::Before(first, second) => write!(f, "{} before {}", first.join("/"), second.join("/")),
        }
    }
}

/// Literals of which at least one is to hold.
///
/// Made of literals, or of texts, of which `"!word"` is negative; what is wrong with them is told when [`Clauses`] are
/// made of it.
///
/// [`Clauses`]: super::Clauses
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause(pub(super) Vec<Literal>);

impl Clause {
    /// Some of these phrases occurs, or some of those with a `!` before them does not.
    #[must_use]
    pub fn any<S: AsRef<str>>(phrases: impl IntoIterator<Item = S>) -> Self {
        phrases.into_iter().fold(Self::default(), |clause, phrase| {
            let phrase = phrase.as_ref();
            clause.or(Literal(match phrase.strip_prefix('!') {
                Some(banned) => Says::AtMost(0, vec![banned.to_owned()]),
                None => Says::AtLeast(1, vec![phrase.to_owned()]),
            }))
        })
    }

    /// Or this literal.
    #[must_use]
    pub fn or(mut self, literal: Literal) -> Self {
        self.0.push(literal);
        self
    }
}

impl From<Literal> for Clause {
    fn from(literal: Literal) -> Self {
        Self(vec![literal])
    }
}

impl From<&str> for Clause {
    fn from(phrase: &str) -> Self {
        Self::any([phrase])
    }
}

/// The literals, with "or" between them.
impl fmt::Display for Clause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let literals: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&literals.join(" or "))
    }
}
