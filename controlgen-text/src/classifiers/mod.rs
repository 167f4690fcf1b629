//! Classifiers of texts, trained on labelled files.

mod labelled;
mod split;
mod states;

pub use labelled::{Columns, Example, Labelled};
pub use split::Split;
pub use states::LmStates;
