//! The vocabulary as a tree of bytes.

use std::sync::Arc;

use controlgen_core::{Error, Result};

use super::automaton::is_word;
use crate::tokenizer::Tokenizer;

/// The bytes of all tokens of a vocabulary, as a tree: tokens that begin alike are walked together.
///
/// Built once a tokenizer (a tenth of a second for 49k tokens); a clone shares everything.
#[derive(Clone)]
pub struct TokenTrie {
    shared: Arc<Shared>,
}

struct Shared {
    /// The bytes of all tokens, one after the other, and where each token's end.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    nodes: Vec<Node>,
    /// The tokens in the order of the nodes that they end at.
    tokens: Vec<u32>,
    /// The edges of each token.
    edges: Vec<Edges>,
    /// The tokens of each kind of [`Edges::ALL`] that have text.
    kinds: [Vec<i64>; 4],
    outside: Vec<i64>,
    silent: Vec<i64>,
}

/// On which sides a token has a character that is no word character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edges {
    /// Its first character is whole, and none: it ends a word before it.
    pub(crate) begins: bool,
    /// Its last character is whole, and none: a word may begin after it.
    pub(crate) ends: bool,
}

impl Edges {
    pub(crate) const ALL: [Self; 4] = [
        Self { begins: true, ends: true },
        Self { begins: true, ends: false },
        Self { begins: false, ends: true },
        Self { begins: false, ends: false },
    ];

    fn of(token: &[u8]) -> Self {
        let first = &token[..token.len().min(4)];
        let begins = match std::str::from_utf8(first) {
            Ok(text) => text.chars().next().is_some_and(|c| !is_word(c)),
            Err(error) => match std::str::from_utf8(&first[..error.valid_up_to()]) {
                Ok(text) if !text.is_empty() => text.chars().next().is_some_and(|c| !is_word(c)),
                // Bytes that can be no character count as one that is no word character.
                _ => error.error_len().is_some(),
            },
        };
        let last = String::from_utf8_lossy(&token[token.len().saturating_sub(4)..]);
        let ends = last.chars().next_back().is_some_and(|c| !is_word(c) && c != char::REPLACEMENT_CHARACTER);
        Self { begins, ends }
    }
}

/// A node of the tree. Nodes stand in the order of a walk that goes down first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) byte: u8,
    /// How many bytes lead here.
    pub(super) depth: usize,
    /// The first node that is not below this one.
    pub(super) end: usize,
    /// The first of the tokens that end here, among [`TokenTrie::tokens`]; the next node's is one past the last.
    first: usize,
}

impl std::fmt::Debug for TokenTrie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shared { ends, nodes, .. } = &*self.shared;
        f.debug_struct("TokenTrie").field("tokens", &ends.len()).field("nodes", &nodes.len()).finish()
    }
}

impl TokenTrie {
    /// The tree of a tokenizer's vocabulary. Special tokens say nothing: they have no text.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for vocabularies where the text of a token depends on its neighbours (WordPiece);
    /// [`Error::Value`] for one that is empty, or too large.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let mut all = Vec::with_capacity(usize::try_from(tokenizer.vocab_size()).unwrap_or(0));
        for id in 0..tokenizer.vocab_size() {
            let bytes = match tokenizer.id_to_token(id) {
                Some(_) if !tokenizer.is_special(id) => tokenizer.token_bytes(id).ok_or_else(|| {
                    let what = "words in the text of a tokenizer whose tokens have no bytes of their own";
                    Error::unsupported(what, "byte-level and SentencePiece tokenizers")
                })?,
                _ => Vec::new(),
            };
            all.push(bytes);
        }
        Self::from_bytes(all)
    }

    /// The tree of tokens whose bytes are given, in the order of their ids; a token without bytes says nothing.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens, and for more than 2³² − 1.
    pub fn from_bytes(tokens: impl IntoIterator<Item: AsRef<[u8]>>) -> Result<Self> {
        let (mut bytes, mut ends, mut edges) = (Vec::new(), Vec::new(), Vec::new());
        for token in tokens {
            let token = token.as_ref();
            edges.push(Edges::of(token));
            bytes.extend_from_slice(token);
            ends.push(bytes.len());
        }
        let count = match u32::try_from(ends.len()) {
            Ok(count) if count > 0 => count,
            _ => {
                return Err(Error::value(
                    "tokens of a vocabulary",
                    format!("1 ..= {}", u32::MAX),
                    ends.len(),
                ));
            }
        };
        let begins = |token: usize| if token == 0 { 0 } else { ends[token - 1] };
        let all = |kept: &dyn Fn(Edges, bool) -> bool| -> Vec<i64> {
            let kept = |&token: &usize| kept(edges[token], ends[token] == begins(token));
            (0..edges.len()).filter(kept).map(|token| token as i64).collect()
        };
        let kinds = Edges::ALL.map(|kind| all(&|edges, silent| edges == kind && !silent));
        let (outside, silent) = (all(&|edges, _| edges.begins), all(&|_, silent| silent));
        let (nodes, tokens) = (Vec::new(), (0..count).collect());
        let mut shared = Shared { bytes, ends, nodes, tokens, edges, kinds, outside, silent };
        shared.plant();
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How many tokens there are.
    pub fn vocab_size(&self) -> i64 {
        self.shared.ends.len() as i64
    }

    /// The bytes of a token; none for an id beyond the vocabulary, as padded models have.
    pub fn bytes(&self, token: i64) -> &[u8] {
        usize::try_from(token).map_or(&[], |token| self.shared.bytes_of(token))
    }

    /// Whether the first character of a token is whole, and no word character: whether it ends a word before it.
    pub fn begins_outside(&self, token: i64) -> bool {
        usize::try_from(token)
            .is_ok_and(|token| self.shared.edges.get(token).is_some_and(|edges| edges.begins))
    }

    /// All tokens that begin outside a word, in order; more than half of most vocabularies.
    pub fn outside(&self) -> &[i64] {
        &self.shared.outside
    }

    /// All tokens that have no text, in order.
    pub(crate) fn silent(&self) -> &[i64] {
        &self.shared.silent
    }

    /// The tokens with text whose edges are the i-th of [`Edges::ALL`].
    pub(crate) fn of_kind(&self, i: usize) -> &[i64] {
        self.shared.kinds.get(i).map_or(&[], Vec::as_slice)
    }

    /// The nodes; the first is the root.
    pub(super) fn nodes(&self) -> &[Node] {
        &self.shared.nodes
    }

    /// The tokens that end at a node.
    pub(super) fn tokens(&self, node: usize) -> &[u32] {
        let Shared { nodes, tokens, .. } = &*self.shared;
        let end = nodes.get(node + 1).map_or(tokens.len(), |next| next.first);
        &tokens[nodes[node].first..end]
    }
}

