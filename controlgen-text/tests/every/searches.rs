//! The searches of the table.

use controlgen_text::TextModel;
use controlgen_text::lexical::{Clause, Clauses};
use controlgen_text::search::{
    BeamSearch, BestOf, Choice, ContrastiveSearch, DiverseBeamSearch, EarlyStopping, GridBeamSearch,
    NeuroLogic, Search, Smc, Speculative, StochasticBeamSearch,
};

pub struct Way {
    pub name: &'static str,
    pub make: fn(&TextModel) -> Box<dyn Search>,
    /// Completions of each prompt.
    pub n: usize,
}

fn way(name: &'static str, n: usize, make: fn(&TextModel) -> Box<dyn Search>) -> Way {
    Way { name, make, n }
}

/// Clauses that are met by the way: what is looked at is how the search goes with the controls.
fn clauses(model: &TextModel) -> Clauses {
    Clauses::new(&model.token_trie().unwrap(), [Clause::any(["!sky", "sea"])]).unwrap()
}

fn beams(num_beams: usize) -> BeamSearch {
    BeamSearch::new(num_beams).unwrap()
}

pub fn all() -> Vec<Way> {
    vec![
        way("greedy", 2, |_| Box::new(Choice::Greedy)),
        way("sampling", 2, |_| Box::new(Choice::Sample { seed: 5, first: 0 })),
        way("beam search", 2, |_| Box::new(beams(3))),
        way("beam search to the end", 2, |_| Box::new(beams(3).early_stopping(EarlyStopping::Exhausted))),
        way("diverse beam search", 2, |_| Box::new(DiverseBeamSearch::new(beams(4), 2, 0.5).unwrap())),
        way("stochastic beam search", 2, |_| Box::new(StochasticBeamSearch::new(3, 5).unwrap())),
        way("contrastive search", 1, |_| Box::new(ContrastiveSearch::new(0.6, 4).unwrap())),
        way("best of n", 2, |_| Box::new(BestOf::new(4, 5).unwrap())),
        way("sequential Monte Carlo", 2, |_| Box::new(Smc::new(8, 5).unwrap())),
        way("prompt look-up, sampled", 2, |_| {
            let sampled = Choice::Sample { seed: 5, first: 0 };
            Box::new(Speculative::prompt_lookup(sampled, 2, 3).unwrap())
        }),
        way("a draft model, greedy", 1, |model| {
            Box::new(Speculative::draft_model(Choice::Greedy, model.lm().handle(), 3).unwrap())
        }),
        way("NeuroLogic", 2, |model| Box::new(NeuroLogic::new(beams(4), clauses(model)))),
        way("NeuroLogic with look-ahead", 2, |model| {
            Box::new(NeuroLogic::new(beams(4), clauses(model)).look_ahead(2, 1.0).unwrap())
        }),
        way("grid beam search", 2, |model| Box::new(GridBeamSearch::new(beams(4), clauses(model)))),
    ]
}
