//! The fields of a scheduler_config.json, each checked where it enters.

use std::fmt::Display;
use std::path::Path;

use controlgen_core::{Config, Error, Result};
use serde_json::Value;

/// The fields of the file, with the defaults that diffusers' classes have.
pub(super) struct Fields(Config);

impl Fields {
    pub(super) fn parse(file: &Path, text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(&quoted(text)).map_err(|error| Error::format(file, error))?;
        let Value::Object(fields) = value else {
            return Err(Error::format(file, "expected a JSON object"));
        };
        Ok(Self(Config::from_fields(file.display().to_string(), fields)))
    }

    /// A field, unless it is absent or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field)
    }

    pub(super) fn error(&self, field: &str, expected: impl Display, found: impl Display) -> Error {
        self.0.error(field, expected, found)
    }

    pub(super) fn number(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.number_if(field)?.unwrap_or(default))
    }

    /// A finite number, or one of JavaScript's names of infinity that Python writes.
    pub(super) fn number_if(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        match number.filter(|x: &f64| !x.is_nan()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(field, "a number", value)),
        }
    }

    pub(super) fn int(&self, field: &str, default: i64, low: i64, high: i64) -> Result<i64> {
        Ok(self.0.int_if(field, low, high)?.unwrap_or(default))
    }

    pub(super) fn count(&self, field: &str, default: i64, high: i64) -> Result<usize> {
        Ok(usize::try_from(self.int(field, default, 1, high)?).unwrap_or(1))
    }

    pub(super) fn bool(&self, field: &str, default: bool) -> Result<bool> {
        self.0.bool(field, default)
    }

    pub(super) fn text<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str> {
        Ok(self.0.str(field)?.unwrap_or(default))
    }

    pub(super) fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let numbers = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => Err(self.error(field, "a list of numbers", value)),
        }
    }

    /// One of these words, and what each stands for.
    pub(super) fn one_of<T: Copy>(&self, field: &str, default: &str, words: &[(&str, T)]) -> Result<T> {
        let found = self.text(field, default)?;
        match words.iter().find(|(word, _)| *word == found) {
            Some((_, meaning)) => Ok(*meaning),
            None => {
                let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                Err(self.error(field, format!("one of {}", known.join(", ")), found))
            }
        }
    }

    /// Refuses a field that asks for what is not there.
    pub(super) fn refuse(&self, field: &str, instead: &str) -> Result<()> {
        match self.get(field) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(value) => Err(Error::unsupported(format!("{}: `{field}`: {value}", self.0.file()), instead)),
        }
    }
}

/// The text with the infinities that Python writes bare, which are no JSON, as strings.
fn quoted(text: &str) -> String {
    let (mut out, mut inside, mut escaped, mut rest) =
        (String::with_capacity(text.len()), false, false, text);
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity"].into_iter().find(|word| !inside && rest.starts_with(word));
        if let Some(word) = word {
            out.extend(["\"", word, "\""]);
            rest = &rest[word.len()..];
            continue;
        }
        inside ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_of_python_are_numbers() {
        let text = r#"{"a": -Infinity, "b": [Infinity], "c\"\\": "Infinity, \" -Infinity"}"#;
        let fields = Fields::parse(Path::new("f"), text).unwrap();
        assert_eq!(fields.number("a", 0.0).unwrap(), f64::NEG_INFINITY);
        assert_eq!(fields.get("b").unwrap()[0], "Infinity");
        assert_eq!(fields.text("c\"\\", "").unwrap(), "Infinity, \" -Infinity");
    }
}
