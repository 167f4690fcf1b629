//! JSON: values of the schema, written as asked.

use controlgen_text::grammar::{Grammar, JsonGrammar, Whitespace};
use serde_json::{Value, json};

use crate::model;

fn person() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 4},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/colour"}, "minItems": 1, "maxItems": 2},
            "home": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"zip": {"type": "string",
                "pattern": "^[0-9]{5}$"}}, "required": ["zip"], "additionalProperties": false}]}
        },
        "required": ["name", "age", "tags", "home"],
        "additionalProperties": false,
        "$defs": {"colour": {"enum": ["red", "green"]}}
    })
}

/// The schema, by hand.
fn is_person(value: &Value) -> bool {
    let name = value["name"].as_str().is_some_and(|name| (1..=4).contains(&name.chars().count()));
    let age = value["age"].as_i64().is_some_and(|age| (0..=130).contains(&age));
    let colour = |of: &Value| of == "red" || of == "green";
    let tags =
        value["tags"].as_array().is_some_and(|all| (1..=2).contains(&all.len()) && all.iter().all(colour));
    let digits = |zip: &str| zip.len() == 5 && zip.bytes().all(|b| b.is_ascii_digit());
    let home = &value["home"];
    let home =
        home.is_null() || home["zip"].as_str().is_some_and(digits) && home.as_object().unwrap().len() == 1;
    name && age && tags && home && value.as_object().unwrap().len() == 4
}

#[test]
fn values_are_the_schemas() {
    let model = model();
    let with = |whitespace| JsonGrammar::new(&person()).unwrap().whitespace(whitespace).unwrap().into();
    let written: [(Whitespace, Grammar); 3] =
        [Whitespace::Compact, Whitespace::Spaced, Whitespace::Flexible { most: 2 }].map(|w| (w, with(w)));
    for (whitespace, grammar) in &written {
        for completion in model
            .generate("The sky")
            .grammar(grammar)
            .sample(1)
            .n(12)
            .max_new_tokens(300)
            .run()
            .unwrap()
            .completions
        {
            let text = &completion.text;
            let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert!(is_person(&value), "{text}");
            let outside = outside_strings(text);
            match whitespace {
                Whitespace::Compact => assert!(!outside.contains(char::is_whitespace), "{text}"),
                Whitespace::Spaced => {
                    let bare = outside.replace(", ", ",").replace(": ", ":");
                    assert!(!bare.contains(char::is_whitespace), "{text}");
                    assert_eq!(outside.matches(',').count(), outside.matches(", ").count(), "{text}");
                }
                Whitespace::Flexible { .. } => {
                    let runs = outside.split(|c: char| !c.is_whitespace());
                    assert!(runs.into_iter().all(|run| run.len() <= 2), "{text}");
                }
            }
        }
    }
}

/// The text with one quotation mark for each string.
fn outside_strings(text: &str) -> String {
    let (mut inside, mut escaped) = (false, false);
    text.chars()
        .filter(|&c| {
            let was = inside;
            if escaped {
                escaped = false;
            } else if c == '\\' {
                escaped = true;
            } else if c == '"' {
                inside = !inside;
            }
            !was
        })
        .collect()
}

/// Formats of numbers bound them; a schema may be `true`.
#[test]
fn numbers_and_booleans() {
    let model = model();
    let grammar = Grammar::json_schema(&json!({"type": "integer", "format": "int8"})).unwrap();
    for completion in model.generate("a").grammar(&grammar).sample(2).n(40).run().unwrap().completions {
        completion.text.parse::<i8>().unwrap();
    }
    let grammar = Grammar::json_schema(&json!(true)).unwrap();
    let any = model.generate("a").grammar(&grammar).sample(2).n(20).run().unwrap().completions;
    for completion in any.iter().filter(|c| matches!(c.finish, controlgen_text::search::Finish::Eos(_))) {
        let read = serde_json::from_str::<Value>(&completion.text);
        // Numbers without bounds may have any exponent.
        let huge = read.as_ref().is_err_and(|error| error.to_string().contains("out of range"));
        assert!(read.is_ok() || huge, "{}", completion.text);
    }
}
