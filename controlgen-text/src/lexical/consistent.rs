//! Whether clauses can hold together.

use std::collections::HashSet;

use controlgen_core::{Error, Result};

use super::literal::{Clause, Says};
use super::progress::Formula;
use crate::words::{Place, Words};

/// As many combinations of literals are looked at.
const COMBINATIONS: usize = 10_000;

/// The words that occur wherever each word does, itself among them: those that all of its phrases hold.
pub(super) fn implied(words: &Words, spelled: &[Vec<String>]) -> Vec<Vec<u32>> {
    let held =
        |phrase: &String| words.occurring(Place::default(), phrase).into_iter().collect::<HashSet<u32>>();
    let of_word = |word: &Vec<String>| {
        let sets = word.iter().map(held);
        sets.reduce(|all, one| all.intersection(&one).copied().collect())
            .unwrap_or_default()
            .into_iter()
            .collect()
    };
    spelled.iter().map(of_word).collect()
}

/// Refuses clauses of which no choice of literals can be true of a text.
pub(super) fn check(clauses: &[Clause], formula: &Formula, implied: &[Vec<u32>]) -> Result<()> {
    for count in 1..=clauses.len() {
        let choice = Choice { bounds: vec![(0, u16::MAX); implied.len()], orders: Vec::new() };
        let mut left = COMBINATIONS;
        if !choice.satisfiable(&formula.clauses[..count], implied, &mut left) {
            let found =
                format!("clause {}, `{}`, which contradicts those before it", count - 1, clauses[count - 1]);
            return Err(Error::value("clauses", "clauses that can hold together", found));
        }
    }
    Ok(())
}

/// What the literals chosen so far ask for.
#[derive(Clone)]
struct Choice {
    /// How often each word is said, at least and at most.
    bounds: Vec<(u16, u16)>,
    orders: Vec<(u32, u32)>,
}

impl Choice {
    /// Whether literals of these clauses can be added; true too once `left` is used up.
    fn satisfiable(&self, clauses: &[Vec<Says<u32>>], implied: &[Vec<u32>], left: &mut usize) -> bool {
        let Some((clause, rest)) = clauses.split_first() else { return true };
        clause.iter().any(|literal| {
            if *left == 0 {
                return true;
            }
            *left -= 1;
            let with = self.with(literal, implied);
            with.is_some_and(|with| with.satisfiable(rest, implied, left))
        })
    }

    /// With one literal more; `None` if that is a contradiction.
    fn with(&self, literal: &Says<u32>, implied: &[Vec<u32>]) -> Option<Self> {
        let mut with = self.clone();
        match *literal {
            Says::AtLeast(count, word) => with.least(word, count, implied),
            Says::AtMost(count, word) => {
                let most = &mut with.bounds[word as usize].1;
                *most = count.min(*most);
            }
            Says::Before(first, second) => with.orders.push((first, second)),
        }
        with.settle(implied).then_some(with)
    }

    fn least(&mut self, word: u32, count: u16, implied: &[Vec<u32>]) {
        let least = &mut self.bounds[word as usize].0;
        *least = count.max(*least);
        for &other in &implied[word as usize] {
            let least = &mut self.bounds[other as usize].0;
            *least = (*least).max(1);
        }
    }

    /// Draws the conclusions; whether there is no contradiction.
    fn settle(&mut self, implied: &[Vec<u32>]) -> bool {
        // What is said after another word needs the other.
        for _ in 0..=self.orders.len() {
            for (first, second) in self.orders.clone() {
                if self.bounds[second as usize].0 > 0 {
                    self.least(first, 1, implied);
                }
            }
        }
        let said = |word: u32| self.bounds[word as usize].0 > 0;
        // Words that are said are taken away as long as some have nothing before them: a circle is left.
        let mut orders: Vec<(u32, u32)> =
            self.orders.iter().copied().filter(|&(_, second)| said(second)).collect();
        loop {
            let before = orders.len();
            let seconds: HashSet<u32> = orders.iter().map(|&(_, second)| second).collect();
            orders.retain(|(first, _)| seconds.contains(first));
            if orders.len() == before {
                break;
            }
        }
        orders.is_empty() && self.bounds.iter().all(|(least, most)| least <= most)
    }
}
