//! Splits of labelled texts that depend on each text alone.

use std::collections::HashMap;

use controlgen_core::{Error, Result};

use super::{Example, Labelled};
use crate::evaluation::words;

/// Splits texts into parts by a hash of their words.
///
/// Which part a text belongs to depends on the text alone, and not on the file, its order, or what else is in it. Texts of
/// the same words (case, punctuation and spaces aside) are in the same part, so that no part knows a duplicate of another's
/// text. The hash is 64-bit FNV-1a (Fowler, Noll and Vo 1991) with the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
///
/// ```
/// use controlgen_text::classifiers::Split;
///
/// let split = Split::new(&[45, 45, 10])?;
/// assert_eq!(split.part("A fine film."), split.part("a fine  film"));
/// # Ok::<(), controlgen_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    weights: Vec<u64>,
}

impl Split {
    /// Parts of these relative sizes.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer than two parts, and for one of size 0 or above 2³².
    pub fn new(weights: &[u64]) -> Result<Self> {
        if weights.len() < 2 {
            return Err(Error::value("parts of a split", "two or more", weights.len()));
        }
        if let Some(bad) = weights.iter().find(|&&weight| weight == 0 || weight > 1 << 32) {
            return Err(Error::value("size of a part", "1 ..= 2^32", bad));
        }
        Ok(Self { weights: weights.to_vec() })
    }

    /// The index of the part that a text belongs to.
    pub fn part(&self, text: &str) -> usize {
        let total: u64 = self.weights.iter().sum();
        let mut place = mixed(&words(text)) % total;
        for (part, &weight) in self.weights.iter().enumerate() {
            if place < weight {
                return part;
            }
            place -= weight;
        }
        0
    }

    /// The texts of each part, in their order; of texts with the same words the first alone, and none where their labels
    /// differ.
    ///
    /// # Errors
    /// [`Error::Value`] for a part without texts of two classes.
    pub fn parts(&self, texts: &Labelled) -> Result<Vec<Labelled>> {
        // Words to the label, `None` where it is not the same each time.
        let mut labels: HashMap<Vec<String>, Option<usize>> = HashMap::new();
        let mut first: Vec<(&Example, Vec<String>)> = Vec::new();
        for example in texts.examples() {
            let words = words(&example.text);
            match labels.get_mut(&words) {
                None => {
                    labels.insert(words.clone(), Some(example.label));
                    first.push((example, words));
                }
                Some(label) => *label = label.filter(|&label| label == example.label),
            }
        }
        let mut parts: Vec<Vec<Example>> = vec![Vec::new(); self.weights.len()];
        for (example, words) in first {
            if labels.get(&words).copied().flatten().is_some() {
                parts[self.part(&example.text)].push(example.clone());
            }
        }
        parts.into_iter().map(|part| texts.with(part)).collect()
    }
}

fn mixed(words: &[String]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in words.iter().flat_map(|word| word.bytes().chain([b' '])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
