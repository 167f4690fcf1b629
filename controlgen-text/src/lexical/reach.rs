//! How many tokens it takes to say a word.

use std::collections::HashMap;

use crate::words::{Move, Place, Words};

/// The fewest tokens that say each word, from wherever a text stands.
#[derive(Debug)]
pub(super) struct Reach {
    /// From where nothing is begun: after no word character, and after one.
    costs: Vec<Option<[usize; 2]>>,
    /// From where a word is begun, without leaving it.
    rests: HashMap<(Place, u32), usize>,
    /// From there, the tokens that are the first of the fewest.
    leads: HashMap<(Place, u32), Vec<i64>>,
}

/// As many of them are kept for each word: the shortest.
const LEADS: usize = 32;

impl Reach {
    pub(super) fn new(words: &Words) -> Self {
        let mut search = Search { words, rests: HashMap::new() };
        let [outside, inside] = [words.after(" "), words.after("a")];
        let separable = !words.trie().outside().is_empty();
        let costs = (0..words.len() as u32)
            .map(|word| {
                let outside = search.rest(outside, word, 0.0);
                let parted = outside.filter(|_| separable).map(|rest| rest + 1);
                let inside = [search.rest(inside, word, 0.0), parted].into_iter().flatten().min();
                Some([outside?, inside?])
            })
            .collect();
        let rests: HashMap<(Place, u32), usize> =
            search.rests.into_iter().filter_map(|(at, rest)| Some((at, rest?))).collect();
        let leads = |(&(at, word), &rest): (&(Place, u32), &usize)| {
            let leads = |step: &&Move| {
                let said = step.words.contains(&word) || words.ended(step.end).contains(&word);
                if rest == 1 { said } else { rests.get(&(step.end, word)) == Some(&(rest - 1)) }
            };
            let mut tokens: Vec<i64> = words.moves(at).iter().filter(leads).map(|step| step.token).collect();
            tokens.sort_by_key(|&token| words.trie().bytes(token).len());
            tokens.truncate(LEADS);
            ((at, word), tokens)
        };
        let leads = rests.iter().map(leads).collect();
        Self { costs, rests, leads }
    }

    /// The tokens that are enough to say a word wherever a text stands; `None` if none can.
    pub(super) fn cost(&self, word: u32) -> Option<usize> {
        let [outside, inside] = self.costs.get(word as usize).copied().flatten()?;
        Some(outside.max(inside))
    }

    /// The tokens that are enough to say a word from this place.
    pub(super) fn rest(&self, at: Place, word: u32) -> Option<usize> {
        let costs = self.costs.get(word as usize).copied().flatten()?;
        let anew = match at {
            at if !at.is_between() => self.cost(word)?,
            at => costs[usize::from(at.is_inside())],
        };
        Some(self.rests.get(&(at, word)).map_or(anew, |&rest| rest.min(anew)))
    }
}

impl Reach {
    /// Whether a word is fewer tokens away than from where nothing is begun.
    pub(super) fn is_nearer(&self, at: Place, word: u32) -> bool {
        let cost = self.costs.get(word as usize).copied().flatten().map(|costs| costs[0].min(costs[1]));
        matches!((self.rests.get(&(at, word)), cost), (Some(&rest), Some(cost)) if rest < cost)
    }

    /// The first tokens of the shortest ways to a word from this place: to go on with it, and to begin anew.
    pub(super) fn leads(&self, at: Place, word: u32) -> impl Iterator<Item = i64> {
        let of = move |at: Place| self.leads.get(&(at, word)).into_iter().flatten().copied();
        let anew = Place::plain(at.is_inside());
        of(at).chain(of(anew).filter(move |_| anew != at))
    }
}

struct Search<'w> {
    words: &'w Words,
    rests: HashMap<(Place, u32), Option<usize>>,
}

impl Search<'_> {
    /// The fewest tokens, of those that each bring the word nearer, of which `come` is there.
    fn rest(&mut self, at: Place, word: u32, come: f32) -> Option<usize> {
        if let Some(&known) = self.rests.get(&(at, word)) {
            return known;
        }
        let mut fewest: Option<usize> = None;
        // Many tokens lead to the same place.
        let mut places: Vec<(Place, f32)> = Vec::new();
        for step in self.words.moves(at).iter() {
            if step.words.contains(&word) || self.words.ended(step.end).contains(&word) {
                fewest = Some(1);
                break;
            }
            let share = self.words.progress(step.end).iter().find(|(other, _)| *other == word);
            match share {
                Some(&(_, share)) if share > come && !places.iter().any(|(place, _)| *place == step.end) => {
                    places.push((step.end, share));
                }
                _ => {}
            }
        }
        if fewest.is_none() {
            let rests = places.into_iter().filter_map(|(place, share)| self.rest(place, word, share));
            fewest = rests.min().map(|rest| rest + 1);
        }
        self.rests.insert((at, word), fewest);
        fewest
    }
}
