//! Chat templates against transformers (`benches/reference/chat_fixtures.py`).
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use controlgen_core::Error;
use controlgen_text::chat::{ChatOptions, ChatTemplate, CivilTime, Message};
use serde_json::Value;

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn template(fixture: &Value, text: &str) -> Result<ChatTemplate, Error> {
    let tokens = fixture["tokens"].as_object().unwrap();
    let tokens = tokens.iter().map(|(role, token)| (role.as_str(), token.as_str().unwrap()));
    ChatTemplate::with_templates([("default".to_owned(), text.to_owned())], tokens)
}

fn messages(fixture: &Value, name: &str) -> Vec<Message> {
    let list = fixture["conversations"][name].as_array().unwrap();
    list.iter().map(|message| Message::from_json(message.clone()).unwrap()).collect()
}

fn options(fields: &Value) -> ChatOptions {
    let now = CivilTime::date(2024, 7, 26).unwrap().at(23, 59, 59).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    fields.as_object().unwrap().iter().fold(ChatOptions::new().now(now), |options, (name, value)| match name
        .as_str()
    {
        "add_generation_prompt" => options.generation_prompt(value.as_bool().unwrap()),
        "tools" => options.tools(list(value)),
        "documents" => options.documents(list(value)),
        _ => options.set(name, value.clone()),
    })
}

#[test]
fn known_styles_are_rendered_as_by_transformers() {
    let fixture = fixture();
    let (mut rendered, mut refused) = (0, 0);
    for case in fixture["cases"].as_array().unwrap() {
        let text = fixture["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let messages = messages(&fixture, case["conversation"].as_str().unwrap());
        let number = usize::try_from(case["options"].as_u64().unwrap()).unwrap();
        let found =
            template(&fixture, text).unwrap().render(&messages, &options(&fixture["options"][number]));
        let name = format!("{} {} {number}", case["template"], case["conversation"]);
        match (case["text"].as_str(), found) {
            (Some(expected), Ok(found)) => {
                rendered += 1;
                assert_eq!(found, expected, "{name}");
            }
            (None, Err(Error::Template { problem, .. })) => {
                refused += 1;
                let expected = case["error"].as_str().unwrap();
                // The words of templates are passed on; those of Python are not ours.
                if text.contains(expected) {
                    assert_eq!(problem, expected, "{name}");
                }
            }
            (expected, found) => panic!("{name}: {expected:?} {found:?}"),
        }
    }
    assert!(rendered > 140 && refused > 60, "{rendered} {refused}");
}

/// What differs: formatting by `%`, filters and globals that chat templates do not use, a macro's `varargs`, the sign
/// `+`, floats beyond 1e16 written without `tojson`, digraphs.
const DIFFER: &[&str] = &[
    "{{ 1e20 }}",
    "{{ 'Ab'.swapcase() }}",
    "{{ '%s=%d' % ('a', 2) }}",
    "{{ '%05.2f' % 3.14159 }}",
    "{{ 'a b c' | wordcount }}",
    "{{ 'long text here' | truncate(8) }}",
    "{{ {'a': {'b': 1}} | attr('a') }}",
    "{{ lipsum is defined }}",
    "{{ cycler is defined }}",
    "{{ joiner is defined }}",
    "{{ +1 }}",
    "{{ 'ǆ'.title() }}",
    "{% macro f(a, b='x', c=none) %}[{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f(1) }}{{ f(1, c=2) }}{{ f(b=3, a=4) }}",
];

#[test]
fn expressions_are_evaluated_as_by_transformers() {
    let fixture = fixture();
    let messages = messages(&fixture, "system");
    let mut bad = Vec::new();
    for case in fixture["expressions"].as_array().unwrap() {
        let source = case["source"].as_str().unwrap();
        let found = template(&fixture, source)
            .and_then(|template| template.render(&messages, &options(&serde_json::json!({}))));
        match (case["text"].as_str(), found) {
            (Some(expected), Ok(found)) if found == expected => {}
            (None, Err(Error::Template { .. })) => {}
            _ if DIFFER.contains(&source) => {}
            (_, found) => bad.push(format!("{source}\n   expected {}\n   found {found:?}", case["text"])),
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