impl Shared {
    fn bytes_of(&self, token: usize) -> &[u8] {
        let Some(&end) = self.ends.get(token) else { return &[] };
        let begin = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.bytes[begin..end]
    }

    /// Makes the nodes, of the tokens in the order of their bytes.
    fn plant(&mut self) {
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.sort_by(|&a, &b| self.bytes_of(a as usize).cmp(self.bytes_of(b as usize)).then(a.cmp(&b)));
        // The nodes from the root to where the last token ended.
        let mut path = vec![0usize];
        let mut nodes = vec![Node { byte: 0, depth: 0, end: 0, first: 0 }];
        let mut before: &[u8] = &[];
        for (at, &token) in tokens.iter().enumerate() {
            let bytes = self.bytes_of(token as usize);
            let shared = before.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            let fresh = nodes.len();
            path.drain(shared + 1..).for_each(|closed| nodes[closed].end = fresh);
            for (depth, &byte) in bytes.iter().enumerate().skip(shared) {
                path.push(nodes.len());
                // Tokens so far end before this node; its own begin here.
                nodes.push(Node { byte, depth: depth + 1, end: 0, first: at });
            }
            before = bytes;
        }
        let count = nodes.len();
        path.iter().for_each(|&open| nodes[open].end = count);
        self.nodes = nodes;
        self.tokens = tokens;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every token is found by its bytes, under the nodes that lead to it, and nowhere else.
        #[test]
        fn nodes_spell_the_tokens(
            tokens in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![b'a', b'b', 0xC3, b' ']), 0..5), 1..40),
        ) {
            let trie = TokenTrie::from_bytes(&tokens).unwrap();
            let mut found = vec![None; tokens.len()];
            let mut path: Vec<u8> = Vec::new();
            for (i, node) in trie.nodes().iter().enumerate() {
                if node.depth > 0 {
                    path.truncate(node.depth - 1);
                    path.push(node.byte);
                }
                for &token in trie.tokens(i) {
                    prop_assert!(found[token as usize].replace(path.clone()).is_none());
                }
                let below = trie.nodes()[i + 1..].iter().take_while(|other| other.depth > node.depth).count();
                prop_assert_eq!(node.end, i + 1 + below);
            }
            for (token, found) in tokens.iter().zip(found) {
                prop_assert_eq!(Some(token), found.as_ref());
            }
            for (id, token) in (0i64..).zip(&tokens) {
                prop_assert_eq!(trie.bytes(id), token.as_slice());
                let lossy = String::from_utf8_lossy(token);
                let whole = std::str::from_utf8(token).is_ok() || !lossy.starts_with('\u{FFFD}');
                if whole {
                    let outside = lossy.chars().next().is_some_and(|c| !is_word(c));
                    prop_assert_eq!(trie.begins_outside(id), outside);
                }
            }
        }
    }
}
