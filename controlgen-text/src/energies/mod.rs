//! Energies of texts: what a good text is, lower being better, for token ids and for soft tokens.
//!
//! Each is an [`EnergyFn`](controlgen_core::EnergyFn) of [`Text`](controlgen_core::energy::Text), and what one-hot
//! soft tokens cost is what the tokens cost. So one energy ranks samples
//! ([`rerank`](controlgen_core::energy::rerank)), steers soft tokens by its gradient
//! ([`langevin`](controlgen_core::energy::langevin), over [`TokenLogits`]), and bounds
//! ([`Energy::at_most`](controlgen_core::Energy::at_most)):
//!
//! ```no_run
//! # use controlgen_core::{Energy, LanguageModel, Result};
//! # use controlgen_core::energy::{Objective, Text};
//! use controlgen_text::energies::{Keyword, Nll};
//!
//! # fn f(lm: &dyn LanguageModel, prompt: &[i64], knight: &[Vec<i64>]) -> Result<Objective<Text>> {
//! let fluent = Energy::new(Nll::after(lm, prompt)?);
//! let named = Energy::new(Keyword::new(knight)?);
//! let objective = fluent + named.at_most(0.5);
//! # Ok(objective)
//! # }
//! ```
//!
//! | energy | what it is low for |
//! |---|---|
//! | [`Nll`] | texts that a language model finds likely |
//! | [`Keyword`] | texts that say a word |

mod keyword;
mod logits;
mod nll;

pub use keyword::Keyword;
pub use logits::{TokenLogits, over_logits};
pub use nll::Nll;
