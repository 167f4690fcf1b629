//! Grammars of varied features, each with a judge of its texts that is not ours.

use controlgen_core::{Error, Result};
use controlgen_text::grammar::{Grammar, JsonGrammar, Whitespace};
use serde_json::{Value, json};

/// Says whether a text is one of the grammar.
pub type Judge = Box<dyn Fn(&str) -> Result<(), String>>;

/// A grammar, what a model is asked, and the judge.
pub struct Case {
    /// `json`, `regex` or `lark`.
    pub kind: &'static str,
    /// What it is of.
    pub name: &'static str,
    /// The schema, the regular expression, the Lark grammar.
    pub source: String,
    /// Before the text.
    pub prompt: &'static str,
    /// The grammar.
    pub grammar: Grammar,
    /// `jsonschema`, `regex`, or a parser written for the grammar.
    pub judge: Judge,
}

/// All of them.
///
/// # Errors
/// None, unless a grammar is wrong.
pub fn cases() -> Result<Vec<Case>> {
    let mut all = Vec::new();
    for (name, prompt, whitespace, schema) in schemas() {
        all.push(json(name, prompt, whitespace, &schema)?);
    }
    for (name, prompt, source) in REGEXES {
        let whole = regex::Regex::new(&format!("^(?:{source})$"))
            .map_err(|problem| Error::value("regular expression", "one of the regex crate", problem))?;
        let judge = move |text: &str| whole.is_match(text).then_some(()).ok_or("no match".to_owned());
        let grammar = Grammar::regex(source)?;
        all.push(Case {
            kind: "regex",
            name,
            source: source.into(),
            prompt,
            grammar,
            judge: Box::new(judge),
        });
    }
    for (name, prompt, source, parse) in LARKS {
        let judge = move |text: &str| match parse(text) {
            Some("") => Ok(()),
            Some(rest) => Err(format!("`{rest}` is left")),
            None => Err("no parse".to_owned()),
        };
        let grammar = Grammar::lark(source)?;
        all.push(Case { kind: "lark", name, source: source.into(), prompt, grammar, judge: Box::new(judge) });
    }
    Ok(all)
}

fn json(name: &'static str, prompt: &'static str, whitespace: Whitespace, schema: &Value) -> Result<Case> {
    let validator = jsonschema::options().should_validate_formats(true).build(schema);
    let validator = validator.map_err(|problem| Error::value("schema", "one of jsonschema", problem))?;
    let judge = move |text: &str| {
        let value: Value = serde_json::from_str(text).map_err(|problem| problem.to_string())?;
        validator.validate(&value).map_err(|problem| problem.to_string())
    };
    let grammar = JsonGrammar::new(schema)?.whitespace(whitespace)?.into();
    Ok(Case { kind: "json", name, source: schema.to_string(), prompt, grammar, judge: Box::new(judge) })
}

/// The schema of jump-forward's measurement: mostly names that are known.
pub fn subscriber() -> Value {
    json!({
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "minLength": 1, "maxLength": 12},
            "last_name": {"type": "string", "minLength": 1, "maxLength": 12},
            "date_of_birth": {"type": "string", "format": "date"},
            "address": {
                "type": "object",
                "properties": {
                    "street": {"type": "string", "maxLength": 16},
                    "house_number": {"type": "integer", "minimum": 1, "maximum": 999},
                    "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"}
                },
                "required": ["street", "house_number", "postal_code"],
                "additionalProperties": false
            },
            "favourite_colour": {"enum": ["red", "green", "blue"]},
            "is_subscribed": {"type": "boolean"}
        },
        "required": [
            "first_name", "last_name", "date_of_birth", "address", "favourite_colour", "is_subscribed"
        ],
        "additionalProperties": false
    })
}

