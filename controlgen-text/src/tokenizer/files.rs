//! The files beside a tokenizer.json, read as transformers reads them: special tokens, chat templates, EOS ids.

use std::collections::BTreeMap;
use std::path::Path;

use controlgen_core::{Error, Result};
use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

/// The names under which special tokens are stated.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside a tokenizer.json say.
#[derive(Default, Debug)]
pub(super) struct Side {
    /// Special tokens by role.
    pub roles: Vec<(String, AddedToken)>,
    /// Special tokens without a role of their own.
    pub extra: Vec<AddedToken>,
    /// Added tokens, by id.
    pub added: BTreeMap<u32, AddedToken>,
    /// Whether the BOS token begins and the EOS token ends an encoded text, where this is not left to the
    /// post-processor of tokenizer.json.
    pub frame: Option<(bool, bool)>,
    pub bos_id: Option<i64>,
    pub eos_ids: Option<Vec<i64>>,
    pub pad_id: Option<i64>,
    /// Chat templates by name.
    pub templates: Vec<(String, String)>,
    /// The longest text, in tokens, that the model was made for.
    pub max_length: Option<u64>,
}

impl Side {
    /// Reads what is there; no file is required.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut side = Self::default();
        if let Some(file) = JsonFile::read(folder, "tokenizer_config.json")? {
            side.special_tokens(&file)?;
            side.added_tokens(&file)?;
            // Stated as 1e30 where there is no limit.
            side.max_length = file.map.get("model_max_length").and_then(Value::as_u64);
            side.templates = file.templates()?;
        }
        // Of a time when added tokens stood in no other file; what it says takes precedence.
        if side.added.is_empty()
            && let Some(file) = JsonFile::read(folder, "special_tokens_map.json")?
        {
            side.special_tokens(&file)?;
        }
        if let Some(file) = JsonFile::read(folder, "generation_config.json")? {
            side.bos_id = file.ids("bos_token_id")?.and_then(|ids| ids.first().copied());
            side.pad_id = file.ids("pad_token_id")?.and_then(|ids| ids.first().copied());
            side.eos_ids = file.ids("eos_token_id")?;
        }
        side.jinja_files(folder)?;
        Ok(side)
    }

    pub fn special(&self, role: &str) -> Option<&str> {
        self.roles.iter().find(|(name, _)| *name == role).map(|(_, token)| token.content.as_str())
    }

    /// Takes the special tokens of one file, over those of an earlier one.
    fn special_tokens(&mut self, file: &JsonFile) -> Result<()> {
        for (role, value) in &file.map {
            let known = ROLES.contains(&role.as_str());
            // Roles of some model's own, such as `image_token`, are strings.
            if !(known || role.ends_with("_token") && value.is_string()) {
                continue;
            }
            if let Some(token) = file.token(role, value)? {
                self.roles.retain(|(earlier, _)| earlier != role);
                self.roles.push((role.clone(), token));
            }
        }
        for field in ["additional_special_tokens", "extra_special_tokens"] {
            let tokens: Vec<&Value> = match file.map.get(field) {
                None | Some(Value::Null) => continue,
                Some(Value::Array(tokens)) => tokens.iter().collect(),
                Some(Value::Object(tokens)) => tokens.values().collect(),
                Some(other) => return Err(file.wrong(field, "a list of tokens", other)),
            };
            for value in tokens {
                if let Some(token) = file.token(field, value)?
                    && !self.extra.iter().any(|known| known.content == token.content)
                {
                    self.extra.push(token);
                }
            }
        }
        Ok(())
    }

    fn added_tokens(&mut self, file: &JsonFile) -> Result<()> {
        let Some(Value::Object(added)) = file.map.get("added_tokens_decoder") else { return Ok(()) };
        for (id, value) in added {
            let field = format!("added_tokens_decoder.{id}");
            let id = id.parse().map_err(|_| file.wrong(&field, "a token id as key", value))?;
            if let Some(token) = file.token(&field, value)? {
                self.added.insert(id, token);
            }
        }
        Ok(())
    }

    /// chat_template.jinja, and further templates in a folder of their own, replace those of tokenizer_config.json.
    fn jinja_files(&mut self, folder: &Path) -> Result<()> {
        let mut found = Vec::new();
        let default = folder.join("chat_template.jinja");
        if default.exists() {
            found.push(("default".to_owned(), default));
        }
        let more = folder.join("additional_chat_templates");
        if more.is_dir() {
            for entry in std::fs::read_dir(&more).map_err(|source| Error::io(&more, source))? {
                let path = entry.map_err(|source| Error::io(&more, source))?.path();
                if let (Some("jinja"), Some(name)) = (
                    path.extension().and_then(std::ffi::OsStr::to_str),
                    path.file_stem().and_then(std::ffi::OsStr::to_str),
                ) {
                    found.push((name.to_owned(), path.clone()));
                }
            }
        }
        found.sort();
        let read = |(name, path): (String, std::path::PathBuf)| {
            let text = std::fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
            Ok((name, text))
        };
        if !found.is_empty() {
            self.templates = found.into_iter().map(read).collect::<Result<_>>()?;
        }
        Ok(())
    }

    /// Adds to the backend the tokens which it lacks, marks special tokens as such, and sets the post-processor where
    /// the files override it: as transformers does after it has read a tokenizer.json.
    pub fn complete(&self, backend: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut tokens: Vec<AddedToken> = self.added.values().cloned().collect();
        let specials = self.roles.iter().map(|(_, token)| token).chain(&self.extra);
        for special in specials {
            match tokens.iter_mut().find(|known| known.content == special.content) {
                Some(known) => known.special = true,
                None => tokens.push(special.clone()),
            }
        }
        let known = backend.get_added_tokens_decoder();
        for token in &mut tokens {
            // The flags of a tokenizer.json stay, except that a special token is special.
            if let Some(known) = known.values().find(|known| known.content == token.content)
                && !self.added.values().any(|stated| stated.content == token.content)
            {
                *token = AddedToken { special: true, ..known.clone() };
            }
        }
        let refused = |source| Error::value("added tokens", "tokens which the tokenizer accepts", source);
        super::guarded(|| backend.add_tokens(tokens)).map_err(refused)?;
        for (&id, token) in &self.added {
            if backend.token_to_id(&token.content) != Some(id) {
                let found = backend.token_to_id(&token.content).map_or("none".into(), |id| id.to_string());
                let field = format!("added_tokens_decoder.{id}");
                let expected = format!("the id of `{}` in tokenizer.json, {found}", token.content);
                return Err(Error::config("tokenizer_config.json", field, expected, id));
            }
        }
        match self.frame {
            Some((bos, eos)) => self.set_post_processor(backend, bos, eos),
            None => Ok(()),
        }
    }

    fn set_post_processor(&self, backend: &mut tokenizers::Tokenizer, bos: bool, eos: bool) -> Result<()> {
        let token = |wanted: bool, role| self.special(role).filter(|_| wanted);
        let (bos, eos) = (token(bos, "bos_token"), token(eos, "eos_token"));
        let frame = |sequence: &str, type_id: u8| {
            let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": type_id}});
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect::<Vec<_>>()
        };
        let special_tokens: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|token| {
                let id = backend.token_to_id(token);
                (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
            })
            .collect();
        let processor = json!({
            "type": "TemplateProcessing",
            "single": frame("A", 0),
            "pair": ([frame("A", 0), frame("B", 1)].concat()),
            "special_tokens": special_tokens,
        });
        let processor: tokenizers::PostProcessorWrapper = serde_json::from_value(processor)
            .map_err(|source| Error::value("add_bos_token", "a BOS token in the vocabulary", source))?;
        backend.with_post_processor(Some(processor));
        Ok(())
    }
}

