//! Values of Rust types.

use std::collections::HashSet;

use controlgen_core::Error;
use controlgen_text::search::BeamSearch;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::model;

#[derive(Debug, Deserialize, JsonSchema, PartialEq)]
struct Person {
    #[schemars(length(max = 3))]
    name: String,
    age: u8,
    balance: i64,
    #[schemars(range(min = -2.0, max = 2.0))]
    height: f32,
    mood: Option<Mood>,
    colours: HashSet<Colour>,
    /// Said twice, it would not fit.
    pair: (bool, Colour),
}

#[derive(Debug, Deserialize, JsonSchema, PartialEq, Eq, Hash)]
#[serde(rename_all = "snake_case")]
enum Colour {
    /// As blood.
    Red,
    /// As grass.
    DarkGreen,
}

#[derive(Debug, Deserialize, JsonSchema, PartialEq)]
#[serde(tag = "kind")]
enum Mood {
    Good,
    Bad { because: Colour },
}

#[test]
fn values_of_a_type() {
    let model = model();
    let run = || model.generate("The sky").max_new_tokens(2000);
    let all = run().sample(4).n(8).extract_all::<Person>().unwrap();
    let mut whole = 0;
    for person in all {
        match person {
            Ok(person) => {
                assert!(person.name.chars().count() <= 3 && person.height.abs() <= 2.0, "{person:?}");
                whole += 1;
            }
            // A list of colours may go on and on.
            Err(Error::Incomplete { text, .. }) => assert!(text.starts_with("{\"name\": "), "{text}"),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(whole >= 4, "{whole} of 8");
    let colour: Colour = run().search(BeamSearch::new(3).unwrap()).extract().unwrap();
    assert!([Colour::Red, Colour::DarkGreen].contains(&colour));
    let mood: Mood = run().sample(1).extract().unwrap();
    println!("{mood:?}");
    let number: u8 = model.extract("a").unwrap();
    println!("{number}");
}

#[test]
fn what_the_length_cuts_off() {
    let model = model();
    let cut = model.generate("The sky").sample(4).max_new_tokens(3).extract::<Person>().unwrap_err();
    let Error::Incomplete { text, reason, what } = &cut else { panic!("{cut}") };
    assert!(
        !text.is_empty() && "{\"name\": \"".starts_with(&text[..1]) && reason.contains("Length"),
        "{cut}"
    );
    assert!(what.contains("Person"), "{cut}");
}

#[derive(Debug, Deserialize, JsonSchema)]
struct Unsupported {
    #[allow(dead_code)]
    #[schemars(extend("not" = { "type": "string" }))]
    value: i32,
}

#[test]
fn types_that_grammars_cannot_say() {
    let error = model().generate("a").extract::<Unsupported>().unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what, .. } if what.contains("`not` at #/properties/value")),
        "{error}"
    );
}
