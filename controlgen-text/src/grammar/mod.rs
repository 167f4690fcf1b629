//! Structured output: texts that follow a regular expression, a JSON Schema, a context-free grammar or a list.
//!
//! A [`Grammar`] says which texts there may be. [`GrammarControl`] is that grammar over the tokens of one vocabulary: a
//! control over the next token, for any search.
//!
//! ```no_run
//! use controlgen_core::Placement;
//! use controlgen_text::TextModel;
//! use controlgen_text::grammar::Grammar;
//! use serde_json::json;
//!
//! let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
//! let person = Grammar::json_schema(&json!({
//!     "type": "object",
//!     "properties": {
//!         "name": {"type": "string", "maxLength": 20},
//!         "age": {"type": "integer", "minimum": 0, "maximum": 120},
//!         "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
//!         "email": {"type": "string", "format": "email"}
//!     },
//!     "required": ["name", "age", "tags"],
//!     "additionalProperties": false
//! }))?;
//! let generation = model.generate("A person of interest, described in JSON:\n").grammar(&person).sample(2).run()?;
//! println!("{}", generation.text());
//! // {"name": "John", "age": 42, "tags": ["red", "green", "blue"], "email": "john@example.com"}
//! # Ok::<(), controlgen_core::Error>(())
//! ```
//!
//! Without sampling, under beams, in batches and with n > 1 it is the same control. Where only one token can follow,
//! searches that draw token by token take it without asking the model (*jump-forward*), most of JSON's names and marks;
//! text and distribution stay what they are.
//!
//! What is not found when a grammar is compiled: rules that never come to an end (`start: "a" start`).

mod control;
mod json;
mod number;
mod vocabulary;

use controlgen_core::{Error, Result};
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::Value;

pub use control::{GrammarControl, GrammarState};
pub use json::{JsonGrammar, Whitespace};
pub use vocabulary::Vocabulary;

/// A set of texts, as a grammar describes it. A completion is a text of the set, from its first byte to its last.
#[derive(Clone, Debug)]
pub struct Grammar {
    /// What it is, for errors.
    what: &'static str,
    source: GrammarWithLexer,
    /// From how many characters on a JSON number ends, where it may.
    longest_number: Option<usize>,
}

impl Grammar {
    /// The texts that a regular expression matches as a whole, in the syntax of the `regex` crate (Unicode classes,
    /// `(?i)`), without look-around, word boundaries and anchors.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is too long or nested too deep; [`GrammarControl::new`] finds what else is wrong.
    pub fn regex(regex: &str) -> Result<Self> {
        Self::text("regular expression", regex)?;
        Ok(Self::of("regular expression", GrammarWithLexer::from_regex(regex)))
    }

    /// The texts of a context-free grammar in Lark's syntax, as llguidance reads it: rules in lower case, terminals in
    /// upper case, `start` is where it begins, `%ignore` names what may stand between terminals.
    ///
    /// What `%ignore` allows may run on without end; rather say where one space goes.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is too long or nested too deep; [`GrammarControl::new`] finds what else is wrong.
    pub fn lark(grammar: &str) -> Result<Self> {
        Self::text("Lark grammar", grammar)?;
        Ok(Self::of("Lark grammar", GrammarWithLexer::from_lark(grammar.to_owned())))
    }

    /// The JSON values that a schema (2020-12, or an older draft that `$schema` names) allows, written with one space
    /// after each comma and colon; [`JsonGrammar`] has the choices.
    ///
    /// # Errors
    /// Those of [`JsonGrammar::new`].
    pub fn json_schema(schema: &Value) -> Result<Self> {
        Ok(JsonGrammar::new(schema)?.into())
    }

    /// One of these texts.
    ///
    /// # Errors
    /// [`Error::Value`] for no choice and for an empty one.
    pub fn choices<S: AsRef<str>>(choices: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut literals = Vec::new();
        for choice in choices {
            if choice.as_ref().is_empty() {
                return Err(Error::value("choice", "at least one character", "none"));
            }
            literals.push(Value::from(choice.as_ref()).to_string());
        }
        if literals.is_empty() {
            return Err(Error::value("choices", "at least one", "none"));
        }
        let lark = format!("start: CHOICE\nCHOICE: {}", literals.join(" | "));
        Self::sized("choices", lark.len())?;
        Ok(Self::of("choices", GrammarWithLexer::from_lark(lark)))
    }

    fn of(what: &'static str, source: GrammarWithLexer) -> Self {
        Self { what, source, longest_number: None }
    }

    /// Refuses a source that is too much to read.
    fn text(what: &str, source: &str) -> Result<()> {
        Self::sized(what, source.len())?;
        let (mut depth, mut deepest) = (0usize, 0);
        for byte in source.bytes() {
            match byte {
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            deepest = deepest.max(depth);
        }
        if deepest > DEEPEST {
            let expected = format!("brackets in at most {DEEPEST} others");
            return Err(Error::value(what, expected, format!("in {deepest}")));
        }
        Ok(())
    }

    fn sized(what: &str, bytes: usize) -> Result<()> {
        if bytes > LONGEST {
            return Err(Error::value(what, format!("at most {LONGEST} bytes"), format!("{bytes} bytes")));
        }
        Ok(())
    }

    fn top_level(&self) -> TopLevelGrammar {
        TopLevelGrammar::from_grammar(self.source.clone())
    }
}

/// The longest source, in bytes.
const LONGEST: usize = 1 << 20;

/// How deep a source may be nested: parsers of grammars recur.
const DEEPEST: usize = 200;
