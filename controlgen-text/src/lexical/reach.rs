//! How many tokens it takes to say a word.

use std::collections::HashMap;

use crate::words::{Place, Words};

/// The fewest tokens that say each word, from wherever a text stands.
#[derive(Debug)]
pub(super) struct Reach {
    /// From where nothing is begun: after no word character, and after one.
    costs: Vec<Option<[usize; 2]>>,
    /// From where a word is begun, without leaving it.
    rests: HashMap<(Place, u32), usize>,
}

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
        let rests = search.rests.into_iter().filter_map(|(at, rest)| Some((at, rest?))).collect();
        Self { costs, rests }
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
