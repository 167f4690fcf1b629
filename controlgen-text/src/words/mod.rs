//! Words in text, through any tokenizer: which words a text says, and what each token of the vocabulary would make of
//! it.
//!
//! A [`Words`] is an automaton over characters, so that *every* tokenisation of a word counts, the tokenizer's own and
//! any other that a model may choose. Its state, a [`Place`], is a small copyable value. From any place it tells what a
//! token leads to ([`Words::next`]), and, of the whole vocabulary at once, the few tokens that begin, continue or
//! complete words ([`Words::moves`]): the [`TokenTrie`] of the vocabulary and the automaton are walked together, only
//! where the place makes a difference, and what was found is kept.
//!
//! ```
//! use controlgen_text::words::{TokenTrie, WordOptions, Words};
//!
//! let trie = TokenTrie::from_bytes([" a", " do", " dog", "g", "ma", "."])?;
//! let words = Words::new(&trie, [["dog", "dogs"]], WordOptions::default())?;
//!
//! let place = words.start(&[0]);
//! // " do" "g" says "dog" as " dog" does, if the text ends here or goes on with no letter.
//! let (place, occurred) = words.read(place, &[1, 3]);
//! assert!(occurred.is_empty());
//! assert_eq!(words.ended(place), [0]);
//! assert_eq!(words.read(place, &[5]).1, [0]);
//! // "dogma" is another word.
//! assert!(words.read(place, &[4, 5]).1.is_empty());
//! # Ok::<(), controlgen_core::Error>(())
//! ```

mod automaton;
mod moves;
mod token_trie;

pub(crate) use automaton::is_word;
pub use automaton::{Place, WordOptions};
pub use moves::{Move, Moves, Words};
pub(crate) use token_trie::Edges;
pub use token_trie::TokenTrie;
