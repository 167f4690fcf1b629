//! The table.

use std::fmt::Write;

use controlgen_core::Result;
use controlgen_text::evaluation::{
    Concept, Coverage, Likelihood, coverage, distinct_n, mean_words, perplexity, self_bleu,
};

use super::Method;
use super::methods::REFERENCE;
use super::record::{Record, Settings, key};
use super::sets::ConceptSets;
use crate::table::Records;

/// What a method's texts come to.
pub struct Row {
    pub method: &'static str,
    /// How many texts.
    pub sets: usize,
    pub coverage: Coverage,
    pub perplexity: f64,
    pub distinct_2: f64,
    pub self_bleu: f64,
    pub words: f64,
    pub seconds: f64,
    /// The reference's perplexity and distinct-2, of its texts for the same sets: distinct-2 falls as there are more.
    pub reference: Option<(f64, f64)>,
}

/// A row for each method that has texts.
pub fn rows(methods: &[&'static Method], sets: &ConceptSets, records: &Records<Record>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for method in methods {
        let made: Vec<usize> =
            (0..sets.len()).filter(|&i| records.find(&key(method.name, &sets[i])).is_some()).collect();
        let of = |name: &str| -> Vec<&Record> {
            made.iter().filter_map(|&i| records.find(&key(name, &sets[i]))).collect()
        };
        let found = of(method.name);
        if found.is_empty() {
            continue;
        }
        let texts: Vec<&str> = found.iter().map(|record| record.text.as_str()).collect();
        let concepts = made
            .iter()
            .map(|&i| sets[i].iter().map(Concept::new).collect())
            .collect::<Result<Vec<Vec<Concept>>>>()?;
        let (perplexity, distinct_2) = fluency(&found)?;
        let reference = of(REFERENCE);
        rows.push(Row {
            method: method.name,
            sets: found.len(),
            coverage: coverage(&texts, &concepts)?,
            perplexity,
            distinct_2,
            self_bleu: if texts.len() < 2 { f64::NAN } else { self_bleu(&texts, 4)? },
            words: mean_words(&texts)?,
            seconds: found.iter().map(|record| record.seconds).sum::<f64>() / found.len() as f64,
            reference: if reference.len() == found.len() { Some(fluency(&reference)?) } else { None },
        });
    }
    Ok(rows)
}

/// Perplexity and distinct-2.
fn fluency(records: &[&Record]) -> Result<(f64, f64)> {
    let texts: Vec<&str> = records.iter().map(|record| record.text.as_str()).collect();
    let judged: Vec<Likelihood> =
        records.iter().map(|r| Likelihood { log_prob: r.log_prob, tokens: r.tokens }).collect();
    Ok((perplexity(&judged)?, distinct_n(&texts, 2)?))
}

/// As Markdown, with what it was made under.
pub fn markdown(rows: &[Row], settings: &Settings) -> String {
    let mut out = String::from(
        "| method | sets | count | percent | share % | perplexity | × reference | distinct-2 | × reference | \
         self-BLEU | words | s a set |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in rows {
        let times = |of: fn((f64, f64)) -> f64, value: f64| {
            row.reference.map_or("–".to_owned(), |reference| format!("{:.2}", value / of(reference)))
        };
        let Coverage { count, percent, share } = row.coverage;
        let _ = writeln!(
            out,
            "| {} | {} | {count:.2} | {percent:.1} | {share:.1} | {:.1} | {} | {:.3} | {} | {:.3} | {:.1} | {:.2} |",
            row.method,
            row.sets,
            row.perplexity,
            times(|reference| reference.0, row.perplexity),
            row.distinct_2,
            times(|reference| reference.1, row.distinct_2),
            row.self_bleu,
            row.words,
            row.seconds,
        );
    }
    let _ = write!(
        out,
        "\n`count`: mean number of a set's words that its text says; `percent`: texts that say all of them; `share`: mean \
         share of them. Whole words, inflections included. Perplexity: exp of the mean negative log-probability of a \
         token, over all texts, after the prompt, by {} in f32. All after the prompt {:?}, at most {} new tokens, {} beams \
         or particles, seed {}, made in {}.",
        settings.model,
        settings.prompt,
        settings.max_new_tokens,
        settings.beams,
        settings.seed,
        settings.dtype
    );
    out
}
