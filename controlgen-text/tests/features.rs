//! Feature scores against their definition: the sum over the words of the text, read anew after each token.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::sync::Arc;

use controlgen_core::{Error, Rows, TokenControl};
use controlgen_text::controls::Features;
use controlgen_text::controls::features::*;
use controlgen_text::words::TokenTrie;
use proptest::prelude::*;
use tch::Tensor;

/// Words begin, go on and end within tokens; é and — come whole and in parts, and the parts also make ô; one token
/// says nothing.
const TOKENS: [&[u8]; 24] = [
    b" a",
    b"a",
    b"b",
    b"ab",
    b" ab",
    b"abc",
    b"c",
    b".",
    b" ",
    b"b a",
    b" B",
    b"A",
    b"",
    "é".as_bytes(),
    b"\xC3",
    b"\xA9",
    b"a\xC3",
    b"\xE2\x80",
    b"\x94",
    "— b".as_bytes(),
    b"'s",
    b"1",
    b"\xFF",
    b"c, ",
];

const WANTED: [&str; 4] = ["ab", "aab", "é", "Abc"];
const VALUES: [(&str, f64); 4] = [("a", 1.25), ("abc", -2.0), ("b", 0.5), ("bé", 3.0)];

fn number(word: &str, before: &[Arc<str>]) -> f64 {
    (word.len() as f64).sqrt() - before.len() as f64 * 0.25
}

fn features() -> Features {
    Features::new(&TokenTrie::from_bytes(TOKENS).unwrap())
        .with(1.5, WordList::new(WANTED).unwrap())
        .and_then(|features| features.with(-0.75, Lexicon::new(VALUES).unwrap()))
        .and_then(|features| features.with(-2.0, Repetition::new().except(["A"])))
        .and_then(|features| features.with(0.5, Alliteration))
        .and_then(|features| features.with(0.1, WordLength))
        .and_then(|features| features.with(0.3, Syllables))
        .and_then(|features| features.with(-0.2, Monosyllabic))
        .and_then(|features| features.with(0.7, number))
        .unwrap()
}

/// Σ over the words of these bytes, from the definitions.
fn sum(bytes: &[u8]) -> f64 {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    let words: Vec<Arc<str>> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(Arc::from).collect();
    let worth = |i: usize| {
        let (word, before) = (&*words[i], &words[..i]);
        let listed = WANTED.iter().any(|wanted| wanted.to_lowercase() == word);
        let value = VALUES.iter().find(|(other, _)| *other == word).map_or(0.0, |(_, value)| *value);
        let repeated = before.iter().filter(|other| &***other == word && word != "a").count();
        let alike = |c: char| before.last().is_some_and(|last| last.starts_with(c)) && word.starts_with(c);
        1.5 * f64::from(u8::from(listed)) - 0.75 * value - 2.0 * repeated as f64
            + 0.5 * f64::from(u8::from(alike('b') || alike('c') || alike('s') || alike('é') || alike('ô')))
            + 0.1 * word.chars().count() as f64
            + 0.3 * Syllables.value(word, before)
            - 0.2 * Monosyllabic.value(word, before)
            + 0.7 * number(word, before)
    };
    (0..words.len()).map(worth).sum()
}

fn bytes(tokens: &[i64]) -> Vec<u8> {
    tokens.iter().flat_map(|&token| TOKENS[token as usize].iter().copied()).collect()
}

fn token() -> std::ops::Range<i64> {
    0..TOKENS.len() as i64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Each token gets what the sum changes by, in every row, also of what was kept from other rows.
    #[test]
    fn tokens_get_what_the_sum_changes_by(
        prompts in prop::collection::vec(prop::collection::vec(token(), 0..4), 3),
        steps in prop::collection::vec((prop::collection::vec(token(), 3), prop::collection::vec(0i64..3, 3)), 0..8),
    ) {
        let features = features();
        let mut texts = prompts.clone();
        let mut state = features.start(&prompts).unwrap();
        // Two tokens more than the vocabulary has.
        let plain = Tensor::arange(TOKENS.len() as i64 + 2, tch::kind::FLOAT_CPU).repeat([3, 1]);
        for (tokens, rows) in &steps {
            let found: Vec<Vec<f64>> =
                (features.score(&mut state, plain.copy()).unwrap() - &plain).try_into().unwrap();
            for (found, text) in found.iter().zip(&texts) {
                let before = sum(&bytes(text));
                for (token, found) in token().zip(found) {
                    let expected = sum(&bytes(&[text.as_slice(), &[token]].concat())) - before;
                    prop_assert!((found - expected).abs() < 1e-4, "{text:?} + {token}: {found}, {expected}");
                }
                prop_assert_eq!(&found[TOKENS.len()..], &[0.0, 0.0]);
            }
            features.advance(&mut state, tokens).unwrap();
            texts.iter_mut().zip(tokens).for_each(|(text, &token)| text.push(token));
            state.reorder(rows).unwrap();
            texts = rows.iter().map(|&row| texts[row as usize].clone()).collect();
        }
    }
}

