//! Strings that end a text.

use std::sync::Arc;

use controlgen_core::{Error, Result};

/// Looks for several stop strings in a text that comes in parts.
///
/// Text is given out as soon as it cannot belong to a stop string: what is held back is never longer than the
/// longest of them. Each byte costs one step of the Knuth–Morris–Pratt automaton per stop string, however the text
/// is cut. The stop string that is *complete first* wins; of those complete at the same byte, the longest.
///
/// A clone continues on its own, as the rows of a batch do when they fork.
///
/// ```
/// use controlgen_text::tokenizer::StopStrings;
/// let mut stop = StopStrings::new(["\nUser:", "###"])?;
/// assert_eq!(stop.push("Hello\nUs"), "Hello");
/// assert_eq!(stop.push("ually\nUser"), "\nUsually");
/// assert_eq!(stop.push(": x"), "");
/// assert_eq!((stop.hit().unwrap().index, stop.hit().unwrap().start), (0, 13));
/// # Ok::<(), controlgen_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    patterns: Arc<[Pattern]>,
    /// For each stop string, how many of its bytes the text ends with.
    matched: Vec<usize>,
    held: String,
    /// Bytes of text seen.
    seen: usize,
    hit: Option<StopHit>,
}

/// Where a stop string was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopHit {
    /// Which one, in the order given to [`StopStrings::new`].
    pub index: usize,
    /// Its first byte, counted from the beginning of the text.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
}

#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each length, the longest proper prefix which is also a suffix of that many bytes.
    border: Vec<usize>,
}

impl StopStrings {
    /// A matcher at the beginning of a text. Without stop strings it lets everything pass.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty stop string.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Result<Self> {
        let patterns = stops
            .into_iter()
            .enumerate()
            .map(|(index, stop)| match stop.as_ref() {
                "" => Err(Error::value(format!("stop string {index}"), "at least one character", "none")),
                text => Ok(Pattern::new(text)),
            })
            .collect::<Result<Arc<[Pattern]>>>()?;
        let matched = vec![0; patterns.len()];
        Ok(Self { patterns, matched, held: String::new(), seen: 0, hit: None })
    }

    /// Takes the next part of the text; returns what may be given out. After a hit, nothing more is.
    pub fn push(&mut self, text: &str) -> String {
        if self.hit.is_some() {
            return String::new();
        }
        let begin = self.seen - self.held.len(); // where `held` starts in the text
        self.held.push_str(text);
        for &byte in text.as_bytes() {
            self.seen += 1;
            let found = self.step(byte);
            if let Some((index, length)) = found {
                let start = self.seen - length;
                self.hit = Some(StopHit { index, start, end: self.seen });
                self.held.truncate(start.saturating_sub(begin));
                return std::mem::take(&mut self.held);
            }
        }
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep.min(self.held.len()));
        std::mem::replace(&mut self.held, rest)
    }

    /// The text that was held back; to be called at the end of the text. The matcher then starts anew.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        self.matched.fill(0);
        (self.seen, self.hit) = (0, None);
        held
    }

    /// The stop string that was found, if one was.
    pub fn hit(&self) -> Option<StopHit> {
        self.hit
    }

    /// Moves every automaton by one byte; the longest stop string that is now complete.
    fn step(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut found: Option<(usize, usize)> = None;
        for (index, (pattern, matched)) in self.patterns.iter().zip(&mut self.matched).enumerate() {
            *matched = pattern.next(*matched, byte);
            let length = pattern.bytes.len();
            if *matched == length && found.is_none_or(|(_, longest)| length > longest) {
                found = Some((index, length));
            }
        }
        found
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let mut pattern = Self { bytes: text.as_bytes().to_vec(), border: vec![0] };
        for at in 1..pattern.bytes.len() {
            let next = pattern.next(pattern.border[at - 1], pattern.bytes[at]);
            pattern.border.push(next);
        }
        pattern
    }

    fn next(&self, mut matched: usize, byte: u8) -> usize {
        loop {
            if self.bytes.get(matched) == Some(&byte) {
                return matched + 1;
            }
            match matched {
                0 => return 0,
                _ => matched = self.border[matched - 1],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the end of each occurrence of each stop string; the first end wins, then the longest.
    fn search(text: &str, stops: &[String]) -> Option<StopHit> {
        let found = stops.iter().enumerate().filter_map(|(index, stop)| {
            text.find(stop.as_str()).map(|start| StopHit { index, start, end: start + stop.len() })
        });
        found.min_by_key(|hit| (hit.end, hit.start, hit.index))
    }

    proptest! {
        #[test]
        fn any_cut_of_the_text_finds_the_same(
            stops in proptest::collection::vec("[aé😀]{1,5}", 0..4),
            parts in proptest::collection::vec("[aébc😀]{0,6}", 0..12),
        ) {
            let text = parts.concat();
            let mut stop = StopStrings::new(&stops).unwrap();
            let mut given = String::new();
            for part in &parts {
                given += &stop.push(part);
                prop_assert!(text.starts_with(&given));
                if stop.hit().is_none() {
                    let held = stop.seen - given.len();
                    prop_assert!(held == 0 || stops.iter().any(|s| held < s.len()));
                }
            }
            let expected = search(&text, &stops);
            prop_assert_eq!(stop.hit(), expected);
            match expected {
                Some(hit) => prop_assert_eq!(&given, &text[..hit.start]),
                None => prop_assert_eq!(given + &stop.finish(), text),
            }
        }
    }

    #[test]
    fn the_empty_string_is_refused() {
        let error = StopStrings::new(["a", ""]).unwrap_err().to_string();
        assert_eq!(error, "stop string 1: expected at least one character, found none");
    }

    #[test]
    fn long_repetitive_texts_stay_linear() {
        // Quadratic matching would take 10¹¹ steps here.
        let mut stop = StopStrings::new([format!("{}b", "a".repeat(100_000))]).unwrap();
        let text = "a".repeat(1_000);
        let given: usize = (0..1_000).map(|_| stop.push(&text).len()).sum();
        assert_eq!(given, 900_000);
        assert_eq!(stop.finish().len(), 100_000);
    }
}
