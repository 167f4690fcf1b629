//! Words in text against a plain reading of the text: every tokenisation, every byte.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use controlgen_text::tokenizer::{Special, Tokenizer};
use controlgen_text::words::{TokenTrie, WordOptions, Words};
use proptest::prelude::*;

/// Pieces that meet and part words: cut characters, two cases, marks, spaces.
const PIECES: [&[u8]; 16] = [
    b"a",
    b"ab",
    b"B",
    b" ",
    b" a",
    b"b ",
    b".",
    "\u{e9}".as_bytes(),
    b"\xC3",
    b"\xA9",
    "\u{c9}a".as_bytes(),
    b"ba b",
    "\u{301}".as_bytes(),
    b"1",
    b"-",
    b"\xE2\x80",
];

/// The characters of a text that may end in the middle of one, as they will be read: (without what is open, all).
fn read(bytes: &[u8]) -> Vec<char> {
    String::from_utf8_lossy(bytes).chars().collect()
}

fn folded(c: char, options: WordOptions) -> char {
    // Of these pieces, case differs in one character each.
    if options.case_sensitive { c } else { c.to_lowercase().next().unwrap() }
}

/// Word characters among the pieces' characters.
fn is_word(c: char) -> bool {
    matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '\u{e9}' | '\u{c9}' | '\u{301}')
}

/// Whether a text ends with a part of a character.
fn is_open(bytes: &[u8]) -> bool {
    let part = |len: usize| match std::str::from_utf8(&bytes[bytes.len() - len..]) {
        Err(error) => error.valid_up_to() == 0 && error.error_len().is_none(),
        Ok(_) => false,
    };
    (1..=bytes.len().min(3)).any(part)
}

/// How often a phrase stands in a text, from where the new text begins, at the ends of the occurrences.
fn ends(text: &[char], from: usize, phrase: &str, options: WordOptions) -> Vec<usize> {
    let phrase: Vec<char> = phrase.chars().collect();
    let at = |begin: usize| {
        let end = begin + phrase.len();
        let same = text
            .get(begin..end)?
            .iter()
            .zip(&phrase)
            .all(|(a, b)| folded(*a, options) == folded(*b, options));
        let open = |inner: char, outer: Option<&char>| !is_word(inner) || outer.is_none_or(|c| !is_word(*c));
        let before = begin.checked_sub(1).and_then(|i| text.get(i));
        let whole = open(phrase[0], before) && open(*phrase.last().unwrap(), text.get(end));
        (same && (whole || !options.whole)).then_some(end)
    };
    (from..text.len()).filter_map(at).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Any tokens of any prompt and text say the words that the text says.
    #[test]
    fn every_tokenisation_counts(
        prompt in prop::collection::vec(0..PIECES.len() as i64, 0..4),
        tokens in prop::collection::vec(0..PIECES.len() as i64, 0..10),
        whole: bool,
        case_sensitive: bool,
    ) {
        const WORDS: [&str; 7] = ["a", "ab", "ba b", "\u{e9}", "ab.", "b a", "-"];
        let options = WordOptions { whole, case_sensitive };
        let trie = TokenTrie::from_bytes(PIECES).unwrap();
        let words = Words::new(&trie, WORDS.map(|word| [word]), options).unwrap();
        let bytes = |ids: &[i64]| ids.iter().flat_map(|&id| PIECES[id as usize]).copied().collect::<Vec<u8>>();
        let begin = bytes(&prompt);
        // A prompt that ends within a character would share it with the text.
        prop_assume!(!is_open(&begin));

        let mut place = words.start(&prompt);
        let mut counts = [0usize; WORDS.len()];
        for said in 0..=tokens.len() {
            let text = [begin.clone(), bytes(&tokens[..said])].concat();
            let mut now = counts;
            words.ended(place).iter().for_each(|&word| now[word as usize] += 1);
            let from = read(&begin).len();
            for (word, phrase) in WORDS.iter().enumerate() {
                let expected = ends(&read(&text), from, phrase, options).len();
                prop_assert_eq!(now[word], expected, "{:?} in {:?}", phrase, String::from_utf8_lossy(&text));
            }
            // What the moves say of every token, against the tokens themselves.
            let moves = words.moves(place);
            for token in 0..PIECES.len() as i64 {
                let (end, occurred) = words.read(place, &[token]);
                let mut told: Vec<u32> = Vec::new();
                let between = !is_open(&text);
                if between && trie.begins_outside(token) {
                    told.extend(words.ended(place));
                }
                match moves.get(token) {
                    Some(step) => {
                        told.extend(&step.words);
                        prop_assert_eq!(step.end, end);
                    }
                    None => prop_assert!(words.progress(end).is_empty() && words.ended(end).is_empty()),
                }
                prop_assert_eq!(told, occurred, "token {} after {:?}", token, String::from_utf8_lossy(&text));
            }
            let listed: Vec<i64> = moves.iter().map(|step| step.token).collect();
            prop_assert!(listed.windows(2).all(|pair| pair[0] < pair[1]));
            if let Some(&token) = tokens.get(said) {
                place = words.next(place, token, |word| counts[word as usize] += 1);
            }
        }
        let text = [begin.clone(), bytes(&tokens)].concat();
        let new = String::from_utf8_lossy(&text[begin.len()..]).into_owned();
        if std::str::from_utf8(&begin).is_ok() {
            let begin = String::from_utf8(begin).unwrap();
            let mut of_text = [0usize; WORDS.len()];
            words.occurring(words.after(&begin), &new).iter().for_each(|&word| of_text[word as usize] += 1);
            words.ended(place).iter().for_each(|&word| counts[word as usize] += 1);
            prop_assert_eq!(of_text, counts);
        }
    }
}

