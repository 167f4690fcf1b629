//! Typed look-up of metadata.

use std::path::Path;

use super::cursor::{Cursor, Fault};
use super::value::{Value, ValueKind};
use crate::{Error, Result};

/// The metadata of a GGUF file: what `config.json` and `tokenizer.json` hold elsewhere.
///
/// Values are read from the file when they are asked for, and borrow from it.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
    /// Where each key begins, sorted by key.
    pub(super) keys: &'a [usize],
}

/// The key at an offset, and a cursor at the type of its value.
pub(super) fn key_at(bytes: &[u8], at: usize) -> Result<(&str, Cursor<'_>), Fault> {
    let mut cursor = Cursor::new(bytes, at);
    let key = cursor.text("key of a metadata value")?;
    Ok((key, cursor))
}

impl<'a> Metadata<'a> {
    /// The file that the metadata is of.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// The keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let bytes = self.bytes;
        self.keys.iter().filter_map(move |&at| key_at(bytes, at).ok().map(|(key, _)| key))
    }

    /// The value of a key, if it is there.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let compare = |&at: &usize| key_at(self.bytes, at).map_or("", |(found, _)| found).cmp(key);
        let found = self.keys.binary_search_by(compare).ok()?;
        let (_, mut cursor) = key_at(self.bytes, *self.keys.get(found)?).ok()?;
        let kind = ValueKind::read(&mut cursor).ok()?;
        Value::read(&mut cursor, kind, 0).ok()
    }

    /// The value of a key, as a type that can hold it: [`FromValue`] says which.
    ///
    /// # Errors
    /// [`Error::Config`] if the key is absent, or its value of another type or out of range.
    pub fn required<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| self.refuse(key, T::EXPECTED, "nothing"))
    }

    /// The value of a key, or none if the key is absent.
    ///
    /// # Errors
    /// [`Error::Config`] if the value is of another type or out of range.
    pub fn optional<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| self.refuse(key, T::EXPECTED, &value.to_string()))
    }

    /// A number in 0 ..= 2³² − 1, stored as any type of integer. Errors as in
    /// [`required`](Self::required).
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.required(key)
    }

    /// A number in 0 ..= 2⁶⁴ − 1, stored as any type of integer. Errors as in [`required`](Self::required).
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.required(key)
    }

    /// A number in −2⁶³ ..= 2⁶³ − 1, stored as any type of integer. Errors as in
    /// [`required`](Self::required).
    pub fn i64(&self, key: &str) -> Result<i64> {
        self.required(key)
    }

    /// A floating-point number; one of 64 bits is rounded. Errors as in [`required`](Self::required).
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.required(key)
    }

    /// A floating-point number. Errors as in [`required`](Self::required).
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.required(key)
    }

    /// True or false. Errors as in [`required`](Self::required).
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.required(key)
    }

    /// Text, which must be UTF-8. Errors as in [`required`](Self::required).
    pub fn str(&self, key: &str) -> Result<&'a str> {
        self.required(key)
    }

    /// A list of texts, each of which must be UTF-8. Errors as in [`required`](Self::required).
    pub fn strings(&self, key: &str) -> Result<Vec<&'a str>> {
        self.required(key)
    }

    /// A list of integers of any type. Errors as in [`required`](Self::required).
    pub fn i64s(&self, key: &str) -> Result<Vec<i64>> {
        self.required(key)
    }

    /// A list of floating-point numbers; those of 64 bits are rounded. Errors as in
    /// [`required`](Self::required).
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>> {
        self.required(key)
    }

    /// A list of truth values. Errors as in [`required`](Self::required).
    pub fn bools(&self, key: &str) -> Result<Vec<bool>> {
        self.required(key)
    }

    fn refuse(&self, key: &str, expected: &str, found: &str) -> Error {
        Error::config(self.path.display().to_string(), key, expected, found)
    }
}

/// Types that metadata can be read as.
///
/// Integers are taken from every integer type whose value they can hold, as writers do not agree on the
/// widths; floating-point numbers from both widths; nothing else is converted.
pub trait FromValue<'a>: Sized {
    /// What is expected, for the error.
    const EXPECTED: &'static str;
    /// The value as this type, or none where it is of another type or out of range.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! from_integer {
    ($($type:ty: $expected:literal),* $(,)?) => {$(
        impl<'a> FromValue<'a> for $type {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: Value<'a>) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
    )*};
}
from_integer! {
    u8: "an integer in 0 ..= 255",
    u32: "an integer in 0 ..= 4294967295",
    u64: "an integer >= 0",
    usize: "an integer >= 0",
    i32: "an integer in -2147483648 ..= 2147483647",
    i64: "an integer",
}

impl<'a> FromValue<'a> for f64 {
    const EXPECTED: &'static str = "a floating-point number";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for f32 {
    const EXPECTED: &'static str = "a floating-point number";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::F32(value) => Some(value),
            Value::F64(value) => Some(value as f32),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Bool(value) = value { Some(value) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string in UTF-8";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::String(bytes) = value { std::str::from_utf8(bytes).ok() } else { None }
    }
}

macro_rules! from_array {
    ($($type:ty: $expected:literal),* $(,)?) => {$(
        impl<'a> FromValue<'a> for Vec<$type> {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: Value<'a>) -> Option<Self> {
                let Value::Array(array) = value else { return None };
                let mut list = Vec::with_capacity(array.len());
                for value in array.iter() {
                    list.push(<$type>::from_value(value)?);
                }
                // Shorter if the file has changed since it was opened.
                (list.len() == array.len()).then_some(list)
            }
        }
    )*};
}
from_array! {
    i32: "an array of integers in -2147483648 ..= 2147483647",
    i64: "an array of integers",
    u32: "an array of integers in 0 ..= 4294967295",
    f32: "an array of floating-point numbers",
    f64: "an array of floating-point numbers",
    bool: "an array of true and false",
    &'a str: "an array of strings in UTF-8",
}
