//! The token sequences that spell a word.

use controlgen_core::{Error, Result};

use super::{Special, Tokenizer};

impl Tokenizer {
    /// The token sequences that spell a word at the start of a text and after a space, in its own case, in lower
    /// case and capitalised: what lists of unwanted or wanted words go by.
    ///
    /// These are the tokenizer's own spellings. A model can also reach the word by pieces that the tokenizer would
    /// not choose, or as part of a longer word.
    ///
    /// # Errors
    /// [`Error::Value`] for a word of nothing but spaces, or one that the vocabulary cannot spell.
    pub fn spellings(&self, word: &str) -> Result<Vec<Vec<i64>>> {
        let bare = word.trim();
        if bare.is_empty() {
            let found = format!("{word:?}");
            return Err(Error::value("word", "at least one character that is no space", found));
        }
        let mut letters = bare.chars();
        let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
        let capitalised = first + letters.as_str();
        let mut spelled = Vec::new();
        for form in [bare.to_owned(), bare.to_lowercase(), capitalised] {
            for text in [form.clone(), format!(" {form}")] {
                let ids = self.encode(&text, Special::Keep)?;
                if !ids.is_empty() && !spelled.contains(&ids) {
                    spelled.push(ids);
                }
            }
        }
        Ok(spelled)
    }
}
