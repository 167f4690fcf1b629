//! The fields of an adapter's configuration file.

use std::path::Path;

use controlgen_core::{Error, Result};
use serde_json::{Map, Value};

/// More bytes than any configuration has.
const MOST: u64 = 16 << 20;

/// A JSON object of these fields, in this order.
pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A JSON object, read field by field. `null` stands for a field that is not there.
pub(crate) struct Fields {
    file: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(path, error);
        let size = std::fs::metadata(path).map_err(fail)?.len();
        if size > MOST {
            return Err(Error::format(path, format!("expected at most {MOST} bytes, found {size}")));
        }
        let bytes = std::fs::read(path).map_err(fail)?;
        match serde_json::from_slice(&bytes).map_err(|error| Error::format(path, error))? {
            Value::Object(map) => Ok(Self { file: path.display().to_string(), map }),
            _ => Err(Error::format(path, "expected a JSON object")),
        }
    }

    /// A field, unless it is not there or null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, name: &str, expected: impl std::fmt::Display, found: &Value) -> Error {
        let mut found = found.to_string();
        if found.len() > 100 {
            found = found.chars().take(100).chain("…".chars()).collect();
        }
        Error::config(&self.file, name, expected, found)
    }

    fn read<T>(&self, name: &str, expected: &str, f: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        f(value).map(Some).ok_or_else(|| self.error(name, expected, value))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<String>> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A whole number of at least 1.
    pub(crate) fn count(&self, name: &str) -> Result<Option<i64>> {
        self.read(name, "a whole number > 0", |value| value.as_i64().filter(|&n| n > 0))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>> {
        self.read(name, "a number", Value::as_f64)
    }

    pub(crate) fn texts(&self, name: &str) -> Result<Option<Vec<String>>> {
        self.read(name, "a list of strings", |value| {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        })
    }

    /// An object's members, in their order.
    pub(crate) fn members<T>(
        &self,
        name: &str,
        expected: &str,
        f: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        let all = |value: &Value| {
            value.as_object()?.iter().map(|(key, value)| Some((key.clone(), f(value)?))).collect()
        };
        Ok(self.read(name, expected, all)?.unwrap_or_default())
    }

    /// Refuses fields that change the result and are not known here: those that are there, and not null, false,
    /// or empty.
    pub(crate) fn refuse(&self, names: &[&str], supported: &str) -> Result<()> {
        let idle = |value: &Value| match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Array(items) => items.is_empty(),
            Value::Object(members) => members.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Number(_) => false,
        };
        match names.iter().find_map(|name| Some((name, self.get(name).filter(|value| !idle(value))?))) {
            Some((name, value)) => Err(Error::unsupported(
                format!("{}: {name} = {}", self.file, value.to_string().chars().take(60).collect::<String>()),
                supported,
            )),
            None => Ok(()),
        }
    }
}
