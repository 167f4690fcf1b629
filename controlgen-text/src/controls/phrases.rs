//! Sequences of tokens that the next token may complete.

use std::collections::{HashMap, VecDeque};

/// Sequences of two tokens or more, each with a value: tells in constant time which of them the next token may
/// complete. Aho and Corasick, "Efficient string matching" (CACM 1975), over all tokens of a sequence but the last.
///
/// What a row has seen is one number, the node: the longest end of its history that begins a sequence.
#[derive(Debug)]
pub(super) struct Phrases<T> {
    nodes: Vec<Node<T>>,
}

#[derive(Debug)]
struct Node<T> {
    next: HashMap<i64, usize>,
    /// The node of the longest proper end of what led here.
    shorter: usize,
    /// The tokens that complete a sequence here, those of shorter ends included.
    completions: Vec<(i64, T)>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self { next: HashMap::new(), shorter: 0, completions: Vec::new() }
    }
}

impl<T: Copy> Phrases<T> {
    /// Sequences of two tokens or more; shorter ones are left out.
    pub(super) fn new<'a>(sequences: impl IntoIterator<Item = (&'a [i64], T)>) -> Self {
        let mut nodes = vec![Node::default()];
        for (sequence, value) in sequences {
            let Some((&last, beginning)) = sequence.split_last() else { continue };
            if beginning.is_empty() {
                continue;
            }
            let mut at = 0;
            for &token in beginning {
                let fresh = nodes.len();
                at = *nodes[at].next.entry(token).or_insert(fresh);
                if at == fresh {
                    nodes.push(Node::default());
                }
            }
            nodes[at].completions.push((last, value));
        }
        let mut phrases = Self { nodes };
        phrases.link();
        phrases
    }

    /// Finds each node's shorter end, breadth first, and adds its completions.
    fn link(&mut self) {
        let mut queue: VecDeque<usize> = self.nodes[0].next.values().copied().collect();
        while let Some(at) = queue.pop_front() {
            let shorter = self.nodes[at].shorter;
            let inherited = self.nodes[shorter].completions.clone();
            self.nodes[at].completions.extend(inherited);
            let children: Vec<(i64, usize)> = self.nodes[at].next.iter().map(|(&t, &n)| (t, n)).collect();
            for (token, child) in children {
                self.nodes[child].shorter = self.next(shorter, token);
                queue.push_back(child);
            }
        }
    }

    /// The node after these tokens.
    pub(super) fn start(&self, tokens: &[i64]) -> usize {
        tokens.iter().fold(0, |at, &token| self.next(at, token))
    }

    /// The node after one more token.
    pub(super) fn next(&self, mut at: usize, token: i64) -> usize {
        loop {
            match self.nodes[at].next.get(&token) {
                Some(&next) => return next,
                None if at == 0 => return 0,
                None => at = self.nodes[at].shorter,
            }
        }
    }

    /// The tokens that complete a sequence at this node, with its value.
    pub(super) fn completions(&self, at: usize) -> &[(i64, T)] {
        self.nodes.get(at).map_or(&[], |node| &node.completions)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a search of the history for every sequence.
        #[test]
        fn finds_what_a_plain_search_finds(
            sequences in prop::collection::vec(prop::collection::vec(0i64..3, 2..6), 1..12),
            history in prop::collection::vec(0i64..3, 0..30),
        ) {
            let phrases = Phrases::new(sequences.iter().enumerate().map(|(i, s)| (s.as_slice(), i)));
            let mut at = 0;
            for end in 0..=history.len() {
                let seen = &history[..end];
                if let Some(&token) = seen.last() {
                    at = phrases.next(at, token);
                }
                prop_assert_eq!(at, phrases.start(seen));
                let mut found: Vec<usize> = phrases.completions(at).iter().map(|&(_, i)| i).collect();
                found.sort_unstable();
                let ends = |s: &Vec<i64>| seen.ends_with(&s[..s.len() - 1]);
                let plain: Vec<usize> = (0..sequences.len()).filter(|&i| ends(&sequences[i])).collect();
                prop_assert_eq!(found, plain);
                for &(token, i) in phrases.completions(at) {
                    prop_assert_eq!(Some(&token), sequences[i].last());
                }
            }
        }
    }
}
