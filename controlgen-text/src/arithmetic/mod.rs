//! Arithmetic of language models: what several say of one text, added up.
//!
//! A [`Term`] is a model and what it reads: the text, the text after an instruction, another text in the prompt's place. Terms
//! are added, subtracted and multiplied by numbers into an [`Expression`], and [`ModelArithmetic`] is the language model
//! whose scores are its values: Dekoninck, Fischer, Beurer-Kellner and Vechev, "Controlled Text Generation via Language
//! Model Arithmetic" (ICLR 2024).
//!
//! ```text
//! score(v | x)  =  Σᵢ fᵢ log pᵢ(v | xᵢ)
//! ```
//!
//! Being a language model, it goes with every search and every control. Terms that were made of one another are over one
//! model, and rows of *one* forward call; terms that read the same are computed once.
//!
//! | formula | paper |
//! |---|---|
//! | [`classifier_free_guidance`] | Sanchez et al. 2023 |
//! | [`dexperts`] | Liu et al. 2021 |
//! | [`contrastive_decoding`], [`improved_contrastive_decoding`] | Li et al. 2023; O'Brien and Lewis 2023 |
//!
//! ```no_run
//! # fn main() -> controlgen_core::Result<()> {
//! use controlgen_core::Placement;
//! use controlgen_text::TextModel;
//!
//! let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
//! let pirate = model.arithmetic(|m| {
//!     Ok(m.prompt() + 0.8 * m.after("I am a pirate.\n\n")? - 0.8 * m.after("I am a teacher.\n\n")?)
//! })?;
//! let done = pirate.generate("My day at school:").max_new_tokens(24).run()?;
//! // "\n\n* The first day: I was a young man, eager to prove myself. I had a trusty old sail", where the model says
//! // "\n\n* Monday: 8:30am-9:30am\n* Tuesday: 9:"
//! println!("{:?}", done.text());
//! # Ok(())
//! # }
//! ```

mod classifier_free_guidance;
mod contrastive_decoding;
mod dexperts;
mod expression;
mod model;
mod readings;
mod term;

pub use classifier_free_guidance::classifier_free_guidance;
pub use contrastive_decoding::{contrastive_decoding, improved_contrastive_decoding};
pub use dexperts::dexperts;
pub use expression::Expression;
pub use model::ModelArithmetic;
pub use term::Term;

pub(crate) use readings::{Readings, ReadingsState};
