//! Controls over the next token that break their contract, each in one place.

use std::sync::{Arc, Mutex};

use controlgen_core::testing::contract;
use controlgen_core::{Bans, PerRow, Result, Role, RowControl, Rows, TokenControl, TokenControls};
use tch::{Kind, Tensor};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Doubles,
    DropsATokensScore,
    Overflows,
    Revives,
    ScoringCounts,
    SharesRuns,
    MixesRows,
    KeepsItsOrder,
    ForksShare,
    CloneForgets,
    CloneOfAnotherRole,
    FinishIsNan,
    FinishByRow,
    ForcesAnyOther,
    BansTheLast,
    BansAfterAll,
}

/// Lowers each token by half its count in the text, and bans what was said three times.
struct Penalty {
    fault: Fault,
    by: f64,
    role: Role,
    /// The texts of the last run that was started.
    last: Arc<Mutex<Vec<Vec<i64>>>>,
}

impl Clone for Penalty {
    fn clone(&self) -> Self {
        let by = if self.fault == Fault::CloneForgets { 0.0 } else { self.by };
        let role = if self.fault == Fault::CloneOfAnotherRole { Role::Proposal } else { self.role };
        Self { by, role, last: Arc::default(), ..*self }
    }
}

struct Texts {
    fault: Fault,
    rows: Vec<Arc<Mutex<Vec<i64>>>>,
    scored: f64,
}

impl Rows for Texts {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let mut rows = rows.to_vec();
        if self.fault == Fault::KeepsItsOrder {
            rows.sort_unstable();
        }
        self.rows.reorder(&rows)?;
        if self.fault != Fault::ForksShare {
            self.rows =
                self.rows.iter().map(|row| Arc::new(Mutex::new(row.lock().unwrap().clone()))).collect();
        }
        Ok(())
    }
}

impl TokenControl for Penalty {
    type State = Texts;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Texts> {
        *self.last.lock().unwrap() = prompts.to_vec();
        let rows = prompts.iter().map(|prompt| Arc::new(Mutex::new(prompt.clone()))).collect();
        Ok(Texts { fault: self.fault, rows, scored: 0.0 })
    }

    fn score(&self, state: &mut Texts, logits: Tensor) -> Result<Tensor> {
        state.scored += 1.0;
        let shared = self.last.lock().unwrap();
        for (i, row) in state.rows.iter().enumerate() {
            let text = match shared.get(i) {
                Some(text) if self.fault == Fault::SharesRuns => text.clone(),
                _ => row.lock().unwrap().clone(),
            };
            for &token in &text {
                let count = text.iter().filter(|&&other| other == token).count();
                let mut score = logits.get(i as i64).narrow(0, token, 1);
                let _ = score.f_sub_scalar_(self.by)?;
                if count >= 3 {
                    let _ = score.f_fill_(f64::NEG_INFINITY)?;
                }
            }
        }
        Ok(match self.fault {
            Fault::Doubles => logits.to_kind(Kind::Double),
            Fault::DropsATokensScore => logits.narrow(1, 0, logits.size()[1] - 1),
            Fault::Overflows => logits.exp(),
            Fault::Revives => logits.clamp_min(-1e9),
            Fault::ScoringCounts => logits * (1.0 + 0.01 * state.scored),
            Fault::MixesRows => &logits - logits.amax([0], true).clamp_min(-1e4) * 0.01,
            _ => logits,
        })
    }

    fn advance(&self, state: &mut Texts, tokens: &[i64]) -> Result<()> {
        for (row, &token) in state.rows.iter().zip(tokens) {
            row.lock().unwrap().push(token);
        }
        for (row, &token) in self.last.lock().unwrap().iter_mut().zip(tokens) {
            row.push(token);
        }
        Ok(())
    }

    fn finish(&self, state: &Texts, row: usize) -> Result<f64> {
        Ok(match self.fault {
            Fault::FinishIsNan => f64::NAN,
            Fault::FinishByRow => -(row as f64),
            _ => -(state.rows[row].lock().unwrap().iter().sum::<i64>() as f64),
        })
    }

    fn role(&self) -> Role {
        self.role
    }

    fn forced(&self, _state: &mut Texts, _row: usize) -> Result<Option<i64>> {
        Ok(Some(3).filter(|_| self.fault == Fault::ForcesAnyOther))
    }

    fn bans(&self) -> Bans {
        match self.fault {
            Fault::BansTheLast => Bans::NotTheLast,
            Fault::BansAfterAll => Bans::Nothing,
            _ => Bans::Any,
        }
    }
}

fn penalty(fault: Fault) -> Penalty {
    Penalty { fault, by: 0.5, role: Role::Potential, last: Arc::default() }
}

/// Bans what was said last.
#[derive(Clone)]
struct NoRepeat;

impl RowControl for NoRepeat {
    type State = Option<i64>;
    fn start(&self, prompt: &[i64]) -> Result<Option<i64>> {
        Ok(prompt.last().copied())
    }
    fn score(&self, state: &Option<i64>, row: &mut Tensor) -> Result<()> {
        if let Some(last) = state {
            let _ = row.f_narrow(0, *last, 1)?.f_fill_(f64::NEG_INFINITY)?;
        }
        Ok(())
    }
    fn advance(&self, state: &mut Option<i64>, token: i64) -> Result<()> {
        *state = Some(token);
        Ok(())
    }
}

