//! What searches by beams share: all beams of all prompts in one batch, whose rows fork and are dropped.

mod rule;
mod set;

use std::collections::HashSet;
use std::iter;
use std::ops::Range;

use controlgen_core::progress::Flow;
use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::{Kind, Tensor};

use super::beam::BeamSearch;
use super::diverse_beam::Taken;
use super::{After, Chosen, Finish, Hypothesis, Listener, Live, Task, rows_of};
use crate::controls::{dims, in_vocabulary, to_vec};
use set::in_order;

pub(super) use rule::{ByScore, Candidate, Pick, Pool, Rule, Sight};
pub(super) use set::{Beam, Beams};

/// What is searched for: `groups` groups of beams a prompt.
pub(super) struct Plan {
    /// The search of each group.
    pub(super) beams: BeamSearch,
    pub(super) groups: usize,
    /// What a token costs for each beam of an earlier group that just chose it.
    pub(super) diversity_penalty: f64,
}

impl Plan {
    /// One group a prompt.
    pub(super) fn ungrouped(beams: BeamSearch) -> Self {
        Self { beams, groups: 1, diversity_penalty: 0.0 }
    }

    fn validate(&self, task: &Task<'_>) -> Result<()> {
        task.validate()?;
        let all = self.beams.num_beams.saturating_mul(self.groups);
        rows_of("num_beams", task.prompts.len(), all)?;
        if task.n > all {
            let expected = format!("at most num_beams = {all}");
            return Err(Error::value("n, completions of each prompt", expected, task.n));
        }
        Ok(())
    }

    /// How many candidates a group looks at: enough to go on with, even if each of its beams can end in every way.
    pub(super) fn candidates(&self, task: &Task<'_>) -> usize {
        let mut ends = task.eos.to_vec();
        ends.sort_unstable();
        ends.dedup();
        self.beams.num_beams.saturating_mul((1 + ends.len()).max(2))
    }
}

pub(super) fn run<R: Rule>(
    task: &Task<'_>,
    plan: &Plan,
    rule: &R,
    listener: &mut dyn Listener,
) -> Result<Vec<Hypothesis>> {
    let _guard = tch::no_grad_guard();
    plan.validate(task)?;
    let mut live = Live::start(task)?;
    let (groups, openings) = (plan.groups, task.openings());
    // The groups of a prompt stand together, and read its row until they have rows of their own.
    let of_prompt = |i: usize| {
        let prompt = i.div_euclid(groups);
        Ok(Beams::new(prompt, prompt, rule.start(prompt, &openings[prompt])?))
    };
    let mut sets = (0..task.prompts.len() * groups).map(of_prompt).collect::<Result<Vec<_>>>()?;
    let room = usize::try_from(live.room(task)?).unwrap_or(0);
    let longest = task.max_new_tokens.min(room + 1);
    let end = if longest < task.max_new_tokens { Finish::Context } else { Finish::Length };

    for step in 0..longest {
        let best = Best::of(task, plan, rule, &sets, &mut live)?;
        best.check(&sets, step)?;
        let last = (step + 1 == longest).then_some(&end);
        let sight = Sight { task, plan, live: &live, left: longest - step };
        let Forks { going, ending } = choose(&sight, rule, &mut sets, &best, last, listener)?;
        advance(task, &mut live, &going, &ending)?;
        let chosen = going.len() + ending.len();
        for (row, (fork, ended)) in iter::zip(going.len().., ending) {
            let log_weight = task.controls.finish(&live.controls, row)?;
            sets[fork.set].finish(&plan.beams, ended, log_weight)?;
        }
        for set in sets.iter_mut().filter(|set| !set.is_over()) {
            set.settle(&plan.beams, step + 1, longest);
        }
        let lost = |sets: &&[Beams<R::Memo>]| sets.iter().all(|set| set.is_over() && !set.has_finished());
        if let Some(set) = sets.chunks(groups).find(lost).and_then(<[_]>::first) {
            return Err(Error::AllBanned { row: set.prompt, step });
        }
        if listener.step(chosen as u64) == Flow::Stop {
            finish_all(task, plan, rule, &live, &mut sets, &Finish::Cancelled)?;
        }
        let kept: Vec<usize> =
            sets.iter_mut().flat_map(|set| &mut set.running).enumerate().map(renumber).collect();
        if kept.is_empty() {
            break;
        }
        follow(task, &mut live, listener, &kept, &going, chosen)?;
    }
    finish_all(task, plan, rule, &live, &mut sets, &end)?;

    let mut all = Vec::with_capacity(task.prompts.len() * task.n);
    let mut sets = sets.into_iter().peekable();
    while let Some(prompt) = sets.peek().map(|set| set.prompt) {
        let mut found: Vec<Hypothesis> = iter::from_fn(|| sets.next_if(|set| set.prompt == prompt))
            .flat_map(Beams::into_finished)
            .collect();
        found.sort_by(in_order);
        found.truncate(task.n);
        all.extend(iter::zip(0.., found).map(|(sample, found)| Hypothesis { sample, ..found }));
    }
    Ok(all)
}

