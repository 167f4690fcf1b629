//! Clauses in conjunctive normal form, compiled for a vocabulary.

use std::collections::HashMap;
use std::sync::Arc;

use controlgen_core::{Error, Result};

use super::consistent;
use super::literal::{Clause, Says};
use super::progress::{ClauseSet, Formula, Progress};
use super::reach::Reach;
use crate::words::{Edges, Move, Moves, Place, TokenTrie, WordOptions, Words};

/// Clauses that are all to hold of the new text, compiled for a vocabulary; see [the module](super).
///
/// A clone shares everything.
#[derive(Clone)]
pub struct Clauses {
    shared: Arc<Shared>,
}

struct Shared {
    clauses: Vec<Clause>,
    words: Words,
    whole: bool,
    formula: Formula,
    reach: Reach,
}

impl std::fmt::Debug for Clauses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.shared.clauses.iter().map(ToString::to_string)).finish()
    }
}

impl Clauses {
    /// Clauses over whole words of either case.
    ///
    /// # Errors
    /// [`Error::Value`] for no clauses and for more than 128; for a clause without literals, and a phrase of nothing but
    /// spaces; for a word that no tokens can spell, in a clause where it is all there is; for clauses that contradict
    /// each other, naming the first that cannot hold with those before it. (Contradictions are searched for among ten
    /// thousand combinations of literals; what is found there is sound, not complete.)
    pub fn new(trie: &TokenTrie, clauses: impl IntoIterator<Item: Into<Clause>>) -> Result<Self> {
        Self::with(trie, WordOptions::default(), clauses)
    }

    /// Clauses over words that are recognised in another way.
    ///
    /// # Errors
    /// As [`Clauses::new`].
    pub fn with(
        trie: &TokenTrie,
        options: WordOptions,
        clauses: impl IntoIterator<Item: Into<Clause>>,
    ) -> Result<Self> {
        let clauses: Vec<Clause> = clauses.into_iter().map(Into::into).collect();
        if !(1..=ClauseSet::MOST).contains(&clauses.len()) {
            return Err(Error::value("clauses", format!("1 ..= {}", ClauseSet::MOST), clauses.len()));
        }
        if let Some(empty) = clauses.iter().position(|clause| clause.0.is_empty()) {
            return Err(Error::value(format!("literals of clause {empty}"), "at least one", "none"));
        }
        let (spelled, formula) = compile(&clauses);
        let words = Words::new(trie, &spelled, options)?;
        consistent::check(&clauses, &formula, &consistent::implied(&words, &spelled))?;
        let reach = Reach::new(&words);
        for (i, literals) in formula.clauses.iter().enumerate() {
            let spellable = |literal: &Says<u32>| !matches!(literal, Says::AtLeast(_, word) if reach.cost(*word).is_none());
            if !literals.iter().any(spellable) {
                let expected = "a phrase that the vocabulary's tokens can spell";
                return Err(Error::value(format!("clause {i}"), expected, format!("`{}`", clauses[i])));
            }
        }
        Ok(Self { shared: Arc::new(Shared { clauses, words, whole: options.whole, formula, reach }) })
    }

    /// How many clauses there are.
    pub fn len(&self) -> usize {
        self.shared.clauses.len()
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.shared.clauses.is_empty()
    }

    /// A clause.
    pub fn get(&self, clause: usize) -> Option<&Clause> {
        self.shared.clauses.get(clause)
    }

    /// All of them.
    pub fn all(&self) -> ClauseSet {
        ClauseSet::first(self.len())
    }

    /// The words that the clauses speak of.
    pub fn words(&self) -> &Words {
        &self.shared.words
    }

    /// Nothing said yet, after a prompt.
    pub fn start(&self, prompt: &[i64]) -> Progress {
        Progress { place: self.words().start(prompt), counts: self.shared.formula.start() }
    }

    /// Takes note of a token.
    pub fn advance(&self, progress: &mut Progress, token: i64) {
        let Progress { place, counts } = progress;
        *place = self.words().next(*place, token, |word| self.shared.formula.occurs(counts, word));
    }