#[test]
fn controls_and_stacks_keep_it() {
    contract::token_control(&penalty(Fault::None), 9).unwrap();
    contract::token_control(&PerRow(NoRepeat), 2).unwrap();
    contract::token_control(&TokenControls::new(), 5).unwrap();
    let stack = TokenControls::new().with(PerRow(NoRepeat)).with(penalty(Fault::None));
    contract::token_control(&stack, 7).unwrap();
}

/// Leaves one token alone: the one after the last.
#[derive(Clone)]
struct Counts;

impl TokenControl for Counts {
    type State = Vec<i64>;
    fn start(&self, prompts: &[Vec<i64>]) -> Result<Vec<i64>> {
        Ok(prompts.iter().map(|prompt| prompt.last().copied().unwrap_or(0)).collect())
    }
    fn score(&self, state: &mut Vec<i64>, logits: Tensor) -> Result<Tensor> {
        let only = logits.f_full_like(f64::NEG_INFINITY)?;
        for (row, last) in (0..).zip(state.iter()) {
            let token = (last + 1) % 5;
            let kept = logits.f_get(row)?.f_narrow(0, token, 1)?;
            only.f_get(row)?.f_narrow(0, token, 1)?.f_copy_(&kept)?;
        }
        Ok(only)
    }
    fn advance(&self, state: &mut Vec<i64>, tokens: &[i64]) -> Result<()> {
        *state = tokens.to_vec();
        Ok(())
    }
    fn forced(&self, state: &mut Vec<i64>, row: usize) -> Result<Option<i64>> {
        Ok(Some((state[row] + 1) % 5))
    }
}

/// Keeps half the tokens, by their scores.
#[derive(Clone)]
struct Half;

impl TokenControl for Half {
    type State = ();
    fn start(&self, _prompts: &[Vec<i64>]) -> Result<()> {
        Ok(())
    }
    fn score(&self, _state: &mut (), logits: Tensor) -> Result<Tensor> {
        let middle = logits.f_median_dim(-1, true)?.0;
        Ok(logits.f_masked_fill(&logits.f_lt_tensor(&middle)?, f64::NEG_INFINITY)?)
    }
    fn advance(&self, _state: &mut (), _tokens: &[i64]) -> Result<()> {
        Ok(())
    }
    fn bans(&self) -> Bans {
        Bans::NotTheLast
    }
}

/// Adds to the scores of one token.
#[derive(Clone)]
struct Likes;

impl TokenControl for Likes {
    type State = ();
    fn start(&self, _prompts: &[Vec<i64>]) -> Result<()> {
        Ok(())
    }
    fn score(&self, _state: &mut (), logits: Tensor) -> Result<Tensor> {
        let _ = logits.f_select(1, 2)?.f_add_scalar_(1.0)?;
        Ok(logits)
    }
    fn advance(&self, _state: &mut (), _tokens: &[i64]) -> Result<()> {
        Ok(())
    }
    fn bans(&self) -> Bans {
        Bans::Nothing
    }
}

/// A stack forces what one of it forces only where the others cannot change it.
#[test]
fn stacks_force_where_they_may() {
    let stacks = [
        (true, TokenControls::new().with(Counts)),
        (true, TokenControls::new().with(Likes).with(Counts).with(Half)),
        (
            true,
            TokenControls::new().with(TokenControls::new().with(Likes).with(Counts)).with(Half).with(Likes),
        ),
        (false, TokenControls::new().with(Half).with(Counts)),
        (false, TokenControls::new().with(Counts).with(PerRow(NoRepeat))),
        (false, TokenControls::new().with(PerRow(NoRepeat)).with(Counts)),
        (false, TokenControls::new()),
    ];
    for (i, (forces, stack)) in stacks.iter().enumerate() {
        let mut state = stack.start(&[vec![1], vec![4]]).unwrap();
        let found = [0, 1].map(|row| stack.forced(&mut state, row).unwrap());
        assert_eq!(found, if *forces { [Some(2), Some(0)] } else { [None; 2] }, "stack {i}");
    }
    contract::token_control(&stacks[1].1, 5).unwrap();
    contract::token_control(&stacks[2].1, 5).unwrap();
}

#[test]
fn every_broken_control_is_caught() {
    use Fault::*;
    let broken = [
        ("shape", Doubles),
        ("shape", DropsATokensScore),
        ("finite", Overflows),
        ("bans", Revives),
        ("twice", ScoringCounts),
        ("start", SharesRuns),
        ("rows", MixesRows),
        ("reorder", KeepsItsOrder),
        ("fork", ForksShare),
        ("clone", CloneForgets),
        ("clone", CloneOfAnotherRole),
        ("finish", FinishIsNan),
        ("finish", FinishByRow),
        ("forced", ForcesAnyOther),
        ("forced", BansTheLast),
        ("forced", BansAfterAll),
    ];
    let caught = broken.map(|(clause, fault)| (clause, contract::token_control(&penalty(fault), 9)));
    super::all_caught("token_control", &caught);
}
