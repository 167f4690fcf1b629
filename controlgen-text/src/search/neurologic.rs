//! NeuroLogic decoding: beams kept apart by the clauses that they have met.

use controlgen_core::{Error, Result};

use super::beam::BeamSearch;
use super::beams::{Pick, Plan, Pool, Rule, Sight, run};
use super::clause_beams::{Choice, Memo, in_turn};
use super::look_ahead::LookAhead;
use super::{Hypothesis, Listener, Search, Task};
use crate::lexical::ClausesOf;

/// Beam search for texts that make [`Clauses`](crate::lexical::Clauses) hold. Lu, West, Zellers, Le Bras, Bhagavatula
/// and Choi, "NeuroLogic Decoding: (Un)supervised Neural Text Generation with Predicate Logic Constraints" (NAACL
/// 2021), section 2.3.
///
/// In each step the candidates are the best tokens after each hypothesis, and, whatever their scores, the tokens that
/// begin or continue a word of a clause that does not hold yet. Of these
/// 1. those that lose a clause for good are dropped, and those that end the text while a clause does not hold;
/// 2. those that are behind are dropped: with m clauses, at token t of T, those of which fewer hold than
///    min(the most that do, m t / T') − tolerance · (1 − t / T'), with T' = T − `gap`;
/// 3. the rest is grouped by the set of clauses that hold, and by that of those whose words have begun, and the best of each group are taken in turn, so that
///    hypotheses which have come to say a word do not have to compete with those that have not.
///
/// Within a group, the best is by
///
/// ```text
/// Σ log p  +  λ · max over clauses that do not hold of (share of the word's characters that stand at the end)
/// ```
///
/// the paper's equation 4, with characters instead of tokens, so that all tokenisations of a word count. The
/// hypothesis' own score has no reward in it. Among the finished, fewer clauses unmet come first, then the score, as
/// in [`BeamSearch`]; where the length does not suffice, the best is kept and [`Hypothesis::unmet`] says what it lacks.
///
/// Two things are not the paper's. Its second rule drops all of which fewer clauses hold than the most that do, less
/// the tolerance, at once; as some hypothesis meets all clauses in the first few tokens, by saying the words one after
/// the other, that leaves nothing else. Here a hypothesis has until its share of the length. And its groups take
/// turns from the best-scored on; here first those come that are the best of as many clauses, so that with ten clauses
/// and a thousand sets the beams are not all used up by sets of few clauses.
///
/// Like all beams it finds the likeliest texts, which are much alike. Under [`GumbelNoise`](crate::controls::GumbelNoise)
/// each seed finds another one.
///
/// With [`look_ahead`](Self::look_ahead): Lu et al., "NeuroLogic A*esque Decoding: Constrained Text Generation with
/// Lookahead Heuristics" (NAACL 2022), section 3.
///
/// ```no_run
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::lexical::{Clause, Clauses};
/// use controlgen_text::search::{BeamSearch, NeuroLogic};
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
///     let search = NeuroLogic::new(BeamSearch::new(20)?, clauses);
///     let generation = model.generate("Once upon a time").search(search).max_new_tokens(32).run()?;
///     println!("{}", generation.text());
///     // , I had a dog named Max. He was always throwing frisbees into the air, and I had to catch him multiple times to
///     // keep up with the
///     assert!(generation.completions[0].unmet.is_empty());
///     Ok(())
/// }
/// ```
///
/// *Cost*: that of beam search, and for each hypothesis a few tokens more to look at, some six a word; measured by
/// `neurologic-step` in the repository's benches.
#[derive(Clone, Debug)]
pub struct NeuroLogic {
    beams: BeamSearch,
    clauses: ClausesOf,
    tolerance: usize,
    gap: usize,
    reward: f64,
    look_ahead: Option<LookAhead>,
}

impl NeuroLogic {
    /// Beams, and the clauses of all prompts, or of each ([`ClausesOf`]). A tolerance of 2 clauses, a gap of 4 tokens,
    /// a reward of 1.25 nats, no look-ahead.
    #[must_use]
    pub fn new(beams: BeamSearch, clauses: impl Into<ClausesOf>) -> Self {
        Self { beams, clauses: clauses.into(), tolerance: 2, gap: 4, reward: 1.25, look_ahead: None }
    }

