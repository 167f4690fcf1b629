//! Lexical constraints: clauses over words and phrases, and how far a text has come with them.
//!
//! [`Clauses`] are a formula in conjunctive normal form: all clauses are to hold, and of each clause some literal. A
//! literal says that words occur at least so often, at most so often, or in an order; `"dog"` is "at least once",
//! `"!dog"` is "never". Clauses may mix them. What a text has made true so far is its [`Progress`], a small value that
//! is cloned where a text forks.
//!
//! ```
//! use controlgen_text::lexical::{Clause, Clauses, Literal};
//! use controlgen_text::words::TokenTrie;
//!
//! let trie = TokenTrie::from_bytes([" dog", " cat", "s", " and", "."])?;
//! let clauses = Clauses::new(&trie, [
//!     Clause::any(["dog", "dogs"]),
//!     // If the text says "cat", it says "dogs" as well.
//!     Clause::any(["!cat", "dogs"]),
//!     Literal::at_most(2, ["dog", "dogs"])?.into(),
//! ])?;
//! assert_eq!(clauses.unmet("A dog."), []);
//! assert_eq!(clauses.unmet("A dog and a cat."), [1]);
//! assert_eq!(clauses.unmet("Dogs, dogs, dogs."), [2]);
//! # Ok::<(), controlgen_core::Error>(())
//! ```
//!
//! They are enforced by a control under any search ([`LexicalConstraints`](crate::controls::LexicalConstraints)), and
//! sought by beams ([`NeuroLogic`](crate::search::NeuroLogic), [`GridBeamSearch`](crate::search::GridBeamSearch)).

mod clauses;
mod consistent;
mod literal;
mod progress;
mod reach;

pub use clauses::{Clauses, ClausesOf};
pub use literal::{Clause, Literal};
pub use progress::{ClauseSet, Progress};
