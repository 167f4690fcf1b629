//! What is refused, with the reason, when it is built.

use std::time::Instant;

use controlgen_core::{Error, TokenControl};
use controlgen_text::grammar::{Grammar, GrammarControl, JsonGrammar, Vocabulary, Whitespace};
use serde_json::{Value, json};
use tch::{Tensor, kind};

use crate::{compiled, model, tokenizer};

/// The error of a grammar, made or compiled.
fn refused(grammar: controlgen_core::Result<Grammar>) -> Error {
    let vocabulary = model().vocabulary().unwrap();
    let begin = Instant::now();
    let error = grammar.and_then(|grammar| GrammarControl::new(&grammar, &vocabulary)).err();
    println!("{:?}: {}", begin.elapsed(), error.as_ref().map_or("none".to_owned(), ToString::to_string));
    error.unwrap()
}

#[test]
fn bad_syntax() {
    for (grammar, word) in [
        (Grammar::regex("(a"), "regular expression"),
        (Grammar::regex("a{3,1}"), "regular expression"),
        (Grammar::regex("(?=a)b"), "regular expression"),
        (Grammar::lark("start: undefined_rule"), "undefined_rule"),
        (Grammar::lark("start \"a\""), "Lark"),
        (Grammar::lark(""), "Lark"),
        (Grammar::lark("start: /(a/"), "Lark"),
        (Grammar::lark("begin: \"a\""), "start"),
        (Grammar::choices::<&str>([]), "choices"),
        (Grammar::choices(["a", ""]), "choice"),
    ] {
        let error = refused(grammar);
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(word), "{error}");
    }
}

#[test]
fn no_text_at_all() {
    for grammar in [
        Grammar::lark("start: A\nA: /a/ & /b/"),
        Grammar::regex("[^\\s\\S]"),
        Grammar::json_schema(&json!(false)),
        Grammar::json_schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})),
        Grammar::json_schema(&json!({"allOf": [{"type": "string"}, {"type": "integer"}]})),
        Grammar::json_schema(&json!({"enum": []})),
    ] {
        let error = refused(grammar);
        assert!(matches!(error, Error::Value { .. }), "{error}");
    }
}

#[test]
fn unsupported_keywords_are_listed() {
    let schema = json!({
        "type": "object",
        "properties": {
            "a": {"type": "array", "uniqueItems": true, "contains": {"type": "null"}},
            "b": {"not": {"type": "string"}},
            "c": {"type": "string", "format": "regex"},
            "d": {"type": "integer", "format": "date"},
            "e": {"type": "string", "minLenght": 2}
        },
        "dependentRequired": {"a": ["b"]},
        "x-note": "is let pass"
    });
    let error = refused(Grammar::json_schema(&schema));
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let text = error.to_string();
    for listed in [
        "`uniqueItems` at #/properties/a",
        "`contains` at #/properties/a",
        "`not` at #/properties/b",
        "`format` \"regex\" at #/properties/c",
        "`format` \"date\" at #/properties/d",
        "`minLenght` at #/properties/e",
        "`dependentRequired` at #",
    ] {
        assert!(text.contains(listed), "{listed} in {text}");
    }
    assert!(!text.contains("x-note"), "{text}");
    // Options that do not exclude each other, unless that is let pass.
    let one_of = json!({"oneOf": [{"type": "integer"}, {"type": "number"}]});
    assert!(matches!(refused(Grammar::json_schema(&one_of)), Error::Value { .. }));
}

#[test]
fn schemas_that_are_none() {
    let mut deep = json!({"type": "integer"});
    for _ in 0..90 {
        deep = json!({"type": "array", "items": deep});
    }
    for schema in [
        json!(3),
        json!({"type": "intgr"}),
        json!({"properties": {"a": 3}}),
        json!({"type": "string", "maxLength": "long"}),
        json!({"type": "string", "pattern": "(a"}),
        json!({"$ref": "#/$defs/none"}),
        json!({"$ref": "https://example.com/schema"}),
        deep,
    ] {
        let error = refused(Grammar::json_schema(&schema));
        assert!(matches!(error, Error::Value { .. }), "{error}");
    }
    for most in [0, 65] {
        let json = JsonGrammar::new(&json!({})).unwrap();
        assert!(matches!(json.whitespace(Whitespace::Flexible { most }), Err(Error::Value { .. })));
    }
}

