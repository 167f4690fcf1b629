//! JSON Schema: what of it is supported, and how JSON is written.

use controlgen_core::{Error, Result};
use llguidance::JsonCompileOptions;
use llguidance::api::GrammarWithLexer;
use serde_json::{Map, Value, json};

use super::Grammar;

/// Where JSON has whitespace. Where it is free without a bound, models run on in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whitespace {
    /// None.
    Compact,
    /// One space after each comma and each colon, none elsewhere: as Python's `json.dumps` writes it, and what models
    /// have read most.
    #[default]
    Spaced,
    /// 0 to `most` characters of spaces, tabs and line breaks at each place where JSON allows them.
    Flexible {
        /// The most characters at one place.
        most: u32,
    },
}

/// The JSON values that a schema allows, and how they are written.
///
/// Properties come in the order of the schema. Supported keywords are `type`, `enum`, `const`, `properties`,
/// `required`, `additionalProperties`, `patternProperties`, `minProperties`, `maxProperties`, `items`, `prefixItems`,
/// `additionalItems`, `minItems`, `maxItems`, `minLength`, `maxLength`, `pattern`, `format` (date-time, time, date,
/// duration, email, hostname, ipv4, ipv6, uuid, uri; of numbers int8 … uint128, float and double, which bound them), `minimum`, `maximum`,
/// `exclusiveMinimum`, `exclusiveMaximum`, `multipleOf`, `allOf`, `anyOf`, `oneOf` whose options exclude each other, and
/// `$ref` within the document. Annotations (`title`, `description`, …, `x-…`) have no effect; all else is refused,
/// not ignored.
///
/// A number ends after 32 characters ([`longest_number`](Self::longest_number)) where the schema lets it end. The
/// characters of a string without `maxLength` are as many as the model says: at high temperatures a text may be cut off
/// within one.
#[derive(Clone, Debug)]
pub struct JsonGrammar {
    schema: Value,
    whitespace: Whitespace,
    one_of_as_any_of: bool,
    longest_number: usize,
}

/// Past what any f64 needs to be written.
const LONGEST_NUMBER: usize = 32;

impl JsonGrammar {
    /// The values that `schema` allows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] lists all keywords and formats that are not supported, each with its place;
    /// [`Error::Value`] for a schema that is none, too large or nested too deep.
    pub fn new(schema: &Value) -> Result<Self> {
        let mut schema = schema.clone();
        let mut unsupported = Vec::new();
        each(&mut schema, &mut |path, schema| {
            refuse(path, schema, &mut unsupported);
            bound_numbers(schema);
        })?;
        if !unsupported.is_empty() {
            let what = format!("JSON Schema with {}", unsupported.join(", "));
            return Err(Error::unsupported(what, "the keywords that `JsonGrammar` lists"));
        }
        Grammar::sized("JSON Schema", schema.to_string().len())?;
        let (whitespace, one_of_as_any_of) = (Whitespace::default(), false);
        Ok(Self { schema, whitespace, one_of_as_any_of, longest_number: LONGEST_NUMBER })
    }

    /// From how many characters on a number ends, unless the schema does not let it end there (`minimum`, `const`). 32,
    /// unless said. Without a bound, digits run on.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn longest_number(self, longest_number: usize) -> Result<Self> {
        if longest_number == 0 {
            return Err(Error::value("characters of a number", "at least 1", 0));
        }
        Ok(Self { longest_number, ..self })
    }

    /// Where whitespace stands.
    ///
    /// # Errors
    /// [`Error::Value`] for a bound outside 1 ..= 64.
    pub fn whitespace(self, whitespace: Whitespace) -> Result<Self> {
        match whitespace {
            Whitespace::Flexible { most } if !(1..=64).contains(&most) => {
                Err(Error::value("whitespace at one place", "1 ..= 64 characters", most))
            }
            whitespace => Ok(Self { whitespace, ..self }),
        }
    }

    /// Reads `oneOf` as `anyOf` where its options do not exclude each other. A value may then match several.
    #[must_use]
    pub fn one_of_as_any_of(self) -> Self {
        Self { one_of_as_any_of: true, ..self }
    }

    /// The grammar for values that are read into a Rust type: what serde would not miss is left out of the schema, and
    /// objects have no properties but those named.
    pub(crate) fn to_deserialize(mut schema: Value) -> Result<Self> {
        let mut joined = false;
        each(&mut schema, &mut |_, schema| {
            // A set takes an item twice.
            schema.remove("uniqueItems");
            let applied = ["$ref", "anyOf", "oneOf"].iter().any(|&key| schema.contains_key(key));
            joined |= schema.contains_key("allOf") || applied && schema.contains_key("properties");
        })?;
        if !joined {
            each(&mut schema, &mut |_, schema| {
                if schema.contains_key("properties") && !schema.contains_key("patternProperties") {
                    schema.entry("additionalProperties").or_insert(Value::Bool(false));
                }
            })?;
        }
        Ok(Self::new(&schema)?.one_of_as_any_of())
    }

    fn options(&self) -> JsonCompileOptions {
        let (comma, colon) = match self.whitespace {
            Whitespace::Spaced => (", ", ": "),
            Whitespace::Compact | Whitespace::Flexible { .. } => (",", ":"),
        };
        let pattern = match self.whitespace {
            Whitespace::Flexible { most } => Some(format!(r"[\x20\x0A\x0D\x09]{{1,{most}}}")),
            Whitespace::Compact | Whitespace::Spaced => None,
        };
        JsonCompileOptions {
            item_separator: comma.to_owned(),
            key_separator: colon.to_owned(),
            whitespace_flexible: false,
            whitespace_pattern: pattern,
            coerce_one_of: self.one_of_as_any_of,
            ..JsonCompileOptions::default()
        }
    }
}