fn schemas() -> Vec<(&'static str, &'static str, Whitespace, Value)> {
    vec![
        ("nested objects", "A subscriber of the paper, as JSON:\n", Whitespace::Spaced, subscriber()),
        (
            "arrays, enums, optional properties",
            "A recipe for soup, as JSON:\n",
            Whitespace::Flexible { most: 8 },
            json!({
                "type": "object",
                "properties": {
                    "title": {"type": "string", "minLength": 3, "maxLength": 30},
                    "servings": {"type": "integer", "minimum": 1, "maximum": 12},
                    "ingredients": {
                        "type": "array", "minItems": 1, "maxItems": 4,
                        "items": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string", "maxLength": 20},
                                "amount": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000},
                                "unit": {"enum": ["g", "ml", "piece", null]}
                            },
                            "required": ["name", "amount"],
                            "additionalProperties": false
                        }
                    },
                    "vegetarian": {"type": "boolean"}
                },
                "required": ["title", "ingredients"],
                "additionalProperties": false
            }),
        ),
        (
            "formats",
            "An event in the log of the server, as JSON:\n",
            Whitespace::Compact,
            json!({
                "type": "object",
                "properties": {
                    "id": {"type": "string", "format": "uuid"},
                    "at": {"type": "string", "pattern": "^20[0-9]{2}-0[1-9]-[0-2][1-8]T[01][0-9]:[0-5][0-9]:00Z$"},
                    "from": {"type": "string", "format": "ipv4"},
                    "day": {"type": "string", "format": "date"},
                    "level": {"const": "warning"},
                    "code": {"type": "integer", "multipleOf": 5, "minimum": 100, "maximum": 600}
                },
                "required": ["id", "at", "from", "day", "level", "code"],
                "additionalProperties": false
            }),
        ),
        (
            "unions and references",
            "A tree of the files in a folder, as JSON:\n",
            Whitespace::Spaced,
            json!({
                "$ref": "#/$defs/entry",
                "$defs": {
                    "entry": {
                        "anyOf": [{"$ref": "#/$defs/file"}, {"$ref": "#/$defs/folder"}]
                    },
                    "file": {
                        "type": "object",
                        "properties": {
                            "file": {"type": "string", "pattern": "^[a-z]{1,8}\\.(txt|png|rs)$"},
                            "bytes": {"type": ["integer", "null"], "minimum": 0, "maximum": 100_000}
                        },
                        "required": ["file", "bytes"],
                        "additionalProperties": false
                    },
                    "folder": {
                        "type": "object",
                        "properties": {
                            "folder": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                            "entries": {"type": "array", "items": {"$ref": "#/$defs/file"}, "maxItems": 3}
                        },
                        "required": ["folder", "entries"],
                        "additionalProperties": false
                    }
                }
            }),
        ),
        (
            "tuples, maps, bounds",
            "The places of the game and their points, as JSON:\n",
            Whitespace::Flexible { most: 3 },
            json!({
                "type": "object",
                "properties": {
                    "position": {
                        "type": "array",
                        "prefixItems": [
                            {"type": "number", "minimum": -90, "maximum": 90},
                            {"type": "number", "minimum": -180, "maximum": 180}
                        ],
                        "items": false, "minItems": 2
                    },
                    "points": {
                        "type": "object",
                        "patternProperties": {"^[a-z]{2,6}$": {"type": "integer", "minimum": 0, "maximum": 20}},
                        "additionalProperties": false, "minProperties": 1, "maxProperties": 3
                    }
                },
                "required": ["position", "points"],
                "additionalProperties": false
            }),
        ),
    ]
}

const REGEXES: [(&str, &str, &str); 4] = [
    (
        "a date",
        "The letter is dated ",
        r"(Monday|Tuesday|Friday|Sunday), ([1-9]|[12][0-9]|3[01]) (March|April|May) 19[0-9]{2}",
    ),
    (
        "a telephone number",
        "Call us at ",
        r"\+[1-9][0-9]{0,2} \([0-9]{2,4}\) [0-9]{3}-[0-9]{4}( ext\. [0-9]{1,3})?",
    ),
    (
        "a sentence of few words",
        "My favourite animal: ",
        r"(?i)the [a-z]{3,9}( (and|or) the [a-z]{3,9}){0,2}\.",
    ),
    ("Unicode letters", "Her name in three words: ", r"\p{Lu}\p{Ll}{1,8}( \p{Lu}\p{Ll}{1,8}){2}"),
];

type Parse = fn(&str) -> Option<&str>;

