//! What each token of the vocabulary makes of a text.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use controlgen_core::Result;

use super::automaton::{Automaton, Heard, Place, WordOptions};
use super::token_trie::TokenTrie;

/// Words that are followed through a text, token by token.
///
/// A word is one or more phrases (its inflections, say), numbered in the order given; an occurrence of any is an
/// occurrence of the word. Only what lies within the new text counts: of the prompt, no more is known than whether it
/// ends within a word.
///
/// A whole word has occurred once the next character is no word character, or the text ends: so a place tells both
/// what has occurred for good ([`Words::next`]) and what would if the text ended there ([`Words::ended`]).
///
/// *Cost*: a token's bytes, one step each, for `next`; for `moves`, where the place is new, a walk of the vocabulary's
/// tree where it makes a difference (microseconds; about a millisecond the first time), then a look-up. A clone
/// shares everything, what was found included.
#[derive(Clone)]
pub struct Words {
    shared: Arc<Shared>,
}

struct Shared {
    trie: TokenTrie,
    automaton: Automaton,
    count: usize,
    found: Mutex<HashMap<Place, Moves>>,
}

/// As many places are remembered.
const REMEMBERED: usize = 1 << 12;

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words").field("count", &self.shared.count).field("trie", &self.shared.trie).finish()
    }
}

impl Words {
    /// Each word is one or more phrases.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for no words, a word of no phrases, a phrase of nothing but
    /// spaces, and for more words than memory holds.
    pub fn new<W, S>(
        trie: &TokenTrie,
        words: impl IntoIterator<Item = W>,
        options: WordOptions,
    ) -> Result<Self>
    where
        W: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let words: Vec<Vec<String>> =
            words.into_iter().map(|word| word.into_iter().map(Into::into).collect()).collect();
        let automaton = Automaton::new(&words, options)?;
        let found = Mutex::new(HashMap::new());
        Ok(Self { shared: Arc::new(Shared { trie: trie.clone(), automaton, count: words.len(), found }) })
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.shared.count
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.shared.count == 0
    }

    /// The vocabulary.
    pub fn trie(&self) -> &TokenTrie {
        &self.shared.trie
    }

    /// The place at the end of a prompt, where the new text begins. Ids beyond the vocabulary have no text.
    pub fn start(&self, prompt: &[i64]) -> Place {
        // Of the prompt, the last character and the beginning of one more matter: twice four bytes at most.
        let (mut bytes, mut tokens) = (Vec::new(), prompt.iter().rev());
        while bytes.len() < 8 {
            let Some(&token) = tokens.next() else { break };
            bytes.extend(self.shared.trie.bytes(token).iter().rev());
        }
        bytes.reverse();
        // What is cut off within a character is no word character by itself, and so must not come first.
        let whole = bytes.iter().position(|byte| byte & 0xC0 != 0x80).unwrap_or(bytes.len());
        self.text(&bytes[whole..])
    }

    /// The place after a prompt's text.
    pub fn after(&self, prompt: &str) -> Place {
        self.text(prompt.as_bytes())
    }

    fn text(&self, bytes: &[u8]) -> Place {
        self.bytes(Place::default(), bytes, &mut |_, _| {}).elsewhere()
    }

    fn bytes(&self, at: Place, bytes: &[u8], occurs: &mut impl FnMut(Heard, u32)) -> Place {
        bytes.iter().fold(at, |at, &byte| self.shared.automaton.byte(at, byte, occurs))
    }

    /// The place after one token more; `occurs` is told of each word that now has occurred, in order.
    pub fn next(&self, at: Place, token: i64, mut occurs: impl FnMut(u32)) -> Place {
        self.bytes(at, self.shared.trie.bytes(token), &mut |_, word| occurs(word))
    }

    /// The place after these tokens, and the words that have occurred, in order.
    pub fn read(&self, at: Place, tokens: &[i64]) -> (Place, Vec<u32>) {
        let mut occurred = Vec::new();
        let at = tokens.iter().fold(at, |at, &token| self.next(at, token, |word| occurred.push(word)));
        (at, occurred)
    }

    /// The words that occur in a text which follows `at` and ends, in order.
    pub fn occurring(&self, at: Place, text: &str) -> Vec<u32> {
        let mut occurred = Vec::new();
        let at = self.bytes(at, text.as_bytes(), &mut |_, word| occurred.push(word));
        occurred.extend_from_slice(self.ended(at));
        occurred
    }

    /// The words that occur if the text ends here, beside those that already have.
    pub fn ended(&self, at: Place) -> &[u32] {
        self.shared.automaton.ended(at)
    }

    /// How far words have come here: the word, and the share of its characters, in 0 ..= 1, 1 being a whole word
    /// that occurs if it does not go on. Words with none are left out.
    pub fn progress(&self, at: Place) -> &[(u32, f32)] {
        self.shared.automaton.progress(at)
    }

    /// What the tokens of the vocabulary do here.
    pub fn moves(&self, at: Place) -> Moves {
        if let Some(found) = self.remembered(at) {
            return found;
        }
        let base = at.elsewhere();
        let plain = match self.remembered(base) {
            Some(Moves { plain, .. }) => plain,
            None => {
                let plain = Arc::new(self.walk(base, None));
                self.remember(base, Moves { plain: Arc::clone(&plain), own: Arc::default() });
                plain
            }
        };
        if at == base {
            return Moves { plain, own: Arc::default() };
        }
        let own = Arc::new(self.walk(at, Some(base)));
        let moves = Moves { plain, own };
        self.remember(at, moves.clone());
        moves
    }

    fn remembered(&self, at: Place) -> Option<Moves> {
        self.shared.found.lock().unwrap_or_else(PoisonError::into_inner).get(&at).cloned()
    }

    fn remember(&self, at: Place, moves: Moves) {
        let mut found = self.shared.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.len() >= REMEMBERED {
            found.clear();
        }
        found.insert(at, moves);
    }

    /// The tokens that matter at `at`; with `base`, all those that do not do there what they do at `base`.
    fn walk(&self, at: Place, base: Option<Place>) -> Vec<Move> {
        let Shared { trie, automaton, .. } = &*self.shared;
        // What the text stood at occurs with every token that begins outside: not told token by token.
        let silent = at.is_between();
        let from = |place| Trace { place, begun: false, words: Vec::new() };
        let mut path = vec![(from(at), base.map(from))];
        let (mut found, mut i) = (Vec::new(), 0);
        let nodes = trie.nodes();
        while let Some(node) = nodes.get(i) {
            if node.depth > 0 {
                path.truncate(node.depth);
                let (here, there) = &path[node.depth - 1];
                let here = here.after(automaton, node.byte, silent);
                let there = there.as_ref().map(|there| there.after(automaton, node.byte, silent));
                if there.as_ref() == Some(&here) {
                    i = node.end;
                    continue;
                }
                path.push((here, there));
            }
            let (here, there) = &path[node.depth];
            let matters = there.is_some() || here.place.node != 0 || !here.words.is_empty();
            // A token without text changes nothing, at any place.
            if matters && node.depth > 0 {
                let (end, words) = (here.place, here.words.as_slice());
                found.extend(trie.tokens(i).iter().map(|&token| Move {
                    token: token.into(),
                    end,
                    words: words.into(),
                }));
            }
            i += 1;
        }
        found.sort_by_key(|step: &Move| step.token);
        found
    }
}