/// What is known of the tokens that may follow each row.
struct Best {
    rows: usize,
    /// How many of the best there are of each row.
    k: usize,
    /// k of the first row come first, best first; after all rows, the tokens that were wanted besides.
    tokens: Vec<i64>,
    /// Their scores under the model and its controls, not normalised again.
    scores: Vec<f32>,
    /// Under the model alone.
    logprobs: Vec<f32>,
    /// Where each row's tokens that were wanted besides begin; one more than there are rows.
    besides: Vec<usize>,
}

impl Best {
    fn of<R: Rule>(
        task: &Task<'_>,
        plan: &Plan,
        rule: &R,
        sets: &[Beams<R::Memo>],
        live: &mut Live,
    ) -> Result<Self> {
        // With all tokens that a group is to avoid among the best, enough others are left.
        let avoided = (plan.groups - 1).saturating_mul(plan.beams.num_beams);
        let k = i64::try_from(plan.candidates(task).saturating_add(avoided)).unwrap_or(i64::MAX);
        let own = live.logits.f_log_softmax(-1, Kind::Float)?; // (R, V)
        let scores = if task.controls.is_empty() {
            own.shallow_clone()
        } else {
            task.controls.score(&mut live.controls, own.f_detach_copy()?)?
        };
        let (rows, vocab) = dims(&scores)?;
        let (best, tokens) = scores.f_topk(k.min(vocab), -1, true, true)?; // (R, k)
        let logprobs = own.f_gather(-1, &tokens, false)?;
        let mut all = Self {
            rows: usize::try_from(rows).unwrap_or(0),
            k: usize::try_from(k.min(vocab)).unwrap_or(0),
            tokens: Vec::try_from(tokens.f_flatten(0, -1)?)?,
            scores: to_vec(&best)?,
            logprobs: to_vec(&logprobs)?,
            besides: Vec::new(),
        };
        let cells = all.want(rule, sets, vocab)?;
        if !cells.is_empty() {
            let cells = Tensor::f_from_slice(&cells)?.f_to_device(scores.device())?;
            all.scores.extend(to_vec(&scores.f_take(&cells)?)?);
            all.logprobs.extend(to_vec(&own.f_take(&cells)?)?);
        }
        Ok(all)
    }

    /// Adds the tokens that the rule wants and the best are not, and tells their cells, row · V + token.
    fn want<R: Rule>(&mut self, rule: &R, sets: &[Beams<R::Memo>], vocab: i64) -> Result<Vec<i64>> {
        let mut wanted = vec![Vec::new(); self.rows];
        for Beam { row, memo, .. } in sets.iter().flat_map(|set| &set.running) {
            let mut tokens = rule.wanted(memo)?;
            tokens.sort_unstable();
            tokens.dedup();
            tokens.iter().try_for_each(|&token| in_vocabulary("wanted token", token, vocab))?;
            // Groups read one row as long as they have said nothing: they want the same of it.
            wanted[*row] = tokens;
        }
        let mut cells = Vec::new();
        for (row, tokens) in iter::zip(0i64.., wanted) {
            self.besides.push(self.tokens.len());
            let best: HashSet<i64> = self.tokens[self.of_row(row as usize)].iter().copied().collect();
            for token in tokens.into_iter().filter(|token| !best.contains(token)) {
                self.tokens.push(token);
                cells.push(row * vocab + token);
            }
        }
        self.besides.push(self.tokens.len());
        Ok(cells)
    }

