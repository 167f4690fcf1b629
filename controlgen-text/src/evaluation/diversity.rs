//! Diversity: whether texts repeat themselves and each other.

use std::collections::HashMap;

use controlgen_core::{Error, Result};

use super::{some, words};

fn order(n: usize) -> Result<()> {
    if n > 0 { Ok(()) } else { Err(Error::value("n of n-grams", "at least 1", 0)) }
}

/// Different n-grams of words over all of them, those of all texts together; 0 where there are none. Li et al., "A
/// diversity-promoting objective function for neural conversation models" (NAACL 2016), section 5.2.
///
/// It falls as there is more text: compare as many texts of like length.
///
/// # Errors
/// [`Error::Value`] for no texts and for n = 0.
pub fn distinct_n(texts: &[impl AsRef<str>], n: usize) -> Result<f64> {
    some(texts)?;
    order(n)?;
    let texts: Vec<Vec<String>> = texts.iter().map(|text| words(text.as_ref())).collect();
    let mut different: Vec<&[String]> = texts.iter().flat_map(|words| words.windows(n)).collect();
    let all = different.len();
    different.sort_unstable();
    different.dedup();
    Ok(if all == 0 { 0.0 } else { different.len() as f64 / all as f64 })
}

/// The mean BLEU of each text with all others as its references, in 0 ..= 1: lower is more varied. Zhu et al.,
/// "Texygen" (SIGIR 2018).
///
/// BLEU (Papineni et al., ACL 2002) with n-grams of 1 to `most` words in equal parts, and the brevity penalty of the
/// reference whose length is nearest, of two the shorter. Where no n-gram of an order matches, its count is 0.1 (Chen and
/// Cherry, "A systematic comparison of smoothing techniques for sentence-level BLEU" (WMT 2014), method 1); where
/// no word does, BLEU is 0. These are nltk's `sentence_bleu` and `SmoothingFunction.method1`.
///
/// *Cost*: linear in the text, not in pairs of texts.
///
/// # Errors
/// [`Error::Value`] for fewer than two texts, and for 0 words.
pub fn self_bleu(texts: &[impl AsRef<str>], most: usize) -> Result<f64> {
    if texts.len() < 2 {
        return Err(Error::value("texts", "at least two", texts.len()));
    }
    order(most)?;
    let texts: Vec<Vec<String>> = texts.iter().map(|text| words(text.as_ref())).collect();
    let counts: Vec<Vec<HashMap<&[String], usize>>> =
        (1..=most).map(|n| texts.iter().map(|words| count(words, n)).collect()).collect();
    let best: Vec<HashMap<&[String], Best>> = counts.iter().map(|of_order| greatest(of_order)).collect();
    let bleu = |i: usize| -> f64 {
        let mut log_precision = 0.0;
        for (n, (counts, best)) in counts.iter().zip(&best).enumerate() {
            let matched: usize =
                counts[i].iter().map(|(gram, &count)| count.min(elsewhere(best, gram, i))).sum();
            if n == 0 && matched == 0 {
                return 0.0;
            }
            let all = texts[i].len().saturating_sub(n).max(1) as f64;
            let matched = if matched == 0 { 0.1 } else { matched as f64 };
            log_precision += (matched / all).ln() / most as f64;
        }
        let length = texts[i].len();
        let others = texts.iter().enumerate().filter(|&(j, _)| j != i).map(|(_, other)| other.len());
        let nearest = others.min_by_key(|&other| (other.abs_diff(length), other)).unwrap_or(0);
        let brevity = if length > nearest { 0.0 } else { 1.0 - nearest as f64 / length as f64 };
        (brevity + log_precision).exp()
    };
    Ok((0..texts.len()).map(bleu).sum::<f64>() / texts.len() as f64)
}

fn count(words: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    words.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// The text that says an n-gram most often, how often, and how often the next one does.
#[derive(Clone, Copy, Default)]
struct Best {
    text: usize,
    most: usize,
    next: usize,
}

fn greatest<'a>(texts: &[HashMap<&'a [String], usize>]) -> HashMap<&'a [String], Best> {
    let mut best: HashMap<&[String], Best> = HashMap::new();
    for (text, counts) in texts.iter().enumerate() {
        for (gram, &count) in counts {
            let held = best.entry(gram).or_default();
            if count > held.most {
                *held = Best { text, most: count, next: held.most };
            } else {
                held.next = held.next.max(count);
            }
        }
    }
    best
}

/// How often the n-gram occurs in the one of the other texts that says it most.
fn elsewhere(best: &HashMap<&[String], Best>, gram: &[String], text: usize) -> usize {
    best.get(gram).map_or(0, |best| if best.text == text { best.next } else { best.most })
}
