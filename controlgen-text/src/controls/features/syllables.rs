//! Syllables of English words.

use std::sync::Arc;

use super::Feature;

/// How many syllables a word has, by its letters: groups of vowels, a final silent e left out ("stone" one, "table" two,
/// "created" three as spelled but said "cre-a-ted": the rule says two). A word without letters has none. Right for
/// about nine English words in ten; with a pronouncing dictionary, make a [`Lexicon`](super::Lexicon).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Syllables;

/// 1 for a word of one syllable, by the rule of [`Syllables`], else 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Monosyllabic;

fn syllables(word: &str) -> usize {
    let letters: Vec<char> = word.chars().filter(|c| c.is_alphabetic()).collect();
    let vowel = |c: char| "aeiouyàáâäæèéêëìíîïòóôöøùúûü".contains(c);
    let begins = |i: usize| vowel(letters[i]) && (i == 0 || !vowel(letters[i - 1]));
    let groups = (0..letters.len()).filter(|&i| begins(i)).count();
    let silent = match letters.as_slice() {
        // "table": the l is a syllable with the e.
        [.., before, 'l', 'e'] if !vowel(*before) => false,
        [.., before, 'e'] => !vowel(*before),
        // "walked", but "wanted" and "needed"; "likes", but "dishes" and "faces".
        [.., before, 'e', 'd'] => !vowel(*before) && !matches!(before, 't' | 'd'),
        [.., before, 'e', 's'] => !vowel(*before) && !matches!(before, 's' | 'x' | 'z' | 'h' | 'c' | 'g'),
        _ => false,
    };
    let count = groups - usize::from(silent && groups > 1);
    if letters.is_empty() { 0 } else { count.max(1) }
}

impl Feature for Syllables {
    fn value(&self, word: &str, _before: &[Arc<str>]) -> f64 {
        syllables(word) as f64
    }

    fn key(&self, _before: &[Arc<str>]) -> Option<u64> {
        Some(0)
    }
}

impl Feature for Monosyllabic {
    fn value(&self, word: &str, _before: &[Arc<str>]) -> f64 {
        f64::from(u8::from(syllables(word) == 1))
    }

    fn key(&self, _before: &[Arc<str>]) -> Option<u64> {
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::syllables;

    #[test]
    fn counts_as_spoken() {
        let one = "stone walked likes the sky through a rhythms I eyed".to_lowercase();
        assert!(one.split(' ').take(6).all(|word| syllables(word) == 1));
        for (word, count) in [
            ("table", 2),
            ("wanted", 2),
            ("dishes", 2),
            ("ocean", 2),
            ("beautiful", 3),
            ("nth", 1),
            ("12", 0),
            ("", 0),
        ] {
            assert_eq!(syllables(word), count, "{word}");
        }
    }
}
