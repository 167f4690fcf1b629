//! The movie reviews: read, made alike, split.

use std::path::Path;

use controlgen_core::Result;
use controlgen_core::noise::Noise;
use controlgen_text::classifiers::{Columns, Example, Labelled, Split};
use controlgen_text::tokenizer::{Special, Tokenizer};

/// The parts of the split: what guides, what judges, and what both are measured on.
pub const PARTS: [&str; 3] = ["guide", "judge", "held_out"];
/// Their sizes, in hundredths.
const SIZES: [u64; 3] = [45, 45, 10];
/// The labels of the file, negative and positive.
const LABELS: [&str; 2] = ["0", "1"];
/// The classes as they are called from here on.
pub const CLASSES: [&str; 2] = ["negative", "positive"];

/// The parts of the reviews in a file with the columns text, label and source, each in an order that is fixed and mixes
/// labels and sources.
pub fn parts(path: &Path) -> Result<Vec<Labelled>> {
    let classes = Some(LABELS.map(str::to_owned).to_vec());
    let columns = Columns { group: Some("source".into()), classes, ..Columns::default() };
    let read = Labelled::open(path, &columns)?;
    let examples = read.examples().iter().map(|e| Example { text: plain(&e.text), ..e.clone() }).collect();
    let named = Labelled::new(CLASSES.map(str::to_owned).to_vec(), examples)?;
    let parts = Split::new(&SIZES)?.parts(&named)?;
    parts.iter().enumerate().map(|(i, part)| part.with(shuffled(part.examples(), i as u64))).collect()
}

fn shuffled(examples: &[Example], stream: u64) -> Vec<Example> {
    let mut examples = examples.to_vec();
    Noise::seeded(0).stream(stream).shuffle(&mut examples);
    examples
}

/// A review as a model would write it: without markup, and without the spaces that Rotten Tomatoes' have before
/// punctuation.
pub fn plain(text: &str) -> String {
    let text = text.replace("<br />", " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut out = words.join(" ");
    for mark in [".", ",", ";", ":", "!", "?", ")", "'s", "'t", "'re", "'ve", "'ll", "'d", "'m", "n't"] {
        out = out.replace(&format!(" {mark}"), mark);
    }
    let mut chars = out.replace("( ", "(").replace(" i ", " I ").chars().collect::<Vec<char>>();
    if let Some(first) = chars.first_mut() {
        *first = first.to_uppercase().next().unwrap_or(*first);
    }
    chars.into_iter().collect()
}

/// The last whole sentences of a text that are together at most `most` tokens; of a longer last sentence the first `most`
/// tokens.
pub fn ending(tokenizer: &Tokenizer, text: &str, most: usize) -> Result<Vec<i64>> {
    let starts = sentences(text);
    let mut found: Option<Vec<i64>> = None;
    for &start in starts.iter().rev() {
        let ids = tokenizer.encode(&text[start..], Special::Add)?;
        if ids.len() > most {
            break;
        }
        found = Some(ids);
    }
    if let Some(found) = found {
        return Ok(found);
    }
    let last = starts.last().copied().unwrap_or(0);
    let mut ids = tokenizer.encode(&text[last..], Special::Add)?;
    ids.truncate(most);
    Ok(ids)
}

/// Where sentences begin.
fn sentences(text: &str) -> Vec<usize> {
    let bytes = text.as_bytes();
    let mut starts = vec![0];
    for i in 2..bytes.len() {
        if bytes[i - 1] == b' ' && matches!(bytes[i - 2], b'.' | b'!' | b'?') && text.is_char_boundary(i) {
            starts.push(i);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reviews_are_made_plain() {
        let made = plain("hardly a nuanced portrait , the film 's <br /><br />scares do n't work .");
        assert_eq!(made, "Hardly a nuanced portrait, the film's scares don't work.");
    }

    #[test]
    fn sentences_begin_after_an_end_and_a_space() {
        assert_eq!(sentences("One. Two? 3.5 é! é"), [0, 5, 10, 18]);
    }
}
