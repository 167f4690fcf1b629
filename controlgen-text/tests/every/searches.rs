//! The searches of the table.

use controlgen_text::TextModel;
use controlgen_text::search::{BeamSearch, Choice, DiverseBeamSearch, EarlyStopping, Search};

/// Completions of each prompt.
pub const N: usize = 2;

type Make = fn(&TextModel) -> Box<dyn Search>;

pub fn all() -> Vec<(&'static str, Make)> {
    vec![
        ("greedy", |_| Box::new(Choice::Greedy)),
        ("sampling", |_| Box::new(Choice::Sample { seed: 5, first: 0 })),
        ("beam search", |_| Box::new(BeamSearch::new(3).unwrap())),
        ("beam search to the end", |_| {
            Box::new(BeamSearch::new(3).unwrap().early_stopping(EarlyStopping::Exhausted))
        }),
        ("diverse beam search", |_| {
            Box::new(DiverseBeamSearch::new(BeamSearch::new(4).unwrap(), 2, 0.5).unwrap())
        }),
    ]
}
