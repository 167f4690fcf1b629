//! JSON: values of the schema, written as asked.

use controlgen_text::controls::LogitBias;
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

/// However much the model wants digits, a number ends; unless the schema wants more of them.
#[test]
fn numbers_end() {
    let model = model();
    let digits = (0..model.tokenizer().vocab_size()).filter(|&id| {
        let bytes = model.tokenizer().token_bytes(id).unwrap_or_default();
        !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit)
    });
    let eager = LogitBias::new(digits.map(|id| (id, 30.0))).unwrap();
    let texts = |grammar: JsonGrammar, tokens| {
        let generate = model.generate("a").grammar(&grammar.into()).with(eager.clone());
        generate.sample(3).n(10).max_new_tokens(tokens).run().unwrap().completions
    };
    let list = json!({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2});
    let long = "7".repeat(50);
    let exact: Value = serde_json::from_str(&format!(r#"{{"const": "{long}"}}"#)).unwrap();
    for (longest, most) in [(1, 8), (12, 20), (32, 40)] {
        let grammar = JsonGrammar::new(&list).unwrap().longest_number(longest).unwrap();
        for completion in texts(grammar, 200) {
            let numbers = serde_json::from_str::<Vec<Value>>(&completion.text).unwrap_or_default();
            assert_eq!(numbers.len(), 2, "{}", completion.text);
            let longest = completion.text.split(['[', ',', ']']).map(|number| number.trim().len()).max();
            assert!(longest <= Some(most), "{longest:?}: {}", completion.text);
        }
        // A string of digits is no number, and what must be long is.
        for text in texts(JsonGrammar::new(&exact).unwrap().longest_number(longest).unwrap(), 200) {
            assert_eq!(text.text, format!("\"{long}\""));
        }
        let least = JsonGrammar::new(&json!({"type": "integer", "minimum": 1_000_000_000_000_000_i64}));
        for completion in texts(least.unwrap().longest_number(longest).unwrap(), 200) {
            assert!(
                completion.text.len() >= 16 && completion.text.len() <= most.max(24),
                "{}",
                completion.text
            );
        }
    }
    assert!(JsonGrammar::new(&list).unwrap().longest_number(0).is_err());
}