const LARKS: [(&str, &str, &str, Parse); 2] = [
    (
        "arithmetic",
        "Seven plus three times two is written ",
        r#"start: sum "."
sum: product ((" + " | " - ") product)~0..3
product: factor ((" * " | " / ") factor)~0..2
factor: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"#,
        |text| arithmetic::sum(text)?.strip_prefix('.'),
    ),
    (
        "queries",
        "All users older than thirty, in SQL: ",
        r#"start: "SELECT " columns " FROM " TABLE (" WHERE " condition)? ";"
columns: "*" | COLUMN (", " COLUMN)~0..2
condition: clause ((" AND " | " OR ") clause)~0..2
clause: "NOT "? comparison | "(" comparison ((" AND " | " OR ") comparison)~1..2 ")"
comparison: COLUMN " " OPERATOR " " value
value: /[0-9]{1,4}/ | "'" /[a-z ]{1,12}/ "'"
TABLE: "users" | "orders"
COLUMN: "id" | "name" | "age" | "price"
OPERATOR: "=" | "<" | ">" | "<="
"#,
        queries::query,
    ),
];

/// What is left of a text after as many repetitions as there are, `most` at most.
fn repeated(mut text: &str, most: usize, one: impl Fn(&str) -> Option<&str>) -> &str {
    for _ in 0..most {
        let Some(rest) = one(text) else { break };
        text = rest;
    }
    text
}

fn one_of<'t>(text: &'t str, of: &[&str]) -> Option<&'t str> {
    of.iter().find_map(|start| text.strip_prefix(start))
}

/// Characters of a class, `most` at most, one at least.
fn some(text: &str, most: usize, of: impl Fn(char) -> bool) -> Option<&str> {
    let rest = repeated(text, most, |text| text.strip_prefix(&of));
    (rest.len() < text.len()).then_some(rest)
}

/// By recursive descent.
mod arithmetic {
    use super::{one_of, repeated, some};

    pub fn sum(text: &str) -> Option<&str> {
        Some(repeated(product(text)?, 3, |text| product(one_of(text, &[" + ", " - "])?)))
    }

    fn product(text: &str) -> Option<&str> {
        Some(repeated(factor(text)?, 2, |text| factor(one_of(text, &[" * ", " / "])?)))
    }

    fn factor(text: &str) -> Option<&str> {
        match text.strip_prefix('(') {
            Some(text) => sum(text)?.strip_prefix(')'),
            None => some(text, 3, |c| c.is_ascii_digit()).filter(|_| !text.starts_with('0')),
        }
    }
}

/// By recursive descent.
mod queries {
    use super::{one_of, repeated, some};

    pub fn query(text: &str) -> Option<&str> {
        let text = text.strip_prefix("SELECT ")?;
        let text = match text.strip_prefix('*') {
            Some(text) => text,
            None => repeated(column(text)?, 2, |text| column(text.strip_prefix(", ")?)),
        };
        let text = one_of(text.strip_prefix(" FROM ")?, &["users", "orders"])?;
        let text = match text.strip_prefix(" WHERE ") {
            Some(text) => condition(text)?,
            None => text,
        };
        text.strip_prefix(';')
    }

    fn column(text: &str) -> Option<&str> {
        one_of(text, &["id", "name", "age", "price"])
    }

    fn condition(text: &str) -> Option<&str> {
        Some(repeated(clause(text)?, 2, |text| clause(joined(text)?)))
    }

    fn clause(text: &str) -> Option<&str> {
        match text.strip_prefix('(') {
            Some(text) => {
                let text = comparison(joined(comparison(text)?)?)?;
                repeated(text, 1, |text| comparison(joined(text)?)).strip_prefix(')')
            }
            None => comparison(text.strip_prefix("NOT ").unwrap_or(text)),
        }
    }

    fn joined(text: &str) -> Option<&str> {
        one_of(text, &[" AND ", " OR "])
    }

    fn comparison(text: &str) -> Option<&str> {
        let text = one_of(column(text)?.strip_prefix(' ')?, &["= ", "< ", "> ", "<= "])?;
        match text.strip_prefix('\'') {
            Some(text) => some(text, 12, |c| c.is_ascii_lowercase() || c == ' ')?.strip_prefix('\''),
            None => some(text, 4, |c| c.is_ascii_digit()),
        }
    }
}
