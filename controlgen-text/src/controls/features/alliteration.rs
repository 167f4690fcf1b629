//! Alliteration.

use std::sync::Arc;

use super::Feature;

/// 1 for a word that begins with the same consonant as the word before it, else 0. Letters stand for sounds: "c" and "k"
/// differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alliteration;

/// A word's first letter, if it is no vowel.
fn consonant(word: &str) -> Option<char> {
    word.chars().next().filter(|c| c.is_alphabetic() && !"aeiou".contains(*c))
}

impl Feature for Alliteration {
    fn value(&self, word: &str, before: &[Arc<str>]) -> f64 {
        let last = before.last().and_then(|last| consonant(last));
        f64::from(u8::from(last.is_some() && last == consonant(word)))
    }

    fn key(&self, before: &[Arc<str>]) -> Option<u64> {
        Some(before.last().and_then(|last| consonant(last)).map_or(0, |c| u64::from(u32::from(c))))
    }
}
