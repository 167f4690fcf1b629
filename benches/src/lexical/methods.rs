//! The methods of the table: a name, and what it makes of a generation.

use controlgen_core::Result;
use controlgen_text::controls::TopP;
use controlgen_text::search::BeamSearch;
use controlgen_text::{Generate, TextModel};

/// What a method is to make a text of.
pub struct Job<'j> {
    /// The model.
    pub model: &'j TextModel,
    /// The words wanted: of each its forms, the plain one first.
    pub concepts: &'j [Vec<String>],
    /// How many hypotheses or particles a method keeps.
    pub beams: usize,
    /// The text's seed.
    pub seed: u64,
}

/// One row of the table.
pub struct Method {
    /// As it is asked for and printed.
    pub name: &'static str,
    /// Whether it makes the same text for every set, knowing neither words nor seed: it is made once.
    pub blind: bool,
    /// Puts search and controls to a generation that has its prompt and length.
    pub make: for<'a> fn(&Job<'_>, Generate<'a>) -> Result<Generate<'a>>,
}

/// What the other rows are held against: texts of nothing but the model.
pub const REFERENCE: &str = "reference";

/// In the order of the table.
pub const METHODS: &[Method] = &[
    Method {
        name: REFERENCE,
        blind: false,
        make: |job, generate| Ok(generate.with(TopP::new(0.9)?).sample(job.seed)),
    },
    Method {
        name: "beam",
        blind: true,
        make: |job, generate| Ok(generate.search(BeamSearch::new(job.beams)?)),
    },
];
