//! Lexical constraints against a plain reading of texts, and against all texts that there are.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod formula;
mod mask;
mod noise;
mod searches;

use std::collections::HashMap;

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_text::lexical::{Clause, Clauses, Literal};
use controlgen_text::words::TokenTrie;

/// The tokens of the toy: one without text, the end, and pieces that spell words in several ways.
const TOKENS: [&str; 7] = ["", "", "a", "b", " ", "ab", " a"];
const EOS: i64 = 1;
/// It ends within a word, "ab".
const PROMPT: [i64; 3] = [0, 2, 3];

fn table(seed: u64) -> TableLm {
    let vocab = TOKENS.len() as i64;
    TableLm::new(&TableLmConfig { vocab, seed, scale: 1.3, ..TableLmConfig::default() }).unwrap()
}

fn trie() -> TokenTrie {
    TokenTrie::from_bytes(TOKENS).unwrap()
}

/// A literal as it is written down here.
#[derive(Clone, Debug)]
enum Lit {
    Least(u16, &'static str),
    Most(u16, &'static str),
    Before(&'static str, &'static str),
}
use Lit::{Before, Least, Most};

fn clauses(formula: &[Vec<Lit>]) -> Clauses {
    Clauses::new(&trie(), formula.iter().map(|clause| made(clause))).unwrap()
}

fn made(clause: &[Lit]) -> Clause {
    clause.iter().fold(Clause::default(), |clause, literal| {
        clause.or(match *literal {
            Least(count, word) => Literal::at_least(count, [word]),
            Most(count, word) => Literal::at_most(count, [word]),
            Before(first, second) => Literal::before([first], [second]),
        }
        .unwrap())
    })
}

/// How often each text came that is expected five times or more among `n`, and its probability; what is rarer is together
/// the first. What was counted is taken out of `counts`.
fn binned(counts: &mut HashMap<Vec<i64>, u64>, expected: &[(Vec<i64>, f64)], n: u64) -> (Vec<u64>, Vec<f64>) {
    let (mut observed, mut probabilities) = (vec![0], vec![0.0]);
    for (ids, log_p) in expected {
        let (count, p) = (counts.remove(ids).unwrap_or(0), log_p.exp());
        if p * (n as f64) < 5.0 {
            observed[0] += count;
            probabilities[0] += p;
        } else {
            observed.push(count);
            probabilities.push(p);
        }
    }
    (observed, probabilities)
}

fn text(ids: &[i64]) -> String {
    ids.iter().map(|&id| TOKENS[id as usize]).collect()
}

/// Where a word stands whole in what follows `prompt`, by the ends.
fn ends(prompt: &str, new: &str, word: &str) -> Vec<usize> {
    let all: Vec<char> = (prompt.to_owned() + new).chars().collect();
    let word: Vec<char> = word.chars().collect();
    let apart = |i: Option<&char>| i.is_none_or(|c| !c.is_alphanumeric());
    let stands = |begin: usize| {
        let before = begin.checked_sub(1).and_then(|i| all.get(i));
        all.get(begin..begin + word.len()) == Some(&word)
            && apart(before)
            && apart(all.get(begin + word.len()))
    };
    (prompt.chars().count()..all.len())
        .filter(|&begin| stands(begin))
        .map(|begin| begin + word.len())
        .collect()
}

/// Whether a literal holds of a text that ends.
fn holds(literal: &Lit, prompt: &str, new: &str) -> bool {
    match *literal {
        Least(count, word) => ends(prompt, new, word).len() >= count.into(),
        Most(count, word) => ends(prompt, new, word).len() <= count.into(),
        Before(first, second) => {
            match (ends(prompt, new, first).first(), ends(prompt, new, second).first()) {
                (Some(first), Some(second)) => first < second,
                (None, Some(_)) => false,
                _ => true,
            }
        }
    }
}

/// The clauses that do not hold of a text that ends.
fn unmet(formula: &[Vec<Lit>], prompt: &str, new: &str) -> Vec<usize> {
    (0..formula.len()).filter(|&i| !formula[i].iter().any(|literal| holds(literal, prompt, new))).collect()
}

/// Formulas of every kind of literal, with mixed clauses.
fn formulas() -> Vec<Vec<Vec<Lit>>> {
    vec![
        vec![vec![Least(1, "a")]],
        vec![vec![Least(1, "a")], vec![Least(1, "b")]],
        vec![vec![Most(0, "a")]],
        vec![vec![Least(1, "ab"), Least(1, "b")], vec![Most(0, "a")]],
        vec![vec![Most(0, "a"), Least(1, "b")]],
        vec![vec![Least(2, "a")], vec![Most(2, "a")]],
        vec![vec![Least(1, "a b")]],
        vec![vec![Before("b", "a")], vec![Least(1, "a")]],
        vec![vec![Before("a", "b"), Least(1, "ab")], vec![Least(1, "b")], vec![Most(1, "a")]],
    ]
}