/// Grammars that would take for ever, or all memory, or the stack: each is refused, or compiled, soon.
#[test]
fn hostile_grammars_end() {
    let vocabulary = model().vocabulary().unwrap();
    let nested = |n: usize| format!("{}a{}", "(".repeat(n), ")".repeat(n));
    let rules: String = (0..30_000).map(|i| format!("r{i}: r{} r{}\n", i + 1, i + 1)).collect();
    let chain = format!("start: r0\n{rules}r30000: \"a\"\n");
    let alternatives = |n: usize| (0..n).map(|i| format!("w{i}")).collect::<Vec<_>>();
    let mut wide = serde_json::Map::new();
    for i in 0..3000 {
        wide.insert(format!("p{i}"), json!({"type": "string", "pattern": "^(a|b)*c{3}$"}));
    }
    let looped =
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    let mut doubled = json!({"type": "string"});
    for _ in 0..25 {
        doubled = json!({"anyOf": [doubled.clone(), {"type": "integer"}]});
    }
    let all_of: Vec<Value> = (0..40).map(|i| json!({"pattern": format!("[ab]*a[ab]{{{i}}}b")})).collect();
    let cases: Vec<(&str, controlgen_core::Result<Grammar>)> = vec![
        ("nested repeats", Grammar::regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}")),
        ("exponential states", Grammar::regex("(a|b)*a(a|b){60}(c|d)*")),
        ("a huge repeat", Grammar::regex("(a|bc){1000000}")),
        ("unicode repeats", Grammar::regex(r"(\w{1,1000}\s){1,1000}")),
        ("brackets", Grammar::regex(&nested(150))),
        ("too many brackets", Grammar::regex(&nested(5000))),
        ("rules in rules", Grammar::lark(&chain)),
        ("a rule of itself", Grammar::lark("start: start start | start | \"a\"")),
        ("empty loops", Grammar::lark("start: a*\na: b*\nb: \"\"")),
        ("ambiguous", Grammar::lark("start: e\ne: e e | e e e | \"a\" | \"aa\"")),
        ("many choices", Grammar::choices(alternatives(20_000))),
        ("too many choices", Grammar::choices(alternatives(400_000))),
        ("a wide object", Grammar::json_schema(&json!({"type": "object", "properties": wide}))),
        ("a loop of references", Grammar::json_schema(&looped)),
        ("itself", Grammar::json_schema(&json!({"allOf": [{"$ref": "#"}]}))),
        ("doubled", Grammar::json_schema(&doubled)),
        ("patterns at once", Grammar::json_schema(&json!({"type": "string", "allOf": all_of}))),
        (
            "many items",
            Grammar::json_schema(&json!({"type": "array", "minItems": 1_000_000, "maxItems": 2_000_000})),
        ),
        ("a long string", Grammar::json_schema(&json!({"type": "string", "minLength": 5_000_000}))),
    ];
    for (name, grammar) in cases {
        let begin = Instant::now();
        let made = grammar.and_then(|grammar| GrammarControl::new(&grammar, &vocabulary));
        let found = made.as_ref().map_or_else(ToString::to_string, |_| "compiled".to_owned());
        println!("{name}: {:?}: {}", begin.elapsed(), &found[..found.len().min(160)]);
        if let Err(error) = made {
            assert!(matches!(error, Error::Value { .. }), "{name}: {error}");
        }
    }
}

#[test]
fn vocabularies_that_do_not_fit() {
    let model = model();
    let tokenizer = tokenizer("byte_level");
    assert!(matches!(Vocabulary::new(&tokenizer, &[]), Err(Error::Value { .. })));
    assert!(matches!(Vocabulary::new(&tokenizer, &[9999]), Err(Error::Value { .. })));
    assert!(matches!(Vocabulary::new(&crate::tokenizer("wordpiece"), &[3]), Err(Error::Unsupported { .. })));
    let grammar = Grammar::regex("a").unwrap();
    let ends_never = model.generate("a").grammar(&grammar).eos([]).run().unwrap_err();
    assert!(matches!(ends_never, Error::Value { .. }), "{ends_never}");
    // Fewer logits than tokens, other rows, tokens that were banned.
    let control = compiled(&model, &grammar);
    let mut state = control.start(&[vec![5], vec![5]]).unwrap();
    let narrow = Tensor::zeros([2, 300], kind::FLOAT_CPU);
    assert!(matches!(control.score(&mut state, narrow), Err(Error::Value { .. })));
    let short = Tensor::zeros([1, model.lm().spec().vocab], kind::FLOAT_CPU);
    assert!(matches!(control.score(&mut state, short), Err(Error::Value { .. })));
    assert!(matches!(control.advance(&mut state, &[40]), Err(Error::Value { .. })));
    assert!(matches!(control.advance(&mut state, &[40, 40]), Err(Error::Value { .. })));
    assert!(matches!(control.forced(&mut state, 2), Err(Error::Value { .. })));
}
