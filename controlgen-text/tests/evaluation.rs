//! Measures of texts: against nltk, by hand, and at their edges.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::folder;
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, Result};
use controlgen_text::TextModel;
use controlgen_text::evaluation::*;
use controlgen_text::tokenizer::{Special, Tokenizer};

#[test]
fn self_bleu_is_nltks() {
    let file = std::fs::read_to_string(folder("evaluation.json")).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(&file).unwrap();
    let texts: Vec<&str> = fixture["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    for (most, expected) in fixture["self_bleu"].as_object().unwrap() {
        let (found, expected) =
            (self_bleu(&texts, most.parse().unwrap()).unwrap(), expected.as_f64().unwrap());
        assert!((found - expected).abs() < 1e-12, "{most}: {found}, nltk {expected}");
    }
    // Texts without words.
    assert_eq!(self_bleu(&["", "..."], 4).unwrap(), 0.0);
    assert!((self_bleu(&["a b c d", "A b, c d!"], 4).unwrap() - 1.0).abs() < 1e-12);
}

#[test]
fn distinct_n_counts_over_all_texts() {
    // a b | b c | a b (again); unigrams a b c a b of which 3 differ.
    let texts = ["A b c.", "a, b"];
    assert_eq!(distinct_n(&texts, 1).unwrap(), 3.0 / 5.0);
    assert_eq!(distinct_n(&texts, 2).unwrap(), 2.0 / 3.0);
    assert_eq!(distinct_n(&texts, 3).unwrap(), 1.0);
    assert_eq!(distinct_n(&texts, 4).unwrap(), 0.0);
    assert_eq!(mean_words(&texts).unwrap(), 2.5);
}

fn concepts(of: &[&[&str]]) -> Vec<Concept> {
    of.iter().map(|forms| Concept::new(*forms).unwrap()).collect()
}

#[test]
fn coverage_wants_whole_words() {
    let pets = concepts(&[&["cat", "cats"], &["sit", "sat"], &["ice cream"]]);
    for (text, count) in [
        ("The cat sat on ice cream.", 3),
        ("CATS: sit! (Ice-cream?)", 3),
        ("Concatenate the sitting.", 0),
        ("The cat's ice. Cream.", 2),
        ("ice and cream", 0),
        ("", 0),
    ] {
        let found = coverage(&[text], std::slice::from_ref(&pets)).unwrap();
        assert_eq!(found.count, f64::from(count), "{text}");
        assert_eq!(found.percent, if count == 3 { 100.0 } else { 0.0 }, "{text}");
        assert_eq!(pets.iter().filter(|concept| concept.is_in(text)).count(), count as usize);
    }
    // Sets of different sizes: the count is a mean of numbers, the share one of shares.
    let one = concepts(&[&["dog"]]);
    let found = coverage(&["a cat", "a dog", "nothing"], &[pets, one.clone(), one]).unwrap();
    assert!((found.count - 2.0 / 3.0).abs() < 1e-12);
    assert!((found.share - (100.0 / 3.0 + 100.0) / 3.0).abs() < 1e-9);
    assert!((found.percent - 100.0 / 3.0).abs() < 1e-9);
}

/// A model that says any token of a real tokenizer, by a table.
fn model() -> (TableLm, TextModel) {
    let tokenizer = Tokenizer::open(folder("tokenizer/byte_level")).unwrap();
    let vocab = tokenizer.vocab_size();
    let config =
        TableLmConfig { vocab, order: 1, bos: None, eos: vec![], scale: 2.0, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let handle = TableLm::new(&config).unwrap();
    (handle, TextModel::new(Box::new(lm), tokenizer).unwrap())
}

/// The text is scored, after the prompt, and the prompt is not; what joins the prompt's last word is the text's.
#[test]
fn judges_score_the_continuation() {
    let (lm, model) = model();
    let encode = |text: &str| model.tokenizer().encode(text, Special::Add).unwrap();
    let prompt = "The man saw";
    let texts = [" a dog.", "", "mill", " the river and a boat", " a dog."];
    let found = Judge::new(&model).likelihoods(prompt, &texts).unwrap();
    for (text, found) in texts.iter().zip(&found) {
        let (before, whole) = (encode(prompt), encode(&[prompt, text].concat()));
        let shared = whole.iter().zip(&before).take_while(|(a, b)| a == b).count();
        assert_eq!(found.tokens, whole.len() - shared, "{text:?}");
        let expected = lm.log_prob(&whole[..shared], &whole[shared..]).unwrap();
        assert!((found.log_prob - expected).abs() < 1e-4, "{text:?}: {found:?}, {expected}");
    }
    assert_eq!((found[1].tokens, found[1].log_prob), (0, 0.0));
}

#[test]
fn perplexities() {
    let texts = [
        Likelihood { log_prob: -2.0 * 4f64.ln(), tokens: 2 },
        Likelihood { log_prob: -6.0 * 2f64.ln(), tokens: 6 },
        Likelihood { log_prob: 0.0, tokens: 0 },
    ];
    // 2^(−10) over eight tokens; and the mean of 4 and 2.
    assert!((perplexity(&texts).unwrap() - 2f64.powf(10.0 / 8.0)).abs() < 1e-12);
    assert!((mean_perplexity(&texts).unwrap() - 3.0).abs() < 1e-12);
    assert!(perplexity(&texts[2..]).unwrap().is_nan());
}

#[test]
fn bad_input() {
    fn refused<T>(made: Result<T>, says: &str) {
        let error = made.err().unwrap();
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(says), "{error}");
    }
    let none: [&str; 0] = [];
    refused(Concept::new(none), "at least one form");
    refused(Concept::new(["dog", "!"]), "at least one word");
    refused(coverage(&none, &[]), "texts");
    refused(coverage(&["a"], &[]), "one a text");
    refused(coverage(&["a"], &[vec![]]), "one or more");
    refused(coverage(&["a"], &[concepts(&[&["a"], &["A"]])]), "twice");
    refused(distinct_n(&none, 1), "texts");
    refused(distinct_n(&["a"], 0), "n-grams");
    refused(self_bleu(&["a"], 4), "at least two");
    refused(self_bleu(&["a", "b"], 0), "n-grams");
    refused(mean_words(&none), "texts");
    refused(perplexity(&[]), "texts");
}
