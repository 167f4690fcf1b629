//! Writing a tokenizer in the Hugging Face format.

use std::path::Path;

use controlgen_core::checkpoint::replace;
use controlgen_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::Tokenizer;

impl Tokenizer {
    /// The content of a tokenizer.json.
    ///
    /// # Errors
    /// [`Error::Value`] where the `tokenizers` crate cannot write it.
    pub fn to_json(&self) -> Result<String> {
        let written = super::guarded(|| self.shared.backend.to_string(true));
        written.map_err(|source| Error::value("tokenizer", "one that can be written as JSON", source))
    }

    /// The content of a tokenizer_config.json: special tokens by role, and the chat templates.
    pub fn config_json(&self) -> String {
        let side = &self.shared.side;
        let mut config = Map::new();
        // The class that takes tokenizer.json as it stands; transformers' classes of models build their own.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        for (role, token) in self.special_tokens() {
            config.insert(role.into(), json!(token));
        }
        if !side.extra.is_empty() {
            let extra: Vec<&str> = side.extra.iter().map(|token| token.content.as_str()).collect();
            config.insert("additional_special_tokens".into(), json!(extra));
        }
        if let Some(length) = side.max_length {
            config.insert("model_max_length".into(), json!(length));
        }
        match side.templates.as_slice() {
            [] => {}
            [(name, text)] if name == "default" => {
                config.insert("chat_template".into(), json!(text));
            }
            list => {
                let list: Vec<Value> =
                    list.iter().map(|(name, text)| json!({"name": name, "template": text})).collect();
                config.insert("chat_template".into(), json!(list));
            }
        }
        format!("{:#}\n", Value::Object(config))
    }

    /// Writes tokenizer.json and tokenizer_config.json into `folder`, which must exist, each beside its place and then
    /// renamed. transformers reads both.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let write = |name: &str, text: String| replace(folder.as_ref().join(name), text.as_bytes());
        write("tokenizer.json", self.to_json()?)?;
        write("tokenizer_config.json", self.config_json())
    }
}
