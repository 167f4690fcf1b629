//! Guidance, clauses, grammars, features, regularisers and watermarks that a configuration asks for.

use controlgen_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::GenerationConfig;
use crate::controls::features::{Features, WordList};
use crate::controls::{LexicalConstraints, Regularised, Watermark};
use crate::generate::arithmetic::Guidance;
use crate::generate::{Generate, Prompt};
use crate::grammar::Grammar;
use crate::lexical::{Clause, Clauses};

/// Words, and what each occurrence of one of them adds to a text's score, in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordFeature {
    /// Whole words, of either case.
    pub words: Vec<String>,
    /// What they are worth; negative for words to be avoided.
    pub weight: f64,
}

/// Green-list watermark, under the field names of transformers' `WatermarkingConfig`. The lists themselves are our own:
/// what transformers marks is not found by our detector, nor the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatermarkConfig {
    /// γ, the share of the tokens that are green.
    pub greenlist_ratio: f64,
    /// δ, what a green token's score gains.
    pub bias: f64,
    /// The key.
    pub hashing_key: u64,
    /// How many tokens before it a green list depends on.
    pub context_width: usize,
}

/// transformers' own values.
impl Default for WatermarkConfig {
    fn default() -> Self {
        Self { greenlist_ratio: 0.25, bias: 2.0, hashing_key: 15_485_863, context_width: 1 }
    }
}

impl GenerationConfig {
    /// What guides the model itself.
    pub(super) fn guided(&self, to: &mut Generate<'_>) -> Result<()> {
        let negative = match (&self.negative_prompt, &self.negative_prompt_ids) {
            (Some(_), Some(_)) => {
                return Err(Error::value(
                    "negative prompts",
                    "negative_prompt or negative_prompt_ids",
                    "both",
                ));
            }
            (Some(text), None) => Some(Prompt::Text(text.clone())),
            (None, Some(ids)) => Some(Prompt::Ids(ids.clone())),
            (None, None) => None,
        };
        match (self.guidance_scale, &negative) {
            (Some(scale), _) => to.guidance = Some(Guidance { scale, negative }),
            (None, Some(_)) => {
                return Err(Error::value("guidance_scale of a negative prompt", "a number", "none"));
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// What changes the model's own log-probabilities: before all else.
    pub(super) fn scored(&self, to: &mut Generate<'_>) -> Result<()> {
        match (self.regularizer, self.regularizer_weight) {
            (Some(regulariser), weight) => {
                let weight = weight.ok_or_else(|| Error::value("regularizer_weight", "a number", "none"))?;
                to.controls.push(Regularised::new(regulariser, weight)?);
            }
            (None, Some(weight)) => {
                return Err(Error::value(
                    "regularizer of regularizer_weight",
                    "one",
                    format!("none, with {weight}"),
                ));
            }
            (None, None) => {}
        }
        if let Some(all) = self.features.as_ref().filter(|all| !all.is_empty()) {
            let mut features = Features::new(&to.model.token_trie()?);
            for WordFeature { words, weight } in all {
                features = features.with(*weight, WordList::new(words)?)?;
            }
            to.controls.push(features);
        }
        if let Some(watermark) = self.watermarking_config {
            let WatermarkConfig { greenlist_ratio, bias, hashing_key, context_width } = watermark;
            to.controls.push(Watermark::new(hashing_key, greenlist_ratio, bias)?.context(context_width)?);
        }
        Ok(())
    }

    /// What must hold. The clauses are given back where the search is to meet them.
    pub(super) fn constraints(&self, to: &mut Generate<'_>, eos: &[i64]) -> Result<Option<Clauses>> {
        self.grammars(to)?;
        let Some(clauses) = self.clauses.as_ref().filter(|clauses| !clauses.is_empty()) else {
            return Ok(None);
        };
        let clauses = Clauses::new(&to.model.token_trie()?, clauses.iter().map(Clause::any))?;
        if self.search_meets_clauses()? {
            return Ok(Some(clauses));
        }
        let mut control = LexicalConstraints::new(&clauses, eos.iter().copied())?;
        if let Some(reward) = self.clause_reward {
            control = control.reward(reward)?;
        }
        if let Some(length) = self.max_new_tokens {
            control = control.within(length);
        }
        to.controls.push(control);
        Ok(None)
    }

    fn grammars(&self, to: &mut Generate<'_>) -> Result<()> {
        let schema = self.json_schema.as_ref().map(Grammar::json_schema);
        let regex = self.regex.as_deref().map(Grammar::regex);
        let lark = self.lark.as_deref().map(Grammar::lark);
        let choices = self.choices.as_ref().map(Grammar::choices);
        let mut all = [schema, regex, lark, choices].into_iter().flatten().collect::<Result<Vec<_>>>()?;
        if all.len() > 1 {
            let expected = "one of json_schema, regex, lark and choices";
            return Err(Error::value("grammars", expected, all.len()));
        }
        to.grammar = all.pop().or(to.grammar.take());
        Ok(())
    }
}
