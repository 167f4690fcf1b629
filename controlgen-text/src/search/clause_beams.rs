//! What searches by beams for clauses share.

use std::collections::HashMap;
use std::hash::Hash;

use controlgen_core::Result;

use super::beams::{Beam, Pick, Pool, Sight};
use crate::lexical::{ClauseSet, ClausesOf, Progress};

/// How far a hypothesis has come.
#[derive(Clone)]
pub(super) struct Memo {
    pub(super) prompt: usize,
    pub(super) progress: Progress,
    /// The clauses that hold if it ends here, those of which a word has begun, and those that it would lose by ending.
    pub(super) held: ClauseSet,
    pub(super) begun: ClauseSet,
    lost_by_ending: ClauseSet,
}

/// A candidate that may be taken.
pub(super) struct Choice {
    pub(super) pick: Pick<Memo>,
    /// What it is ranked by.
    pub(super) rank: f64,
    pub(super) ends: bool,
    /// The row that it follows.
    pub(super) row: usize,
}

impl ClausesOf {
    pub(super) fn memo(&self, prompt: usize, progress: Progress) -> Result<Memo> {
        let clauses = self.get(prompt)?;
        let (held, lost_by_ending) = clauses.ended(&progress);
        let begun = clauses.begun(&progress, held);
        Ok(Memo { prompt, progress, held, begun, lost_by_ending })
    }

    /// The candidates of a pool that lose no clause, with a reward for the word at the end.
    pub(super) fn choices(
        &self,
        sight: &Sight<'_>,
        pool: Pool<'_, Memo>,
        reward: f64,
    ) -> Result<Vec<Choice>> {
        let clauses = self.get(pool.set.prompt)?;
        let mut choices = Vec::with_capacity(pool.candidates.len());
        for candidate in pool.candidates {
            let Beam { row, memo: before, .. } = &pool.set.running[candidate.beam];
            let ends = sight.task.eos.contains(&candidate.token);
            let memo = if ends {
                before.clone()
            } else {
                let mut progress = before.progress.clone();
                clauses.advance(&mut progress, candidate.token);
                self.memo(before.prompt, progress)?
            };
            let lost = if ends { memo.lost_by_ending } else { memo.progress.lost() };
            if !lost.is_empty() || ends && memo.held != clauses.all() {
                continue;
            }
            let share = if reward > 0.0 { clauses.most_coming(&memo.progress, memo.held) } else { 0.0 };
            let rank = candidate.score + reward * share;
            choices.push(Choice { pick: Pick { candidate, memo }, rank, ends, row: *row });
        }
        Ok(choices)
    }

    /// The tokens that lead to a word of a clause that does not hold.
    pub(super) fn wanted(&self, memo: &Memo) -> Result<Vec<i64>> {
        Ok(self.get(memo.prompt)?.leads(&memo.progress, memo.held))
    }

    /// The clauses that do not hold of a hypothesis which ends here.
    pub(super) fn unmet(&self, memo: &Memo) -> Vec<usize> {
        self.get(memo.prompt)
            .map_or_else(|_| Vec::new(), |clauses| clauses.all().without(memo.held).iter().collect())
    }
}

/// The first of each group in turn, at most `most`. `of` tells a hypothesis' bank and its group within it: of the groups
/// that have had as many turns, first come those that are the first of their banks. Those that end are groups of their
/// own, since a step takes no more of them than it has beams.
pub(super) fn in_turn<G: Hash + Eq>(
    choices: Vec<Choice>,
    most: usize,
    of: impl Fn(&Memo) -> (usize, G),
) -> Vec<Choice> {
    let mut groups: HashMap<(G, bool), (usize, usize)> = HashMap::new();
    let mut banks: HashMap<usize, usize> = HashMap::new();
    let mut turns = Vec::with_capacity(choices.len());
    for choice in choices {
        let (bank, group) = of(&choice.pick.memo);
        let (turn, group) = groups.entry((group, choice.ends)).or_insert_with(|| {
            let groups = banks.entry(bank).or_default();
            *groups += 1;
            (0, *groups)
        });
        turns.push(((*turn, *group), choice));
        *turn += 1;
    }
    // Stable: else the order stays.
    turns.sort_by_key(|(turn, _)| *turn);
    turns.truncate(most);
    turns.into_iter().map(|(_, choice)| choice).collect()
}
