//! The table.

use std::fmt::Write;

use controlgen_core::Result;
use controlgen_text::evaluation::{Likelihood, distinct_n, perplexity};

use super::methods::{Method, REFERENCE};
use super::record::{Record, Settings};
use crate::sentiment::texts::CLASSES;
use crate::table::Records;

/// What a method's texts come to.
pub struct Row {
    pub method: &'static str,
    pub texts: usize,
    /// Percent of the texts that are as wanted: of each class, of all.
    pub of_class: [f64; 2],
    pub satisfied: f64,
    /// The same by each half of the judge.
    pub halves: [f64; 2],
    pub perplexity: f64,
    /// Of the reference's.
    pub times: Option<f64>,
    pub distinct: [f64; 2],
    pub seconds: f64,
}

/// A row for each method that has texts.
pub fn rows(methods: &[&'static Method], rounds: usize, records: &Records<Record>) -> Result<Vec<Row>> {
    let of = |method: &str| -> Vec<&Record> {
        let mut found: Vec<&Record> =
            records.iter().filter(|record| record.method == method && record.round < rounds).collect();
        found.sort_by(|a, b| (&a.target, a.round, &a.prompt).cmp(&(&b.target, b.round, &b.prompt)));
        found
    };
    let fluency = |records: &[&Record]| {
        let each: Vec<Likelihood> =
            records.iter().map(|r| Likelihood { log_prob: r.log_prob, tokens: r.tokens }).collect();
        perplexity(&each)
    };
    let reference = of(REFERENCE);
    let reference = if reference.is_empty() { None } else { Some(fluency(&reference)?) };
    let mut rows = Vec::new();
    for method in methods {
        let found = of(method.name);
        if found.is_empty() {
            continue;
        }
        let percent = |of: &dyn Fn(&Record) -> Option<f64>| {
            let each: Vec<f64> = found.iter().filter_map(|record| of(record)).collect();
            100.0 * each.iter().filter(|&&p| p > 0.5).count() as f64 / each.len() as f64
        };
        let class = |i: usize| percent(&|r: &Record| (r.target == CLASSES[i]).then_some(r.satisfied));
        let texts: Vec<&str> = found.iter().map(|record| record.text.as_str()).collect();
        let perplexity = fluency(&found)?;
        rows.push(Row {
            method: method.name,
            texts: found.len(),
            of_class: [class(1), class(0)],
            satisfied: percent(&|r| Some(r.satisfied)),
            halves: [percent(&|r| Some(r.halves[0])), percent(&|r| Some(r.halves[1]))],
            perplexity,
            times: reference.map(|reference| perplexity / reference),
            distinct: [distinct_n(&texts, 1)?, distinct_n(&texts, 2)?],
            seconds: found.iter().map(|record| record.seconds).sum::<f64>() / found.len() as f64,
        });
    }
    Ok(rows)
}

/// As Markdown, with what it was made under.
pub fn markdown(rows: &[Row], settings: &Settings) -> String {
    let mut out = String::from(
        "| method | texts | satisfied % | positive % | negative % | by states % | by n-grams % | perplexity | × reference | \
         distinct-1 | distinct-2 | s a text |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in rows {
        let times = row.times.map_or("–".to_owned(), |times| format!("{times:.2}"));
        let ([positive, negative], [states, ngrams], [one, two]) = (row.of_class, row.halves, row.distinct);
        let _ = writeln!(
            out,
            "| {} | {} | {:.1} | {positive:.1} | {negative:.1} | {states:.1} | {ngrams:.1} | {:.1} | {times} | {one:.3} | \
             {two:.3} | {:.2} |",
            row.method, row.texts, row.satisfied, row.perplexity, row.seconds,
        );
    }
    let _ = write!(
        out,
        "\n`satisfied`: texts, prompt included, whose wanted class the judge finds more probable than the other; `positive`, \
         `negative`: of those that were to be so; `by states`, `by n-grams`: by either half of the judge. The judge was \
         trained on other texts than what guides FUDGE, and reads another layer and words. Perplexity: exp of the mean \
         negative log-probability of a token, over all texts, after the prompt, by {} in f32. {} prompts, {} new tokens each, \
         seed {}; time is of a batch of all prompts, divided by their number.",
        settings.model,
        settings.prompts.len(),
        settings.max_new_tokens,
        settings.seed
    );
    out
}