/// A JSON file that holds an object.
struct JsonFile {
    path: String,
    map: Map<String, Value>,
}

impl JsonFile {
    fn read(folder: &Path, name: &str) -> Result<Option<Self>> {
        let path = folder.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::io(&path, source)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Some(Self { path: path.display().to_string(), map })),
            Ok(_) => Err(Error::format(&path, "expected a JSON object")),
            Err(source) => Err(Error::format(&path, format!("expected JSON: {source}"))),
        }
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> Error {
        let mut found = found.to_string();
        if found.len() > 80 {
            let cut = (0..=80).rev().find(|&at| found.is_char_boundary(at)).unwrap_or(0);
            found.truncate(cut);
            found.push('…');
        }
        Error::config(&self.path, field, expected, found)
    }

    /// One id, or a list of ids.
    fn ids(&self, field: &str) -> Result<Option<Vec<i64>>> {
        let Some(value) = self.map.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let ids = values.iter().map(|id| id.as_i64().filter(|id| *id >= 0)).collect::<Option<Vec<_>>>();
        ids.map(Some).ok_or_else(|| self.wrong(field, "a token id, or a list of them", value))
    }

    /// A token is a string, or an object with its flags; special unless it says otherwise.
    fn token(&self, field: &str, value: &Value) -> Result<Option<AddedToken>> {
        let object = match value {
            Value::Null => return Ok(None),
            Value::String(content) => return Ok(Some(AddedToken::from(content.as_str(), true))),
            Value::Object(object) => object,
            other => return Err(self.wrong(field, "a token", other)),
        };
        let Some(content) = object.get("content").and_then(Value::as_str) else {
            return Err(self.wrong(field, "an object with the token's `content`", value));
        };
        let flag = |name: &str, default| object.get(name).and_then(Value::as_bool).unwrap_or(default);
        let special = flag("special", !field.starts_with("added_tokens_decoder"));
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        Ok(Some(token))
    }

    /// A chat template, or a list of named ones.
    fn templates(&self) -> Result<Vec<(String, String)>> {
        let field = "chat_template";
        let wrong = |value| self.wrong(field, "a template, or a list of {name, template}", value);
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![("default".to_owned(), text.clone())]),
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| match (item["name"].as_str(), item["template"].as_str()) {
                    (Some(name), Some(text)) => Ok((name.to_owned(), text.to_owned())),
                    _ => Err(wrong(item)),
                })
                .collect(),
            Some(other) => Err(wrong(other)),
        }
    }
}