    /// The clauses that hold if the text ends here, and those that it would then have lost.
    pub fn ended(&self, progress: &Progress) -> (ClauseSet, ClauseSet) {
        let ended = self.words().ended(progress.place);
        let mut counts = &progress.counts;
        let mut with;
        if !ended.is_empty() {
            with = counts.clone();
            ended.iter().for_each(|&word| self.shared.formula.occurs(&mut with, word));
            counts = &with;
        }
        (counts.held, counts.lost)
    }

    /// The clauses that do not hold of a text by itself, as it ends.
    pub fn unmet(&self, text: &str) -> Vec<usize> {
        self.unmet_after("", text)
    }

    /// The clauses that do not hold of a text which follows a prompt, as it ends.
    pub fn unmet_after(&self, prompt: &str, text: &str) -> Vec<usize> {
        let mut counts = self.shared.formula.start();
        for word in self.words().occurring(self.words().after(prompt), text) {
            self.shared.formula.occurs(&mut counts, word);
        }
        self.all().without(counts.held).iter().collect()
    }

    /// What the tokens do that matter here.
    pub fn moves(&self, progress: &Progress) -> Moves {
        self.words().moves(progress.place)
    }

    /// The progress after a token that does what a move of [`Clauses::moves`] says.
    pub fn after(&self, progress: &Progress, step: &Move) -> Progress {
        let mut after = self.after_first(progress, self.words().trie().begins_outside(step.token));
        after.place = step.end;
        step.words.iter().for_each(|&word| self.shared.formula.occurs(&mut after.counts, word));
        after
    }

    /// The progress after a token with these edges that is not among the moves.
    pub(crate) fn after_other(&self, progress: &Progress, edges: Edges) -> Progress {
        let mut after = self.after_first(progress, edges.begins);
        after.place = Place::plain(!edges.ends && self.shared.whole);
        after
    }

    /// After a character that ends a word at the end, or goes on with it.
    fn after_first(&self, progress: &Progress, outside: bool) -> Progress {
        let mut after = progress.clone();
        if outside && progress.place.is_between() {
            for &word in self.words().ended(progress.place) {
                self.shared.formula.occurs(&mut after.counts, word);
            }
        }
        after
    }

    /// What is to be said before a word, in tokens, and how many fewer than usual the first word takes from here.
    fn way(&self, progress: &Progress, word: u32, gap: usize, depth: usize) -> Option<(usize, usize)> {
        let reach = &self.shared.reach;
        let gained = reach.cost(word)?.saturating_sub(reach.rest(progress.place, word)?);
        let mut way = (0usize, gained);
        for first in self.blocking(progress, word, depth) {
            let (before, gained) = self.way(progress, first, gap, depth + 1)?;
            way = (way.0 + before + reach.cost(first)? + gap, gained);
        }
        Some(way)
    }

    /// The words that are to be said before this one. `depth` orders have been followed, of which some may be circles.
    fn blocking(&self, progress: &Progress, word: u32, depth: usize) -> impl Iterator<Item = u32> {
        let orders = &self.shared.formula.orders;
        let ended = self.words().ended(progress.place);
        let open = orders.iter().zip(&progress.counts.orders).filter(|(_, settled)| settled.is_none());
        let firsts = open.filter(move |((first, second), _)| *second == word && !ended.contains(first));
        firsts.map(|((first, _), _)| *first).filter(move |_| depth < orders.len())
    }

    /// Adds the tokens that begin or continue a word, or what is to be said before it.
    fn lead(&self, progress: &Progress, word: u32, depth: usize, leads: &mut Vec<i64>) {
        let mut free = true;
        for first in self.blocking(progress, word, depth) {
            free = false;
            self.lead(progress, first, depth + 1, leads);
        }
        if free {
            leads.extend(self.shared.reach.leads(progress.place, word));
        }
    }

