//! How far a text has come with its clauses.

use super::literal::Says;
use crate::words::Place;

/// A set of clauses, by their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClauseSet(pub(super) u128);

impl ClauseSet {
    /// As many clauses there may be.
    pub const MOST: usize = 128;

    /// The first `count`.
    pub(super) fn first(count: usize) -> Self {
        Self(u128::MAX.checked_shr((Self::MOST - count) as u32).unwrap_or(0))
    }

    /// How many there are.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether a clause is among them.
    pub fn contains(self, clause: usize) -> bool {
        clause < Self::MOST && self.0 >> clause & 1 == 1
    }

    /// The clauses, in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::MOST).filter(move |&clause| self.contains(clause))
    }

    pub(super) fn put(&mut self, clause: usize, whether: bool) {
        self.0 = self.0 & !(1 << clause) | u128::from(whether) << clause;
    }

    /// Those that are not among these.
    #[must_use]
    pub(crate) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// How far a text has come: which clauses it has settled, and where it stands in words.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    pub(super) place: Place,
    pub(super) counts: Counts,
}

/// What has occurred, and what follows from it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Counts {
    /// How often each word has occurred.
    pub(super) words: Box<[u16]>,
    /// Of each literal of an order, once it is settled, whether it is true.
    pub(super) orders: Box<[Option<bool>]>,
    /// Clauses that hold as it is.
    pub(super) held: ClauseSet,
    /// Clauses that will hold whatever comes.
    pub(super) won: ClauseSet,
    /// Clauses that will not hold whatever comes.
    pub(super) lost: ClauseSet,
    /// The sum of the clauses' shares.
    pub(super) worth: f64,
}

impl Progress {
    /// Where the text stands in words.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The clauses that hold for good.
    pub fn won(&self) -> ClauseSet {
        self.counts.won
    }

    /// The clauses that are lost for good.
    pub fn lost(&self) -> ClauseSet {
        self.counts.lost
    }

    /// How often a word has occurred, the one at the end left out as long as it may go on.
    pub fn count(&self, word: usize) -> usize {
        self.counts.words.get(word).map_or(0, |&count| count.into())
    }
}

/// The literals of compiled clauses, by numbers of words and of orders.
#[derive(Debug)]
pub(super) struct Formula {
    pub(super) clauses: Vec<Vec<Says<u32>>>,
    /// The orders that there are, and those that a word has a part in.
    pub(super) orders: Vec<(u32, u32)>,
    /// The clauses that each word has a part in.
    pub(super) of_word: Vec<Vec<usize>>,
}

impl Formula {
    /// Nothing has been said.
    pub(super) fn start(&self) -> Counts {
        let mut counts = Counts {
            words: vec![0; self.of_word.len()].into(),
            orders: vec![None; self.orders.len()].into(),
            held: ClauseSet::default(),
            won: ClauseSet::default(),
            lost: ClauseSet::default(),
            worth: 0.0,
        };
        (0..self.clauses.len()).for_each(|clause| self.judge(&mut counts, clause));
        counts.worth = (0..self.clauses.len()).map(|clause| self.share(&counts, clause, None)).sum();
        counts
    }

    /// A word has occurred once more.
    pub(super) fn occurs(&self, counts: &mut Counts, word: u32) {
        let count = &mut counts.words[word as usize];
        *count = count.saturating_add(1);
        for (order, &(first, second)) in self.orders.iter().enumerate() {
            if counts.orders[order].is_none() && (first == word || second == word) {
                counts.orders[order] = Some(first == word);
            }
        }
        self.of_word[word as usize].iter().for_each(|&clause| self.judge(counts, clause));
        // Summed anew, so that the same counts have the same worth however they came about.
        counts.worth = (0..self.clauses.len()).map(|clause| self.share(counts, clause, None)).sum();
    }

    /// How far a clause has come, in 0 ..= 1, if part of a word more has been said.
    pub(super) fn share(&self, counts: &Counts, clause: usize, coming: Option<(u32, f32)>) -> f64 {
        if counts.held.contains(clause) {
            return 1.0;
        }
        self.clauses[clause].iter().fold(0.0, |most: f64, literal| match *literal {
            Says::AtLeast(count, word) => {
                let part = coming.map_or(0.0, |(other, part)| if other == word { part.into() } else { 0.0 });
                most.max((f64::from(counts.words[word as usize]) + part) / f64::from(count))
            }
            _ => most,
        })
    }

    fn judge(&self, counts: &mut Counts, clause: usize) {
        let (mut holds, mut won, mut lost) = (false, false, true);
        for literal in &self.clauses[clause] {
            let (now, settled) = self.truth(counts, literal);
            holds |= now;
            won |= now && settled;
            lost &= !now && settled;
        }
        counts.held.put(clause, holds);
        counts.won.put(clause, won);
        counts.lost.put(clause, lost);
    }

    /// Whether a literal holds, and whether for good.
    fn truth(&self, counts: &Counts, literal: &Says<u32>) -> (bool, bool) {
        match *literal {
            Says::AtLeast(count, word) => {
                let said = counts.words[word as usize] >= count;
                (said, said)
            }
            Says::AtMost(count, word) => {
                let over = counts.words[word as usize] > count;
                (!over, over)
            }
            Says::Before(first, second) => {
                let order = self.orders.iter().position(|&order| order == (first, second));
                match order.and_then(|order| counts.orders[order]) {
                    Some(truth) => (truth, true),
                    None => (true, false),
                }
            }
        }
    }
}
