//! Structured output: grammars, and values of Rust types.

use controlgen_core::{Error, Result, TokenControls};
use schemars::{JsonSchema, schema_for};
use serde::de::DeserializeOwned;

use super::{Completion, Generate, TextModel};
use crate::grammar::{Grammar, GrammarControl, JsonGrammar, Vocabulary};
use crate::search::Finish;

impl TextModel {
    /// The tokens that grammars for this model are compiled for; made at the first call and kept.
    ///
    /// # Errors
    /// Those of [`Vocabulary::new`].
    pub fn vocabulary(&self) -> Result<Vocabulary> {
        if let Some(made) = self.vocabulary.get() {
            return Ok(made.clone());
        }
        let made = Vocabulary::new(&self.tokenizer, &self.eos)?;
        Ok(self.vocabulary.get_or_init(|| made).clone())
    }

    /// Answers with a value: [`Generate::extract`] after a text.
    ///
    /// # Errors
    /// Those of [`Generate::extract`].
    pub fn extract<T: DeserializeOwned + JsonSchema>(&self, prompt: impl Into<String>) -> Result<T> {
        self.generate(prompt).extract()
    }
}

impl Generate<'_> {
    /// Completions are texts of the grammar, under any search, and end with it. The grammar acts before all controls,
    /// whenever they are added: what top-p leaves could have no text in it. The last one said counts.
    #[must_use]
    pub fn grammar(mut self, grammar: &Grammar) -> Self {
        self.grammar = Some(grammar.clone());
        self
    }

    /// Generates JSON of the type's schema, and reads it: the first completion's value, which is the best one of a
    /// search by beams.
    ///
    /// The schema is `schemars`'s, narrowed to what serde wants: objects have the properties that are named and no
    /// others, integers fit their type (and ±2⁵³), and `oneOf` counts as `anyOf`.
    ///
    /// ```no_run
    /// use controlgen_core::Placement;
    /// use controlgen_text::TextModel;
    /// use schemars::JsonSchema;
    /// use serde::Deserialize;
    ///
    /// #[derive(Debug, Deserialize, JsonSchema)]
    /// struct Person {
    ///     name: String,
    ///     #[schemars(range(max = 150))]
    ///     age: u8,
    ///     colours: Vec<Colour>,
    /// }
    ///
    /// #[derive(Debug, Deserialize, JsonSchema)]
    /// #[serde(rename_all = "snake_case")]
    /// enum Colour {
    ///     Red,
    ///     Green,
    /// }
    ///
    /// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
    /// let person: Person = model.extract("Anna, who is 31, likes red and green. As JSON:\n")?;
    /// println!("{person:?}");
    /// # Ok::<(), controlgen_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Incomplete`], with the text, where its length or a stop string cut it off; [`Error::Unsupported`] for a
    /// schema that grammars cannot express; [`Error::Value`] where serde refuses the value; those of
    /// [`run`](Self::run).
    pub fn extract<T: DeserializeOwned + JsonSchema>(self) -> Result<T> {
        let mut all = self.extract_all()?.into_iter();
        all.next().unwrap_or_else(|| Err(Error::value("completions", "at least one", "none")))
    }

    /// The same for all completions: prompt by prompt, sample by sample, or best first.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a schema that grammars cannot express; those of [`run`](Self::run). Each value has
    /// its own: see [`extract`](Self::extract).
    pub fn extract_all<T: DeserializeOwned + JsonSchema>(self) -> Result<Vec<Result<T>>> {
        let grammar = JsonGrammar::to_deserialize(schema_for!(T).to_value())?.into();
        let generation = self.grammar(&grammar).run()?;
        Ok(generation.completions.iter().map(read).collect())
    }

    /// All controls, the grammar first.
    pub(super) fn all_controls(&self) -> Result<TokenControls> {
        let mut controls = TokenControls::new();
        if let Some(grammar) = &self.grammar {
            let vocabulary = match &self.eos {
                Some(eos) => Vocabulary::new(&self.model.tokenizer, eos)?,
                None => self.model.vocabulary()?,
            };
            controls.push(GrammarControl::new(grammar, &vocabulary)?);
        }
        controls.push(self.controls.clone());
        Ok(controls)
    }
}

/// The value of a completion.
fn read<T: DeserializeOwned>(completion: &Completion) -> Result<T> {
    let what = || format!("JSON of {}", std::any::type_name::<T>());
    match &completion.finish {
        Finish::Eos(_) => serde_json::from_str(&completion.text).map_err(|refused| {
            Error::value(what(), "a value that serde reads", format!("{}: {refused}", completion.text))
        }),
        other => Err(Error::Incomplete {
            what: what(),
            reason: format!("it was ended by {other:?}"),
            text: completion.text.clone(),
        }),
    }
}
