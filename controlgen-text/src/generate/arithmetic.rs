//! Arithmetic of models in texts, and guidance.

use controlgen_core::{LanguageModel, Result};

use super::{Generate, Prompt, TextModel};
use crate::arithmetic::{Expression, ModelArithmetic, Term, classifier_free_guidance};
use crate::tokenizer::Special;

/// The terms over one model, said in texts: what [`TextModel::arithmetic`] is given.
pub struct TextTerms<'a> {
    model: &'a TextModel,
    prompt: Term,
}

impl TextTerms<'_> {
    /// What the model says after the prompt.
    pub fn prompt(&self) -> Term {
        self.prompt.clone()
    }

    /// What it says after this text and the prompt: under an instruction. Each is tokenized by itself; a token that the
    /// tokenizer begins texts with is there twice.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn after(&self, prefix: &str) -> Result<Term> {
        Ok(self.prompt.after(self.model.encode(prefix)?))
    }

    /// What it says after this text in the prompt's place, and what has been generated: a negative prompt.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn instead(&self, text: &str) -> Result<Term> {
        Ok(self.prompt.instead(self.model.encode(text)?))
    }

    /// What it says after the last token of the prompt, and what has been generated.
    pub fn last_token(&self) -> Term {
        self.prompt.last_token()
    }

    /// What its first layers say after the prompt; see [`Term::first_layers`].
    ///
    /// # Errors
    /// As there.
    pub fn first_layers(&self, layers: usize) -> Result<Term> {
        self.prompt.first_layers(layers)
    }
}

impl TextModel {
    /// Another language model with this tokenizer: one that controls this model, for one.
    ///
    /// # Errors
    /// Those of [`TextModel::new`].
    pub fn with_lm(&self, lm: Box<dyn LanguageModel>) -> Result<Self> {
        let made = Self::new(lm, self.tokenizer.handle())?;
        let (vocabulary, trie) = (self.vocabulary.clone(), self.trie.clone());
        Ok(Self { eos: self.eos.clone(), vocabulary, trie, ..made })
    }

    /// The model whose scores are an expression of what this one says of several texts: see
    /// [`arithmetic`](crate::arithmetic). Terms of other models ([`Term::new`]) may be among them.
    ///
    /// # Errors
    /// Those of [`ModelArithmetic::new`], and `expression`'s.
    pub fn arithmetic<E: Into<Expression>>(
        &self,
        expression: impl FnOnce(&TextTerms<'_>) -> Result<E>,
    ) -> Result<Self> {
        self.with_lm(Box::new(ModelArithmetic::new(expression(&self.terms())?)?))
    }

    /// Terms over this model, as those of one call are over the same weights.
    pub fn terms(&self) -> TextTerms<'_> {
        TextTerms { model: self, prompt: Term::new(self.lm.handle()) }
    }
}

/// A guidance scale, and the negative prompt if there is one.
pub(super) struct Guidance {
    pub(super) scale: f64,
    pub(super) negative: Option<Prompt>,
}

impl Guidance {
    /// The guided model.
    pub(super) fn over(&self, model: &TextModel) -> Result<Box<dyn LanguageModel>> {
        let prompt = Term::new(model.lm.handle());
        let negative = match &self.negative {
            None => prompt.last_token(),
            Some(negative) => prompt.instead(negative.ids(model)?),
        };
        let guided = classifier_free_guidance(&prompt, &negative, self.scale);
        Ok(Box::new(ModelArithmetic::new(guided)?))
    }
}

impl Prompt {
    pub(super) fn ids(&self, model: &TextModel) -> Result<Vec<i64>> {
        match self {
            Self::Text(text) => model.encode(text),
            Self::Rendered(text) => model.tokenizer.encode(text, Special::Keep),
            Self::Ids(ids) => Ok(ids.clone()),
        }
    }
}

impl Generate<'_> {
    /// Leads away from what the model says after a negative prompt in the prompt's place, by
    /// [`classifier_free_guidance`]: a scale of 1 does nothing, the paper's are 1.25 to 3. Log-probabilities are then the
    /// guided model's. The last guidance said counts.
    #[must_use]
    pub fn guidance(mut self, scale: f64, negative_prompt: impl Into<String>) -> Self {
        self.guidance = Some(Guidance { scale, negative: Some(Prompt::Text(negative_prompt.into())) });
        self
    }

    /// The same of what the model says after the last token of the prompt alone.
    #[must_use]
    pub fn guidance_scale(mut self, scale: f64) -> Self {
        self.guidance = Some(Guidance { scale, negative: None });
        self
    }
}