    /// The tokens that begin or continue a word of a clause that is not `held`, on the shortest ways to it. Repetitions
    /// are not dropped.
    pub(crate) fn leads(&self, progress: &Progress, held: ClauseSet) -> Vec<i64> {
        let mut leads = Vec::new();
        for clause in self.all().without(held).iter() {
            for literal in &self.shared.formula.clauses[clause] {
                if let Says::AtLeast(_, word) = *literal {
                    self.lead(progress, word, 0, &mut leads);
                }
            }
        }
        leads
    }

    /// The clauses that are not `held` of which a word has begun: that is fewer tokens away than it is anew.
    pub(crate) fn begun(&self, progress: &Progress, held: ClauseSet) -> ClauseSet {
        let Shared { formula, reach, .. } = &*self.shared;
        let mut begun = ClauseSet::default();
        for &(word, _) in self.words().progress(progress.place) {
            if reach.is_nearer(progress.place, word) {
                let wants =
                    |literal: &Says<u32>| matches!(literal, Says::AtLeast(_, other) if *other == word);
                for &clause in formula.of_word[word as usize].iter().filter(|&&clause| !held.contains(clause))
                {
                    begun.put(clause, begun.contains(clause) || formula.clauses[clause].iter().any(wants));
                }
            }
        }
        begun
    }

    /// The greatest share of a word that stands at the end, of the clauses that are not `held`.
    pub(crate) fn most_coming(&self, progress: &Progress, held: ClauseSet) -> f64 {
        let needed = |(word, _): &&(u32, f32)| {
            let clauses = &self.shared.formula.of_word[*word as usize];
            let wants = |literal: &Says<u32>| matches!(literal, Says::AtLeast(_, other) if other == word);
            clauses.iter().any(|&c| !held.contains(c) && self.shared.formula.clauses[c].iter().any(wants))
        };
        let coming = self.words().progress(progress.place).iter().filter(needed);
        coming.fold(0.0, |most, (_, share)| f64::from(*share).max(most))
    }

    /// More tokens than [`Clauses::need`] ever asks for.
    pub(crate) fn most(&self, gap: usize) -> usize {
        let Shared { formula, reach, .. } = &*self.shared;
        let cost = |word: u32| reach.cost(word).unwrap_or(0) + gap;
        let orders =
            formula.orders.len() * formula.orders.iter().map(|&(first, _)| cost(first)).sum::<usize>();
        let of_literal = |literal: &Says<u32>| match *literal {
            Says::AtLeast(count, word) => usize::from(count) * cost(word) + orders,
            _ => 0,
        };
        1 + formula
            .clauses
            .iter()
            .map(|clause| clause.iter().map(of_literal).max().unwrap_or(0))
            .sum::<usize>()
    }

    /// How many tokens more are enough to make the clauses hold that do not, if they can be; `gap` is added for each
    /// occurrence that is missing. `None` where a clause cannot be made to hold.
    pub(crate) fn need(&self, progress: &Progress, gap: usize) -> Option<usize> {
        let Shared { formula, reach, .. } = &*self.shared;
        let (held, lost) = self.ended(progress);
        if !progress.counts.lost.is_empty() {
            return None;
        }
        let ended = self.words().ended(progress.place);
        // What would be lost by ending here is saved by going on with the word.
        let mut need = usize::from(!lost.is_empty());
        // The word that gains most by where the text stands is said first.
        let mut gain = 0;
        for clause in self.all().without(held).iter() {
            let cheapest = formula.clauses[clause].iter().filter_map(|literal| match *literal {
                Says::AtLeast(count, word) => {
                    let missing = usize::from(count.saturating_sub(progress.counts.words[word as usize]));
                    let missing = missing - usize::from(missing > 0 && ended.contains(&word));
                    let (before, gained) = self.way(progress, word, gap, 0)?;
                    Some((before + missing * (reach.cost(word)? + gap), gained))
                }
                _ => None,
            });
            let (cost, gained) = cheapest.min_by_key(|&(cost, gained)| cost.saturating_sub(gained))?;
            need = need.saturating_add(cost);
            gain = gain.max(gained.min(cost));
        }
        Some(need.saturating_sub(gain))
    }