    /// By how many clauses a hypothesis may be behind, at the beginning.
    #[must_use]
    pub fn tolerance(self, tolerance: usize) -> Self {
        Self { tolerance, ..self }
    }

    /// How many tokens before the greatest length all clauses should hold, so that the text can come to an end.
    #[must_use]
    pub fn gap(self, gap: usize) -> Self {
        Self { gap, ..self }
    }

    /// The reward λ for the part of a word that stands at the end, in nats.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is negative or no finite number.
    pub fn reward(self, reward: f64) -> Result<Self> {
        if !(reward.is_finite() && reward >= 0.0) {
            return Err(Error::value("reward", "a finite number >= 0", reward));
        }
        Ok(Self { reward, ..self })
    }

    /// Adds to the reward how likely the words that are missing come in the next `tokens` tokens: a candidate is
    /// continued greedily, and gains `weight` · max over clauses that do not hold and over the continuation's tokens of
    /// log p(a token that begins or continues the clause's word).
    ///
    /// *Cost*: in each step `tokens` passes of the model more, with two rows for each beam.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens, and for a weight that is negative or no finite number.
    pub fn look_ahead(self, tokens: usize, weight: f64) -> Result<Self> {
        Ok(Self { look_ahead: Some(LookAhead::new(tokens, weight)?), ..self })
    }
}

/// Completes each prompt with the best `task.n` hypotheses, those with the fewest clauses unmet first.
///
/// More completions than beams are refused, and sets of clauses that are not one for each prompt or one for all;
/// [`Error::AllBanned`] names the prompt of which no hypothesis is left.
impl Search for NeuroLogic {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        self.clauses.check(task.prompts.len())?;
        run(task, &Plan::ungrouped(self.beams), self, listener)
    }
}

impl Rule for NeuroLogic {
    type Memo = Memo;

    fn start(&self, prompt: usize, ids: &[i64]) -> Result<Memo> {
        self.clauses.memo(prompt, self.clauses.get(prompt)?.start(ids))
    }

    fn wanted(&self, memo: &Memo) -> Result<Vec<i64>> {
        self.clauses.wanted(memo)
    }

    fn choose(&self, sight: &Sight<'_>, pools: Vec<Pool<'_, Memo>>) -> Result<Vec<Vec<Pick<Memo>>>> {
        let mut all = Vec::with_capacity(pools.len());
        for pool in pools {
            let (said, m) = (
                pool.set.running.first().map_or(0, |beam| beam.so_far.ids.len()),
                self.clauses.get(pool.set.prompt)?.len(),
            );
            let mut choices = self.clauses.choices(sight, pool, self.reward)?;
            let most = choices.iter().map(|choice| choice.pick.memo.held.len()).max().unwrap_or(0);
            let due = (said + sight.left).saturating_sub(self.gap).max(1);
            let come = ((said + 1) as f64 / due as f64).min(1.0);
            let least = (m as f64 * come).min(most as f64) - self.tolerance as f64 * (1.0 - come);
            choices.retain(|choice| choice.pick.memo.held.len() as f64 >= least - 1e-9);
            all.push(choices);
        }
        let best_first = |choices: &mut Vec<Choice>| choices.sort_by(|a, b| b.rank.total_cmp(&a.rank));
        let turn = |memo: &Memo| (memo.held.len(), (memo.held, memo.begun));
        let most = sight.plan.candidates(sight.task);
        all.iter_mut().for_each(best_first);
        if let Some(look_ahead) = &self.look_ahead {
            // Two for each beam, of all groups: by rank alone, none that has just said a word would be among them.
            let looked_at = sight.plan.beams.num_beams.saturating_mul(2);
            all = all.into_iter().map(|choices| in_turn(choices, looked_at, turn)).collect();
            look_ahead.rank(sight, &self.clauses, &mut all)?;
            all.iter_mut().for_each(best_first);
        }
        let picks = |choices| in_turn(choices, most, turn).into_iter().map(|choice| choice.pick).collect();
        Ok(all.into_iter().map(picks).collect())
    }

    fn unmet(&self, memo: &Memo) -> Vec<usize> {
        self.clauses.unmet(memo)
    }
}
