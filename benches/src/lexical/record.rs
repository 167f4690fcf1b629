//! What is kept of a text, and what all of a file were made under.

use serde::{Deserialize, Serialize};

use super::sets;
use crate::table::Keyed;

/// What all records of a file were made under: its first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub prompt: String,
    pub max_new_tokens: usize,
    pub model: String,
    pub beams: usize,
    pub seed: u64,
    /// What the texts are made in; files of before it was a setting are of f32.
    #[serde(default = "f32_by_default")]
    pub dtype: String,
}

fn f32_by_default() -> String {
    "f32".to_owned()
}

/// One text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub method: String,
    /// The plain forms of the words wanted.
    pub concepts: Vec<String>,
    pub text: String,
    /// By the judge, after the prompt.
    pub log_prob: f64,
    /// The judge's.
    pub tokens: usize,
    /// Without the judging.
    pub seconds: f64,
}

/// The key of the text that a method makes of a set.
pub fn key(method: &str, set: &[Vec<String>]) -> (String, Vec<String>) {
    (method.to_owned(), sets::plain(set))
}

impl Keyed for Record {
    type Key = (String, Vec<String>);

    fn key(&self) -> Self::Key {
        (self.method.clone(), self.concepts.clone())
    }
}