    /// The sum of how far the clauses have come, in 0 ..= their number: of each 1 where it holds, else the greatest
    /// share of its literals, an occurrence that has begun counted by the share of its characters.
    pub(crate) fn worth(&self, progress: &Progress) -> f64 {
        let Progress { place, counts } = progress;
        let coming = self.words().progress(*place);
        if coming.is_empty() {
            return counts.worth;
        }
        // Clauses that gain, each by the most of its words.
        let mut gains: Vec<(usize, f64)> = Vec::new();
        for &(word, part) in coming {
            for &clause in
                self.shared.formula.of_word[word as usize].iter().filter(|&&c| !counts.held.contains(c))
            {
                let gain = self.shared.formula.share(counts, clause, Some((word, part)))
                    - self.shared.formula.share(counts, clause, None);
                match gains.iter_mut().find(|(other, _)| *other == clause) {
                    Some((_, most)) => *most = most.max(gain),
                    None => gains.push((clause, gain)),
                }
            }
        }
        counts.worth + gains.iter().map(|(_, gain)| gain).sum::<f64>()
    }
}

/// The words of all literals, each once, and the literals by their numbers.
fn compile(clauses: &[Clause]) -> (Vec<Vec<String>>, Formula) {
    let (mut spelled, mut numbers): (Vec<Vec<String>>, HashMap<Vec<String>, u32>) = Default::default();
    let mut number = |word: &Vec<String>| {
        *numbers.entry(word.clone()).or_insert_with(|| {
            spelled.push(word.clone());
            spelled.len() as u32 - 1
        })
    };
    let compiled: Vec<Vec<Says<u32>>> = clauses
        .iter()
        .map(|clause| {
            let literal = |literal: &super::Literal| match &literal.0 {
                Says::AtLeast(count, word) => Says::AtLeast(*count, number(word)),
                Says::AtMost(count, word) => Says::AtMost(*count, number(word)),
                Says::Before(first, second) => Says::Before(number(first), number(second)),
            };
            clause.0.iter().map(literal).collect()
        })
        .collect();
    let mut orders = Vec::new();
    let mut of_word = vec![Vec::new(); spelled.len()];
    for (i, clause) in compiled.iter().enumerate() {
        for literal in clause {
            let words = match *literal {
                Says::AtLeast(_, word) | Says::AtMost(_, word) => vec![word],
                Says::Before(first, second) => {
                    if !orders.contains(&(first, second)) {
                        orders.push((first, second));
                    }
                    vec![first, second]
                }
            };
            for word in words {
                let clauses: &mut Vec<usize> = &mut of_word[word as usize];
                if clauses.last() != Some(&i) {
                    clauses.push(i);
                }
            }
        }
    }
    (spelled, Formula { clauses: compiled, orders, of_word })
}

/// The clauses of each prompt, or of all prompts alike.
#[derive(Clone, Debug)]
pub struct ClausesOf {
    all: Arc<[Clauses]>,
    shared: bool,
}

impl ClausesOf {
    /// Those of a prompt.
    pub(crate) fn get(&self, prompt: usize) -> Result<&Clauses> {
        let found = self.all.get(if self.shared { 0 } else { prompt });
        found.ok_or_else(|| Error::value("prompt of the clauses", format!("0 .. {}", self.all.len()), prompt))
    }

    /// Refuses as many prompts, where there are not clauses for each.
    pub(crate) fn check(&self, prompts: usize) -> Result<()> {
        if self.shared || self.all.len() == prompts {
            Ok(())
        } else {
            let expected = format!("{prompts}, one for each prompt, or one for all");
            Err(Error::value("sets of clauses", expected, self.all.len()))
        }
    }
}

/// The same for all prompts.
impl From<Clauses> for ClausesOf {
    fn from(clauses: Clauses) -> Self {
        Self { all: [clauses].into(), shared: true }
    }
}

/// The same for all prompts.
impl From<&Clauses> for ClausesOf {
    fn from(clauses: &Clauses) -> Self {
        clauses.clone().into()
    }
}

/// One set for each prompt.
impl From<Vec<Clauses>> for ClausesOf {
    fn from(clauses: Vec<Clauses>) -> Self {
        Self { all: clauses.into(), shared: false }
    }
}
