//! What an expression is made of: a model, and what it reads.

use std::sync::atomic::{AtomicU64, Ordering};

use controlgen_core::{Error, LanguageModel, Result};

use crate::controls::in_vocabulary;
use crate::models;

/// log p(v | what it reads) of one model.
///
/// The terms that a term's methods make, and its clones, are over the same model: they are rows of one forward call. Two
/// terms of [`Term::new`] count as different models, whatever their weights. Of an encoder–decoder the prompt, or what stands
/// for it, is what the encoder reads.
pub struct Term {
    lm: Box<dyn LanguageModel>,
    pub(super) of: Identity,
    pub(super) reads: Reads,
    pub(super) temperature: f64,
}

/// Which model a term is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    model: u64,
    /// Of its first layers alone.
    layers: Option<usize>,
}

/// What stands before the tokens that are generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// A prefix, which may be empty, and the prompt.
    After(Vec<i64>),
    /// Another text.
    Instead(Vec<i64>),
    /// The prompt's last token.
    LastToken,
}

impl Reads {
    /// How many positions it takes more than the prompt, at most.
    pub(super) fn extra(&self) -> i64 {
        let len = |ids: &Vec<i64>| i64::try_from(ids.len()).unwrap_or(i64::MAX);
        match self {
            Self::After(prefix) => len(prefix),
            Self::Instead(text) => len(text) - 1,
            Self::LastToken => 0,
        }
    }
}

impl Clone for Term {
    fn clone(&self) -> Self {
        Self { lm: self.lm.handle(), reads: self.reads.clone(), ..*self }
    }
}

impl Term {
    /// What this model says after the prompt.
    pub fn new(lm: Box<dyn LanguageModel>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let of = Identity { model: NEXT.fetch_add(1, Ordering::Relaxed), layers: None };
        Self { lm, of, reads: Reads::After(Vec::new()), temperature: 1.0 }
    }

    /// What the model says after the prompt.
    #[must_use]
    pub fn prompt(&self) -> Self {
        self.after([])
    }

    /// What the model says after these tokens and the prompt: under an instruction.
    #[must_use]
    pub fn after(&self, prefix: impl Into<Vec<i64>>) -> Self {
        Self { reads: Reads::After(prefix.into()), ..self.clone() }
    }

    /// What the model says after these tokens in the prompt's place, and what has been generated.
    #[must_use]
    pub fn instead(&self, text: impl Into<Vec<i64>>) -> Self {
        Self { reads: Reads::Instead(text.into()), ..self.clone() }
    }

    /// What the model says after the last token of the prompt, and what has been generated.
    #[must_use]
    pub fn last_token(&self) -> Self {
        Self { reads: Reads::LastToken, ..self.clone() }
    }

    /// What the model's first `layers` blocks say, of what this term reads ([`models::first_layers`]): a model of its own.
    ///
    /// # Errors
    /// As there.
    pub fn first_layers(&self, layers: usize) -> Result<Self> {
        let lm = models::first_layers(&*self.lm, layers)?;
        let of = Identity { layers: Some(layers), ..self.of };
        Ok(Self { lm, of, ..self.clone() })
    }

    /// log of the softmax of the logits divided by τ. [`ModelArithmetic`](super::ModelArithmetic) refuses a τ that is not above 0.
    #[must_use]
    pub fn temperature(&self, temperature: f64) -> Self {
        Self { temperature, ..self.clone() }
    }

    /// The model.
    pub fn lm(&self) -> &dyn LanguageModel {
        &*self.lm
    }

    /// τ.
    pub(crate) fn tau(&self) -> f64 {
        self.temperature
    }

    /// Whether both say the same.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.of == other.of && self.reads == other.reads && self.temperature == other.temperature
    }

    pub(super) fn check(&self) -> Result<()> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::value("temperature of a term", "a number above 0", self.temperature));
        }
        let spec = self.lm.spec();
        let ids = match &self.reads {
            Reads::After(ids) | Reads::Instead(ids) => &ids[..],
            Reads::LastToken => &[],
        };
        ids.iter().try_for_each(|&id| in_vocabulary("token id of a term", id, spec.vocab))?;
        if self.reads == Reads::Instead(Vec::new()) {
            return Err(Error::value("text in the prompt's place", "at least one token", "none"));
        }
        let needed = self.reads.extra().saturating_add(1);
        if needed > spec.context {
            return Err(Error::Context { limit: spec.context, needed });
        }
        Ok(())
    }
}