    /// Where a row's best are.
    fn of_row(&self, row: usize) -> Range<usize> {
        row * self.k..(row + 1) * self.k
    }

    /// Refuses scores that are no numbers: they come first.
    fn check<M>(&self, sets: &[Beams<M>], step: usize) -> Result<()> {
        for set in sets {
            for beam in &set.running {
                let best = self.scores[beam.row * self.k];
                if best.is_nan() || best == f32::INFINITY {
                    let found = if best.is_nan() { "NaN" } else { "infinity" };
                    let at = format!("prompt {}, step {step}", set.prompt);
                    return Err(Error::NotFinite { what: "logits".into(), at, found: found.into() });
                }
            }
        }
        Ok(())
    }

    /// The candidates of a group, best first.
    fn candidates<M>(&self, plan: &Plan, set: &Beams<M>, taken: &Taken) -> Vec<Candidate> {
        let mut all = Vec::with_capacity(set.running.len() * self.k);
        for (beam, Beam { row, so_far, .. }) in set.running.iter().enumerate() {
            for at in self.of_row(*row).chain(self.besides[*row]..self.besides[row + 1]) {
                let token = self.tokens[at];
                let penalty = plan.diversity_penalty * taken.count(token) as f64;
                let score = so_far.score + f64::from(self.scores[at]) - penalty;
                if score.is_finite() {
                    all.push(Candidate { beam, token, score, logprob: self.logprobs[at].into() });
                }
            }
        }
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all
    }
}

/// A row that a token was added to.
struct Fork {
    /// Whose it is, by number.
    set: usize,
    /// The row of the batch that it forked from.
    parent: usize,
    /// The listener's row.
    told: usize,
    token: i64,
}

/// What a step made.
struct Forks {
    /// Those that go on; [`Beam::row`] counts them.
    going: Vec<Fork>,
    /// Those that have ended; their score is still the sum.
    ending: Vec<(Fork, Hypothesis)>,
}

