//! Grid beam search: beams in banks by how much of the constraints they have said.

use controlgen_core::Result;

use super::beam::BeamSearch;
use super::beams::{Pick, Plan, Pool, Rule, Sight, run};
use super::clause_beams::{Memo, in_turn};
use super::{Hypothesis, Listener, Search, Task};
use crate::lexical::ClausesOf;

/// Beam search for texts that make [`Clauses`](crate::lexical::Clauses) hold, with the beams in banks by how many
/// tokens of the constraints they have said. Hokamp and Liu, "Lexically Constrained Decoding for Sequence Generation
/// Using Grid Beam Search" (ACL 2017), with the beams allocated dynamically: Post and Vilar, "Fast Lexically Constrained
/// Decoding with Dynamic Beam Allocation for Neural Machine Translation" (NAACL 2018), algorithm 1.
///
/// In each step the candidates are the best tokens after each hypothesis, and, whatever their scores, the tokens that
/// begin or continue a word of a clause that does not hold yet; those that lose a clause for good are dropped, and those
/// that end the text while a clause does not hold. With C tokens in all words that the clauses need, a hypothesis is in
/// bank c if it lacks C − c of them; what was begun and not gone on with is lacking again. The banks take turns with
/// their best-scored candidates until the beams are used up: each has num_beams / (C + 1) of them, and what one does not
/// need goes to the others, the fullest first.
///
/// Clauses of several phrases are disjunctive constraints, of which the nearest counts; counts, orders and negative
/// literals are as in [`NeuroLogic`](super::NeuroLogic), which parts hypotheses by *which* clauses they have met and
/// not by how much. Where the length does not suffice, the best is kept and [`Hypothesis::unmet`] says what it lacks.
///
/// ```no_run
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::lexical::{Clause, Clauses};
/// use controlgen_text::search::{BeamSearch, GridBeamSearch};
/// use controlgen_text::words::TokenTrie;
///
/// fn main() -> Result<()> {
///     let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
///     let clauses = Clauses::new(&TokenTrie::new(model.tokenizer())?, [
///         Clause::any(["dog", "dogs"]),
///         Clause::any(["frisbee", "frisbees"]),
///         Clause::any(["catch", "catches", "caught", "catching"]),
///         Clause::any(["throw", "throws", "threw", "thrown", "throwing"]),
///     ])?;
///     let search = GridBeamSearch::new(BeamSearch::new(20)?, clauses);
///     let generation = model.generate("Once upon a time").search(search).max_new_tokens(32).run()?;
///     println!("{}", generation.text());
///     // , Frisbee threw a ball into the air and caught it. The dog chased the ball, but the dog didn't catch the ball.
///     // The next day
///     Ok(())
/// }
/// ```
///
/// *Cost*: that of beam search, whatever C; num_beams should be more than C.
#[derive(Clone, Debug)]
pub struct GridBeamSearch {
    beams: BeamSearch,
    clauses: ClausesOf,
}

impl GridBeamSearch {
    /// Beams, and the clauses of all prompts, or of each ([`ClausesOf`]).
    #[must_use]
    pub fn new(beams: BeamSearch, clauses: impl Into<ClausesOf>) -> Self {
        Self { beams, clauses: clauses.into() }
    }
}

/// Completes each prompt with the best `task.n` hypotheses, those with the fewest clauses unmet first.
///
/// More completions than beams are refused, and sets of clauses that are not one for each prompt or one for all;
/// [`Error::AllBanned`](controlgen_core::Error::AllBanned) names the prompt of which no hypothesis is left.
impl Search for GridBeamSearch {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        self.clauses.check(task.prompts.len())?;
        run(task, &Plan::ungrouped(self.beams), self, listener)
    }
}

impl Rule for GridBeamSearch {
    type Memo = Memo;

    fn start(&self, prompt: usize, ids: &[i64]) -> Result<Memo> {
        self.clauses.memo(prompt, self.clauses.get(prompt)?.start(ids))
    }

    fn wanted(&self, memo: &Memo) -> Result<Vec<i64>> {
        self.clauses.wanted(memo)
    }

    fn choose(&self, sight: &Sight<'_>, pools: Vec<Pool<'_, Memo>>) -> Result<Vec<Vec<Pick<Memo>>>> {
        let most = sight.plan.candidates(sight.task);
        let of_pool = |pool: Pool<'_, Memo>| {
            let clauses = self.clauses.get(pool.set.prompt)?;
            let mut choices = self.clauses.choices(sight, pool, 0.0)?;
            let lacking = |memo: &Memo| clauses.need(&memo.progress, 0).unwrap_or(usize::MAX);
            choices.sort_by(|a, b| b.rank.total_cmp(&a.rank));
            choices.sort_by_cached_key(|choice| lacking(&choice.pick.memo));
            let choices = in_turn(choices, most, |memo| (0, lacking(memo)));
            Ok(choices.into_iter().map(|choice| choice.pick).collect())
        };
        pools.into_iter().map(of_pool).collect()
    }

    fn unmet(&self, memo: &Memo) -> Vec<usize> {
        self.clauses.unmet(memo)
    }
}