/// A real vocabulary: all ways to cut a sentence up say the same words.
#[test]
fn a_byte_level_tokenizer_however_it_is_cut() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/byte_level");
    let tokenizer = Tokenizer::open(folder).unwrap();
    let trie = TokenTrie::new(&tokenizer).unwrap();
    assert_eq!(trie.vocab_size(), tokenizer.vocab_size());
    let words =
        Words::new(&trie, [["dog", "dogs"], ["the sea", "caf\u{e9}"]], WordOptions::default()).unwrap();
    let text = "A dog, DOGS and hotdogs by the sea; a Caf\u{c9} dog";
    let own = tokenizer.encode(text, Special::Keep).unwrap();
    let single: Vec<i64> = text
        .bytes()
        .map(|byte| (0..tokenizer.vocab_size()).find(|&id| trie.bytes(id) == [byte]).unwrap())
        .collect();
    assert_ne!(own, single);
    for ids in [own, single] {
        let (place, mut occurred) = words.read(words.start(&[]), &ids);
        occurred.extend(words.ended(place));
        assert_eq!(occurred, [0, 0, 1, 1, 0]);
    }
}

#[test]
fn special_tokens_say_nothing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/byte_level");
    let tokenizer = Tokenizer::open(folder).unwrap();
    let trie = TokenTrie::new(&tokenizer).unwrap();
    let special: Vec<i64> = (0..tokenizer.vocab_size()).filter(|&id| tokenizer.is_special(id)).collect();
    assert!(!special.is_empty());
    assert!(special.iter().all(|&id| trie.bytes(id).is_empty() && !trie.begins_outside(id)));
    assert!(trie.bytes(tokenizer.vocab_size() + 7).is_empty() && trie.bytes(-1).is_empty());
}

#[test]
fn vocabularies_and_words_that_are_none() {
    assert!(TokenTrie::from_bytes([] as [&str; 0]).is_err());
    let trie = TokenTrie::from_bytes(["a"]).unwrap();
    let none: [[&str; 1]; 0] = [];
    assert!(Words::new(&trie, none, WordOptions::default()).is_err());
    for bad in [" ", "", "\n\t"] {
        let error = Words::new(&trie, [["a", bad]], WordOptions::default()).unwrap_err().to_string();
        assert!(error.contains("at least one character that is no space"), "{error}");
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/wordpiece");
    let error = TokenTrie::new(&Tokenizer::open(folder).unwrap()).unwrap_err();
    assert!(matches!(error, controlgen_core::Error::Unsupported { .. }), "{error}");
}
