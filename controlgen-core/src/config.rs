//! Reading the configuration files of Hugging Face directories: every field checked where it enters.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The fields of a Hugging Face config.json, or of a part of it.
#[derive(Clone, Debug)]
pub struct Config {
    file: String,
    prefix: String,
    fields: Map<String, Value>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] where it is no JSON object.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| Error::format(path, error))?;
        let Value::Object(fields) = value else {
            return Err(Error::format(path, "expected a JSON object"));
        };
        Ok(Self { file: path.display().to_string(), prefix: String::new(), fields })
    }

    /// Fields that came from elsewhere; `file` names them in errors.
    pub fn from_fields(file: impl Into<String>, fields: Map<String, Value>) -> Self {
        Self { file: file.into(), prefix: String::new(), fields }
    }

    /// What errors call this file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// How many fields there are.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// A field, unless it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Whether a field is there, be it null: some files tell null from what is left out.
    pub fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// A field that is an object.
    ///
    /// # Errors
    /// [`Error::Config`] where it is there and is none.
    pub fn object(&self, field: &str) -> Result<Option<Config>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Self {
                file: self.file.clone(),
                prefix: format!("{}{field}.", self.prefix),
                fields: fields.clone(),
            })),
            Some(other) => Err(self.error(field, "an object", other)),
        }
    }

    /// An error about a field.
    pub fn error(&self, field: &str, expected: impl Display, found: impl Display) -> Error {
        Error::config(&self.file, format!("{}{field}", self.prefix), expected, found)
    }

    fn absent(&self, field: &str, expected: impl Display) -> Error {
        self.error(field, expected, "nothing")
    }

    /// An integer in `low ..= high`.
    ///
    /// # Errors
    /// [`Error::Config`] where it is absent, no integer, or outside.
    pub fn int(&self, field: &str, low: i64, high: i64) -> Result<i64> {
        let expected = format!("an integer in {low} ..= {high}");
        self.int_if(field, low, high)?.ok_or_else(|| self.absent(field, expected))
    }

    /// An integer in `low ..= high`, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no integer or outside.
    pub fn int_if(&self, field: &str, low: i64, high: i64) -> Result<Option<i64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_i64().filter(|n| (low..=high).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.error(field, format!("an integer in {low} ..= {high}"), value)),
        }
    }

    /// A finite number > 0, or `default`.
    ///
    /// # Errors
    /// [`Error::Config`] where it is there and is none.
    pub fn positive(&self, field: &str, default: Option<f64>) -> Result<f64> {
        match (self.get(field), default) {
            (Some(value), _) => value
                .as_f64()
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.error(field, "a number > 0", value)),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.absent(field, "a number > 0")),
        }
    }

    /// A boolean, or `default`.
    ///
    /// # Errors
    /// [`Error::Config`] where it is there and is none.
    pub fn bool(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(field, "true or false", value)),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] where it is there and is none.
    pub fn str(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(field, "a string", value)),
        }
    }

    /// A finite number, or `default`.
    ///
    /// # Errors
    /// [`Error::Config`] where it is there and is none.
    pub fn number(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|x| x.is_finite())
                .ok_or_else(|| self.error(field, "a finite number", value)),
        }
    }

    /// A list of integers in `low ..= high`, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no list of such.
    pub fn ints_if(&self, field: &str, low: i64, high: i64) -> Result<Option<Vec<i64>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one = |value: &Value| value.as_i64().filter(|n| (low..=high).contains(n));
        let all = value.as_array().and_then(|values| values.iter().map(one).collect());
        let expected = || format!("a list of integers in {low} ..= {high}");
        all.map_or_else(|| Err(self.error(field, expected(), value)), |all| Ok(Some(all)))
    }

    /// An integer in `low ..= high` for each of `n` blocks, or a list of `n` of them, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] where it is neither.
    pub fn ints_each(&self, field: &str, n: usize, low: i64, high: i64) -> Result<Option<Vec<i64>>> {
        match self.get(field) {
            Some(Value::Array(values)) if values.len() != n => {
                Err(self.error(field, format!("{n} integers, or one"), format!("{} of them", values.len())))
            }
            Some(Value::Array(_)) => self.ints_if(field, low, high),
            _ => Ok(self.int_if(field, low, high)?.map(|one| vec![one; n])),
        }
    }

    /// A list of strings, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] where it is no list of such.
    pub fn strs_if(&self, field: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let all = value.as_array().and_then(|values| values.iter().map(Value::as_str).collect());
        all.map_or_else(|| Err(self.error(field, "a list of strings", value)), |all| Ok(Some(all)))
    }

    /// A token id, or a list of them.
    ///
    /// # Errors
    /// [`Error::Config`] where one is no integer in `0 .. vocab`. Ids below zero, which some files use for none,
    /// are left out.
    pub fn token_ids(&self, field: &str, vocab: i64) -> Result<Vec<i64>> {
        let one = |value: &Value| match value.as_i64() {
            Some(id) if id < 0 => Ok(None),
            Some(id) if id < vocab => Ok(Some(id)),
            _ => Err(self.error(field, format!("token ids in 0 .. {vocab}"), value)),
        };
        let found = match self.get(field) {
            None => Vec::new(),
            Some(Value::Array(values)) => values.iter().map(one).collect::<Result<_>>()?,
            Some(value) => vec![one(value)?],
        };
        Ok(found.into_iter().flatten().collect())
    }
}

/// Bounds that no sound model exceeds; they keep products of dimensions far from overflow.
pub mod limits {
    /// Of layers, and of blocks.
    pub const LAYERS: i64 = 4096;
    /// Of widths, and of channels.
    pub const WIDTH: i64 = 1 << 20;
    /// Of heads.
    pub const HEADS: i64 = 1 << 14;
    /// Of vocabularies.
    pub const VOCAB: i64 = 1 << 24;
    /// Of positions.
    pub const CONTEXT: i64 = 1 << 27;
}
