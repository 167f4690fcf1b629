//! What tells one search by beams from another.

use controlgen_core::Result;

use super::{Beams, Plan};
use crate::search::{Live, Task};

/// A token that may follow a beam.
#[derive(Clone, Copy, Debug)]
pub(in crate::search) struct Candidate {
    /// Which of the running ones.
    pub(in crate::search) beam: usize,
    pub(in crate::search) token: i64,
    /// The whole hypothesis' sum of scores.
    pub(in crate::search) score: f64,
    /// Of the token, under the model alone.
    pub(in crate::search) logprob: f64,
}

/// A candidate that is taken, with what the rule remembers of the hypothesis that it makes.
pub(in crate::search) struct Pick<M> {
    pub(in crate::search) candidate: Candidate,
    pub(in crate::search) memo: M,
}

/// The candidates of one group of beams, best first.
pub(in crate::search) struct Pool<'s, M> {
    pub(in crate::search) set: &'s Beams<M>,
    pub(in crate::search) candidates: Vec<Candidate>,
}

/// What a rule may look at while it chooses.
pub(in crate::search) struct Sight<'s> {
    pub(in crate::search) task: &'s Task<'s>,
    pub(in crate::search) plan: &'s Plan,
    /// The rows as they are before the step's tokens: a beam's is [`Beam::row`](super::Beam::row).
    pub(in crate::search) live: &'s Live,
    /// How many tokens more a hypothesis may have, this step's included.
    pub(in crate::search) left: usize,
}

/// A rule by which candidates become hypotheses.
pub(in crate::search) trait Rule {
    /// What it remembers of a hypothesis beside its tokens and its score.
    type Memo: Clone;

    /// Of a prompt's completion of which nothing is said yet.
    fn start(&self, prompt: usize, ids: &[i64]) -> Result<Self::Memo>;

    /// Tokens that are candidates after this hypothesis, whatever their scores.
    fn wanted(&self, memo: &Self::Memo) -> Result<Vec<i64>> {
        let _ = memo;
        Ok(Vec::new())
    }

    /// What is taken of each pool, most wanted first: of the first `num_beams`, those that end are finished; the first
    /// `num_beams` that do not end go on. A rule cuts its list at [`Plan::candidates`] or earlier: each one that does
    /// not end may cost the listener a row. The memo of one that ends is that of the hypothesis without the token that
    /// ends it.
    fn choose(
        &self,
        sight: &Sight<'_>,
        pools: Vec<Pool<'_, Self::Memo>>,
    ) -> Result<Vec<Vec<Pick<Self::Memo>>>>;

    /// The clauses that a hypothesis which ends here leaves unmet, by number. The fewer, the better it is, whatever its
    /// score; a search goes on while there are any.
    fn unmet(&self, memo: &Self::Memo) -> Vec<usize> {
        let _ = memo;
        Vec::new()
    }
}

/// The best scores win.
pub(in crate::search) struct ByScore;

impl Rule for ByScore {
    type Memo = ();

    fn start(&self, _prompt: usize, _ids: &[i64]) -> Result<()> {
        Ok(())
    }

    fn choose(&self, sight: &Sight<'_>, pools: Vec<Pool<'_, ()>>) -> Result<Vec<Vec<Pick<()>>>> {
        let most = sight.plan.candidates(sight.task);
        let pick = |candidate| Pick { candidate, memo: () };
        Ok(pools.into_iter().map(|pool| pool.candidates.into_iter().take(most).map(pick).collect()).collect())
    }
}