/// What is spelled with more tokens is worth as much.
#[test]
fn all_tokenisations_are_worth_the_same() {
    let trie = TokenTrie::from_bytes([" ocean", " oce", "an", " o", "c", "e", "ography", "."]).unwrap();
    let features = Features::new(&trie).with(3.0, WordList::new(["Ocean"]).unwrap()).unwrap();
    for (tokens, expected) in [
        (&[0i64, 7][..], vec![3.0, 0.0]),
        (&[1, 2, 7], vec![0.0, 3.0, 0.0]),
        (&[3, 4, 5, 2], vec![0.0, 0.0, 0.0, 3.0]),
        (&[0, 6, 7], vec![3.0, -3.0, 0.0]),
    ] {
        let mut state = features.start(&[vec![7]]).unwrap();
        let mut found = Vec::new();
        for &token in tokens {
            let scores = features.score(&mut state, Tensor::zeros([1, 8], tch::kind::FLOAT_CPU)).unwrap();
            found.push(scores.double_value(&[0, token]));
            features.advance(&mut state, &[token]).unwrap();
        }
        assert_eq!(found, expected, "{tokens:?}");
    }
}

#[test]
fn lexicons_are_read_from_files() {
    let write = |text: &str| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    let file = write("# valence\ngood\t3\nBad\t-3.5\n\ncan't stand\t-3\n");
    let lexicon = Lexicon::open(file.path()).unwrap();
    assert_eq!((lexicon.len(), lexicon.left_out()), (2, 1));
    assert_eq!(
        [lexicon.value("good", &[]), lexicon.value("bad", &[]), lexicon.value("so", &[])],
        [3.0, -3.5, 0.0]
    );
    for (text, says) in [
        ("good 3\n", "line 1"),
        ("good\t3\nbad\tworse\n", "line 2"),
        ("good\tNaN\n", "line 1"),
        ("a\tinf", "line 1"),
    ] {
        let error = Lexicon::open(write(text).path()).unwrap_err();
        assert!(matches!(error, Error::Format { .. }) && error.to_string().contains(says), "{error}");
    }
    assert!(matches!(Lexicon::open("no/such/file"), Err(Error::Io { .. })));
    assert!(matches!(Lexicon::open(write("# nothing\n").path()), Err(Error::Value { .. })));
    assert!(matches!(Lexicon::open(write("a\t1\nA\t2\n").path()), Err(Error::Value { .. })));
}

#[test]
fn bad_input() {
    let trie = TokenTrie::from_bytes(["a", " b"]).unwrap();
    let list = || WordList::new(["a"]).unwrap();
    let none: [&str; 0] = [];
    let refused = |made: Result<(), Error>, says: &str| {
        let error = made.unwrap_err();
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(says), "{error}");
    };
    for bad in [f64::NAN, f64::INFINITY, -1e7] {
        refused(Features::new(&trie).with(bad, list()).map(drop), "weight of a feature");
    }
    refused(WordList::new(none).map(drop), "at least one");
    refused(WordList::new(["ice cream"]).map(drop), "single word");
    refused(Lexicon::new([("a", f64::NAN)]).map(drop), "finite");
    refused(Features::new(&trie).start(&[vec![0]]).map(drop), "at least one feature");
    let one = Features::new(&trie).with(1.0, list()).unwrap();
    let narrow = one.score(&mut one.start(&[vec![0]]).unwrap(), Tensor::zeros([1, 1], tch::kind::FLOAT_CPU));
    refused(narrow.map(drop), "vocabulary");
    let nan = Features::new(&trie).with(1.0, |_: &str, _: &[Arc<str>]| f64::NAN).unwrap();
    let error = nan.score(&mut nan.start(&[vec![0]]).unwrap(), Tensor::zeros([1, 2], tch::kind::FLOAT_CPU));
    assert!(matches!(error, Err(Error::NotFinite { .. })));
}