/// A walk down the tree.
#[derive(Clone, PartialEq)]
struct Trace {
    place: Place,
    /// Whether a character has been completed.
    begun: bool,
    words: Vec<u32>,
}

impl Trace {
    fn after(&self, automaton: &Automaton, byte: u8, silent: bool) -> Self {
        let mut after = self.clone();
        let silent = silent && !self.begun;
        after.place = automaton.byte(self.place, byte, &mut |heard, word| {
            if !(silent && heard == Heard::Before && !after.begun) {
                after.words.push(word);
            }
            after.begun |= heard == Heard::With;
        });
        after.begun |= after.place.is_between();
        after
    }
}

/// What one token does at a place.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// The token.
    pub token: i64,
    /// The place after it.
    pub end: Place,
    /// The words that occur within it, in order; see [`Moves`] for the one exception.
    pub words: Box<[u32]>,
}

/// The tokens that begin, continue or complete a word at a place; all others lead away from all words, and complete
/// none.
///
/// One thing is not told token by token: the words that the text would end with here ([`Words::ended`]) occur with
/// *every* token that begins outside a word ([`TokenTrie::outside`]), before all that [`Move::words`] names. (Where the
/// text ends within a character, it is told of each token, since which character it will be decides.)
#[derive(Clone, Debug)]
pub struct Moves {
    /// What matters at a place of no word, and, over it, what differs here. Both in the order of tokens.
    plain: Arc<Vec<Move>>,
    own: Arc<Vec<Move>>,
}

impl Moves {
    /// The tokens, in order, each with what it does. Some may lead away from all words, as others do.
    pub fn iter(&self) -> impl Iterator<Item = &Move> {
        let (mut plain, mut own) = (self.plain.iter().peekable(), self.own.iter().peekable());
        std::iter::from_fn(move || match (plain.peek(), own.peek()) {
            (Some(a), Some(b)) if a.token < b.token => plain.next(),
            (Some(a), Some(b)) if a.token == b.token => {
                plain.next();
                own.next()
            }
            (Some(_), None) => plain.next(),
            _ => own.next(),
        })
    }

    /// What a token does, if it is one of these.
    pub fn get(&self, token: i64) -> Option<&Move> {
        [&self.own, &self.plain]
            .into_iter()
            .find_map(|moves| moves.binary_search_by_key(&token, |step| step.token).ok().map(|at| &moves[at]))
    }
}
