//! What is kept of a text, and what all of a file were made under.

use serde::{Deserialize, Serialize};

use crate::table::Keyed;

/// What all records of a file were made under: its first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub max_new_tokens: usize,
    pub model: String,
    pub seed: u64,
    pub prompts: Vec<String>,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub method: String,
    /// The class that was wanted.
    pub target: String,
    /// Which text of its prompt.
    pub round: usize,
    pub prompt: String,
    /// After the prompt.
    pub text: String,
    /// By the judge of fluency, after the prompt.
    pub log_prob: f64,
    /// That judge's.
    pub tokens: usize,
    /// p(target) of prompt and text together, by the judge of sentiment.
    pub satisfied: f64,
    /// The same by each half of the judge: hidden states, n-grams.
    pub halves: [f64; 2],
    /// Without the judging: of the batch, its share.
    pub seconds: f64,
}

/// The key of a text.
pub type Key = (String, String, usize, String);

/// The key of the text of a method for a target, a round and a prompt.
pub fn key(method: &str, target: &str, round: usize, prompt: &str) -> Key {
    (method.to_owned(), target.to_owned(), round, prompt.to_owned())
}

impl Keyed for Record {
    type Key = Key;

    fn key(&self) -> Key {
        key(&self.method, &self.target, self.round, &self.prompt)
    }
}