impl From<JsonGrammar> for Grammar {
    fn from(json: JsonGrammar) -> Self {
        let options = json.options();
        let mut schema = match json.schema {
            Value::Object(schema) => Value::Object(schema),
            other => json!({ "allOf": [other] }),
        };
        options.apply_to(&mut schema);
        let source = GrammarWithLexer::from_json_schema(schema);
        Self { longest_number: Some(json.longest_number), ..Self::of("JSON Schema", source) }
    }
}

/// Keywords that say which values there may be.
const KEYWORDS: [&str; 27] = [
    "$ref",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "required",
    "type",
];

/// Keywords that say nothing of the values.
const ANNOTATIONS: [&str; 14] = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "contentEncoding",
    "contentMediaType",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
];

const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Formats of numbers with the range that they are held to: within what f64 holds to the unit, and without exponents.
const NUMBERS: [(&str, (f64, f64)); 14] = [
    ("int8", (-128.0, 127.0)),
    ("int16", (-32_768.0, 32_767.0)),
    ("int32", (-2_147_483_648.0, 2_147_483_647.0)),
    ("int64", (-9_007_199_254_740_991.0, 9_007_199_254_740_991.0)),
    ("int", (-9_007_199_254_740_991.0, 9_007_199_254_740_991.0)),
    ("uint8", (0.0, 255.0)),
    ("uint16", (0.0, 65_535.0)),
    ("uint32", (0.0, 4_294_967_295.0)),
    ("uint64", (0.0, 9_007_199_254_740_991.0)),
    ("uint", (0.0, 9_007_199_254_740_991.0)),
    ("int128", (-9_007_199_254_740_991.0, 9_007_199_254_740_991.0)),
    ("uint128", (0.0, 9_007_199_254_740_991.0)),
    ("float", (-1e15, 1e15)),
    ("double", (-1e15, 1e15)),
];

/// How deep schemas may be nested: compilers of them recur.
const DEEPEST: usize = 64;

/// Visits every schema of a document, outer ones first, each with its place.
fn each(schema: &mut Value, visit: &mut dyn FnMut(&str, &mut Map<String, Value>)) -> Result<()> {
    let mut left = vec![(String::from("#"), 0, schema)];
    while let Some((path, depth, schema)) = left.pop() {
        if depth > DEEPEST {
            return Err(Error::value(
                "JSON Schema",
                format!("at most {DEEPEST} schemas in each other"),
                path,
            ));
        }
        let schema = match schema {
            Value::Object(schema) => schema,
            Value::Bool(_) => continue,
            other => {
                let what = format!("JSON Schema at {path}");
                return Err(Error::value(what, "an object or a boolean", kind(other)));
            }
        };
        visit(&path, schema);
        for (key, value) in schema {
            let at = |part: &str| format!("{path}/{key}/{part}");
            match (key.as_str(), value) {
                ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(all)) => {
                    left.extend(all.iter_mut().map(|(name, schema)| (at(name), depth + 1, schema)));
                }
                ("allOf" | "anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(all)) => {
                    let numbered = all.iter_mut().enumerate();
                    left.extend(numbered.map(|(i, schema)| (at(&i.to_string()), depth + 1, schema)));
                }
                ("items" | "additionalItems" | "additionalProperties", schema) => {
                    left.push((format!("{path}/{key}"), depth + 1, schema));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Notes what is not supported.
fn refuse(path: &str, schema: &Map<String, Value>, unsupported: &mut Vec<String>) {
    for (key, value) in schema {
        let known = KEYWORDS.contains(&key.as_str()) || ANNOTATIONS.contains(&key.as_str());
        if !(known || key.starts_with("x-")) {
            unsupported.push(format!("`{key}` at {path}"));
        }
        if let ("format", Some(format)) = (key.as_str(), value.as_str()) {
            let fits = if is_number(schema) {
                NUMBERS.iter().any(|(name, _)| *name == format)
            } else {
                FORMATS.contains(&format)
            };
            if !fits {
                unsupported.push(format!("`format` {format:?} at {path}"));
            }
        }
    }
}

/// Whether a schema is of numbers alone, null aside.
fn is_number(schema: &Map<String, Value>) -> bool {
    let number = |of: &Value| matches!(of.as_str(), Some("integer" | "number"));
    match schema.get("type") {
        Some(Value::Array(types)) => types.iter().all(|of| number(of) || of == "null"),
        Some(of) => number(of),
        None => false,
    }
}

/// Gives numbers of a format the format's bounds.
fn bound_numbers(schema: &mut Map<String, Value>) {
    let format = schema.get("format").and_then(Value::as_str);
    let bounds = NUMBERS.iter().find(|(name, _)| Some(*name) == format).map(|(_, bounds)| *bounds);
    let Some((low, high)) = bounds.filter(|_| is_number(schema)) else { return };
    let number = |schema: &Map<String, Value>, key: &str| schema.get(key).and_then(Value::as_f64);
    if number(schema, "minimum").is_none_or(|minimum| minimum < low) {
        schema.insert("minimum".into(), low.into());
    }
    if number(schema, "maximum").is_none_or(|maximum| maximum > high) {
        schema.insert("maximum".into(), high.into());
    }
}