/// Chooses what goes on and what ends, group after group; all do where this step is the `last`.
fn choose<R: Rule>(
    sight: &Sight<'_>,
    rule: &R,
    sets: &mut [Beams<R::Memo>],
    best: &Best,
    last: Option<&Finish>,
    listener: &mut dyn Listener,
) -> Result<Forks> {
    let (task, plan) = (sight.task, sight.plan);
    let num_beams = plan.beams.num_beams;
    let mut forks = Forks { going: Vec::new(), ending: Vec::new() };
    let mut taken: Vec<Taken> = task.prompts.iter().map(|_| Taken::default()).collect();
    // Rows that the listener has: those of the batch, then a fork for each candidate that it is asked about.
    let mut told = best.rows;
    for group in 0..plan.groups {
        let of_group: Vec<usize> =
            (group..sets.len()).step_by(plan.groups).filter(|&set| !sets[set].is_over()).collect();
        let pool = |&set: &usize| {
            let set = &sets[set];
            Pool { set, candidates: best.candidates(plan, set, &taken[set.prompt]) }
        };
        let picks = rule.choose(sight, of_group.iter().map(pool).collect())?;
        let asked =
            iter::zip(&of_group, &picks).flat_map(|(set, all)| all.iter().map(move |pick| (set, pick)));
        let asked = asked.filter(|(_, pick)| !task.eos.contains(&pick.candidate.token));
        let parents = asked.map(|(&set, pick)| sets[set].running[pick.candidate.beam].row);
        let rows: Vec<i64> = (0..told).chain(parents).map(|row| row as i64).collect();
        listener.reorder(&rows)?;

        for (set, picks) in iter::zip(of_group, picks) {
            let mut running = Vec::with_capacity(num_beams);
            for (rank, Pick { candidate, memo }) in picks.into_iter().enumerate() {
                let token = candidate.token;
                let fork = Fork { set, parent: sets[set].running[candidate.beam].row, told, token };
                let ends = task.eos.contains(&token);
                told += usize::from(!ends);
                if rank >= num_beams && (ends || running.len() == num_beams) {
                    continue;
                }
                let mut so_far = sets[set].extended(&candidate, ends.then_some(Finish::Eos(token)));
                if !ends {
                    let after = listener.token(Chosen { so_far: &so_far, token, row: fork.told })?;
                    let finish = if after == After::Finish { Some(&Finish::Stopped) } else { last };
                    if finish.map_or(running.len(), |_| rank) >= num_beams {
                        continue;
                    }
                    if after == After::Continue {
                        taken[sets[set].prompt].add(token);
                    }
                    let Some(finish) = finish else {
                        running.push(Beam { row: forks.going.len(), so_far, memo });
                        forks.going.push(fork);
                        continue;
                    };
                    so_far.finish = finish.clone();
                }
                so_far.unmet = rule.unmet(&memo);
                forks.ending.push((fork, so_far));
            }
            sets[set].running = running;
        }
    }
    Ok(forks)
}

/// Lets the controls' rows follow: first those that go on, then those that have ended, each with its token.
fn advance(task: &Task<'_>, live: &mut Live, going: &[Fork], ending: &[(Fork, Hypothesis)]) -> Result<()> {
    let forks = || going.iter().chain(ending.iter().map(|(fork, _)| fork));
    if task.controls.is_empty() || forks().next().is_none() {
        return Ok(());
    }
    let rows: Vec<i64> = forks().map(|fork| fork.parent as i64).collect();
    if !(0..live.state.rows()).eq(rows.iter().copied()) {
        live.controls.reorder(&rows)?;
    }
    task.controls.advance(&mut live.controls, &forks().map(|fork| fork.token).collect::<Vec<_>>())
}

/// Lets everything else follow the forks that are `kept`, of as many as were `chosen`, and reads their tokens.
fn follow(
    task: &Task<'_>,
    live: &mut Live,
    listener: &mut dyn Listener,
    kept: &[usize],
    going: &[Fork],
    chosen: usize,
) -> Result<()> {
    let rows = |of: &dyn Fn(usize) -> usize| kept.iter().map(|&i| of(i) as i64).collect::<Vec<_>>();
    if !task.controls.is_empty() && !(0..chosen).eq(kept.iter().copied()) {
        live.controls.reorder(&rows(&|i| i))?;
    }
    listener.reorder(&rows(&|i| going[i].told))?;
    live.reorder_read(&rows(&|i| going[i].parent))?;
    live.extend(task, &kept.iter().map(|&i| going[i].token).collect::<Vec<_>>())
}

/// Gives a beam the row that it has in what is left; the row that it had.
fn renumber<M>((row, beam): (usize, &mut Beam<M>)) -> usize {
    std::mem::replace(&mut beam.row, row)
}

/// Ends all that goes on.
fn finish_all<R: Rule>(
    task: &Task<'_>,
    plan: &Plan,
    rule: &R,
    live: &Live,
    sets: &mut [Beams<R::Memo>],
    finish: &Finish,
) -> Result<()> {
    for set in sets {
        for Beam { row, so_far, memo } in std::mem::take(&mut set.running) {
            let log_weight = task.controls.finish(&live.controls, row)?;
            let ended = Hypothesis { finish: finish.clone(), unmet: rule.unmet(&memo), ..so_far };
            set.finish(&plan.beams, ended, log_weight)?;
        }
        set.settle(&plan.beams, 0, 0);
    }
    Ok(())
}
