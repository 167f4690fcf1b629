//! The methods of the table: a name, and what it makes of a generation.

use controlgen_core::Result;
use controlgen_text::controls::{GumbelNoise, LexicalConstraints, Temperature, TopP};
use controlgen_text::lexical::{Clauses, Literal};
use controlgen_text::search::{BeamSearch, GridBeamSearch, NeuroLogic, Smc};
use controlgen_text::words::TokenTrie;
use controlgen_text::{Generate, TextModel};

/// What a method is to make a text of.
pub struct Job<'j> {
    /// The model.
    pub model: &'j TextModel,
    /// Its vocabulary.
    pub trie: &'j TokenTrie,
    /// The words wanted: of each its forms, the plain one first.
    pub concepts: &'j [Vec<String>],
    /// How many new tokens there may be.
    pub tokens: usize,
    /// How many hypotheses or particles a method keeps.
    pub beams: usize,
    /// The text's seed.
    pub seed: u64,
}

impl Job<'_> {
    /// A clause for each word: any of its forms is said.
    fn clauses(&self) -> Result<Clauses> {
        let said = self.concepts.iter().map(|forms| Literal::said(forms.iter().map(String::as_str)));
        Clauses::new(self.trie, said.collect::<Result<Vec<_>>>()?)
    }

    /// The clauses as a mask that sees to it that they are met.
    fn constraints(&self) -> Result<LexicalConstraints> {
        let eos = self.model.eos().iter().copied();
        Ok(LexicalConstraints::new(self.clauses()?, eos)?.within(self.tokens))
    }

    fn neurologic(&self) -> Result<NeuroLogic> {
        Ok(NeuroLogic::new(BeamSearch::new(self.beams)?, self.clauses()?))
    }
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
    Method {
        name: "grid_beam",
        blind: false,
        make: |job, generate| {
            Ok(generate.search(GridBeamSearch::new(BeamSearch::new(job.beams)?, job.clauses()?)))
        },
    },
    Method { name: "neurologic", blind: false, make: |job, generate| Ok(generate.search(job.neurologic()?)) },
    Method {
        name: "neurologic_look_ahead",
        blind: false,
        make: |job, generate| Ok(generate.search(job.neurologic()?.look_ahead(4, 1.0)?)),
    },
    // The mask makes the last beams say what is missing while there is room.
    Method {
        name: "neurologic_mask",
        blind: false,
        make: |job, generate| Ok(generate.with(job.constraints()?).search(job.neurologic()?)),
    },
    // The same with the variety of sampling: each text has noise of its own.
    Method {
        name: "neurologic_noise",
        blind: false,
        make: |job, generate| {
            let noise = GumbelNoise::new(job.seed, 0.5)?;
            Ok(generate.with(noise).with(job.constraints()?).search(job.neurologic()?))
        },
    },
    // Led to the words by a reward; the likeliest of the particles.
    Method {
        name: "smc",
        blind: false,
        make: |job, generate| {
            let generate = generate.with(job.constraints()?.reward(4.0)?);
            let generate = generate.with(Temperature::new(0.6)?).with(TopP::new(0.9)?);
            Ok(generate.n(job.beams).search(Smc::new(job.beams, job.seed)?))
        },
    },
];
