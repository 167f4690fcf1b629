//! What every control over the next token keeps.

use tch::{Device, Kind, Tensor};

use super::{
    Breach, Check, Clause, Options, Violation, breach, check, close, demand, noise, on_thread, sized,
};
use crate::noise::Stream;
use crate::{Bans, Result, Rows, TokenControl};

/// The control, and the texts that it follows.
pub struct Case<'a, C> {
    control: &'a C,
    vocab: i64,
    tolerance: f64,
    seed: u64,
    prompts: Vec<Vec<i64>>,
    /// For each of the three rows a text of [`STEPS`] tokens that the control lets pass, as far as it does.
    texts: Vec<Vec<i64>>,
}

/// How many tokens follow the prompts.
const STEPS: usize = 8;

pub fn clauses<'a, C: TokenControl>() -> Vec<Clause<Case<'a, C>>> {
    vec![
        ("shape", shape),
        ("finite", finite),
        ("bans", bans),
        ("twice", twice),
        ("start", start),
        ("rows", rows),
        ("reorder", reorder),
        ("fork", fork),
        ("clone", clone),
        ("finish", finish),
        ("forced", forced),
    ]
}

impl Options {
    /// [`token_control`](super::token_control) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn token_control<C: TokenControl>(&self, control: &C, vocab: i64) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let case = Case::new(control, vocab, self).map_err(|b| b.in_clause("token_control", "shape"))?;
        check("token_control", &clauses(), &case)
    }
}

impl<'a, C: TokenControl> Case<'a, C> {
    fn new(control: &'a C, vocab: i64, options: &Options) -> Result<Self, Breach> {
        demand(vocab >= 2, "a vocabulary of at least 2", vocab)?;
        let mut stream = Stream::new(options.seed, 0);
        let mut draw = |n: i64| stream.index(n as usize) as i64;
        let prompts: Vec<Vec<i64>> =
            [1, 4, 2].map(|len| (0..len).map(|_| draw(vocab)).collect()).into_iter().collect();
        let tolerance = options.tolerance(Kind::Float);
        let mut case =
            Self { control, vocab, tolerance, seed: options.seed, prompts, texts: vec![vec![]; 3] };
        for row in 0..3 {
            let mut state = control.start(&case.prompts[row..=row])?;
            for step in 0..STEPS {
                let scores = control.score(&mut state, case.logits(&[(row, step)])?)?;
                sized("scores", &scores, &[1, vocab])?;
                let allowed = scores.f_gt(f64::NEG_INFINITY)?.f_get(0)?.f_nonzero()?.f_view(-1)?;
                let allowed: Vec<i64> = Vec::try_from(allowed)?;
                if allowed.is_empty() {
                    break; // It has nothing more to say.
                }
                let token = allowed[usize::try_from(draw(allowed.len() as i64)).unwrap_or(0)];
                control.advance(&mut state, &[token])?;
                case.texts[row].push(token);
            }
        }
        let shortest = case.steps();
        demand(shortest >= 1, "a token that may follow each prompt", "none")?;
        Ok(case)
    }

    /// How many steps all rows have.
    fn steps(&self) -> usize {
        self.texts.iter().map(Vec::len).min().unwrap_or(0)
    }

    /// What a model might say, of a text and a step alone, `[B, V]`.
    fn logits(&self, of: &[(usize, usize)]) -> Result<Tensor> {
        let row = |&(text, step): &(usize, usize)| {
            let salt = 1 + (text * (STEPS + 1) + step) as u64;
            Ok(noise(self.seed, salt, &[self.vocab], (Kind::Float, Device::Cpu))?.f_mul_scalar(2.0)?)
        };
        Ok(Tensor::f_stack(&of.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Scores and advances the texts named by `rows`, one row each, over these steps.
    fn run(&self, state: &mut C::State, rows: &[usize], steps: std::ops::Range<usize>) -> Result<()> {
        for step in steps {
            let of: Vec<(usize, usize)> = rows.iter().map(|&row| (row, step)).collect();
            let _ = self.control.score(state, self.logits(&of)?)?;
            let tokens: Vec<i64> = rows.iter().map(|&row| self.texts[row][step]).collect();
            self.control.advance(state, &tokens)?;
        }
        Ok(())
    }

    /// A fresh state that has seen the first `steps` tokens of the texts named by `rows`.
    fn after(&self, rows: &[usize], steps: usize) -> Result<C::State> {
        let prompts: Vec<Vec<i64>> = rows.iter().map(|&row| self.prompts[row].clone()).collect();
        let mut state = self.control.start(&prompts)?;
        self.run(&mut state, rows, 0..steps)?;
        Ok(state)
    }

    /// The scores of the texts named by `rows` at a step.
    fn scores(&self, state: &mut C::State, rows: &[usize], step: usize) -> Result<Tensor> {
        let of: Vec<(usize, usize)> = rows.iter().map(|&row| (row, step)).collect();
        self.control.score(state, self.logits(&of)?)
    }

    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        close(what, found, expected, self.tolerance)
    }
}

fn shape<C: TokenControl>(c: &Case<'_, C>) -> Check {
    for rows in [&[0usize, 1, 2][..], &[1]] {
        let found = c.scores(&mut c.after(rows, 0)?, rows, 0)?;
        sized("scores", &found, &[rows.len() as i64, c.vocab])?;
        let kind = found.f_kind()?;
        demand(kind == Kind::Float, "scores of type f32", format!("{kind:?}"))?;
    }
    Ok(())
}

/// Scores as they come, equal ones, far apart, and with bans.
fn finite<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let plain = c.logits(&[(0, 0), (1, 0), (2, 0)])?;
    for (what, logits) in [
        ("plain", plain.shallow_clone()),
        ("equal", plain.f_zeros_like()?),
        ("large", plain.f_mul_scalar(1e4)?),
        ("huge", plain.f_mul_scalar(1e30)?),
        ("tied", plain.f_round()?),
    ] {
        let mut state = c.after(&[0, 1, 2], 0)?;
        let found = c.control.score(&mut state, logits)?;
        let bad = found.f_isnan()?.f_logical_or(&found.f_isposinf()?)?.f_any()?.f_int64_value(&[])? != 0;
        demand(!bad, format!("numbers or -inf, of {what} finite scores"), "NaN or +inf")?;
    }
    Ok(())
}

fn bans<C: TokenControl>(c: &Case<'_, C>) -> Check {
    for step in 0..c.steps() {
        let mut state = c.after(&[0, 1, 2], step)?;
        let plain = c.logits(&[(0, step), (1, step), (2, step)])?;
        // Every other token, but not all of them.
        let banned = Tensor::f_arange(c.vocab, (Kind::Int64, Device::Cpu))?.f_remainder(2)?.f_eq(1)?;
        let banned = banned.f_unsqueeze(0)?.f_expand([3, -1], false)?;
        let logits = plain.f_masked_fill(&banned, f64::NEG_INFINITY)?;
        let found = c.control.score(&mut state, logits)?;
        let revived =
            found.f_ne(f64::NEG_INFINITY)?.f_logical_and(&banned)?.f_any()?.f_int64_value(&[])? != 0;
        demand(
            !revived,
            "what was banned before to stay at -inf",
            format!("another score, after {step} tokens"),
        )?;
    }
    Ok(())
}

fn twice<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let all = [0, 1, 2];
    for step in 0..c.steps() {
        let mut state = c.after(&all, step)?;
        let first = c.scores(&mut state, &all, step)?.f_add_scalar(0)?;
        let second = c.scores(&mut state, &all, step)?;
        c.close(&format!("scores after {step} tokens, the second time"), &second, &first)?;
        if step + 1 < c.steps() {
            let tokens: Vec<i64> = all.iter().map(|&row| c.texts[row][step]).collect();
            c.control.advance(&mut state, &tokens)?;
            let expected = c.scores(&mut c.after(&all, step + 1)?, &all, step + 1)?;
            let found = c.scores(&mut state, &all, step + 1)?;
            c.close("scores after a step that was scored twice", &found, &expected)?;
        }
    }
    Ok(())
}

/// Two runs of one control, step by step by turns.
fn start<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let (mut one, mut other) = (c.after(&[0, 1], 0)?, c.after(&[2], 0)?);
    for step in 0..c.steps() {
        c.run(&mut one, &[0, 1], step..step + 1)?;
        c.run(&mut other, &[2], step..step + 1)?;
        let step = step + 1;
        let found = [c.scores(&mut one, &[0, 1], step)?, c.scores(&mut other, &[2], step)?];
        for (rows, found) in [&[0, 1][..], &[2]].into_iter().zip(&found) {
            let expected = c.scores(&mut c.after(rows, step)?, rows, step)?;
            c.close(
                &format!("scores of texts {rows:?} after {step} tokens, beside another run"),
                found,
                &expected,
            )?;
        }
    }
    Ok(())
}

fn rows<C: TokenControl>(c: &Case<'_, C>) -> Check {
    for step in 0..=c.steps() {
        let together = c.scores(&mut c.after(&[0, 1, 2], step)?, &[0, 1, 2], step)?;
        for row in 0..3 {
            let alone = c.scores(&mut c.after(&[row], step)?, &[row], step)?;
            let found = together.f_narrow(0, row as i64, 1)?;
            c.close(&format!("scores of row {row} of a batch after {step} tokens"), &found, &alone)?;
        }
    }
    Ok(())
}

fn reorder<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let half = c.steps().div_ceil(2);
    for picks in [&[2usize, 0, 1][..], &[1], &[0, 2]] {
        let mut state = c.after(&[0, 1, 2], half)?;
        state.reorder(&picks.iter().map(|&row| row as i64).collect::<Vec<_>>())?;
        for step in half..=c.steps() {
            let found = c.scores(&mut state, picks, step)?;
            let expected = c.scores(&mut c.after(picks, step)?, picks, step)?;
            c.close(&format!("scores of rows {picks:?}, {} tokens later", step - half), &found, &expected)?;
            if step < c.steps() {
                c.run(&mut state, picks, step..step + 1)?;
            }
        }
    }
    Ok(())
}

/// One row taken twice, of which each goes on with another token: each is what it would be had it been alone.
fn fork<C: TokenControl>(c: &Case<'_, C>) -> Check {
    for row in 0..3 {
        for step in 0..c.texts[row].len() {
            let mut state = c.after(&[row], step)?;
            state.reorder(&[0, 0])?;
            let scores = c.scores(&mut state, &[row, row], step)?;
            c.close("scores of a row taken twice", &scores.f_get(1)?, &scores.f_get(0)?)?;
            let token = c.texts[row][step];
            let allowed: Vec<i64> =
                Vec::try_from(scores.f_get(0)?.f_gt(f64::NEG_INFINITY)?.f_nonzero()?.f_view(-1)?)?;
            let Some(&other) = allowed.iter().find(|&&other| other != token) else { continue };
            c.control.advance(&mut state, &[token, other])?;
            let found = c.scores(&mut state, &[row, row], step + 1)?;
            for (i, token) in [token, other].into_iter().enumerate() {
                let mut alone = c.after(&[row], step)?;
                let _ = c.scores(&mut alone, &[row], step)?;
                c.control.advance(&mut alone, &[token])?;
                let expected = c.scores(&mut alone, &[row], step + 1)?;
                let what = format!("scores of a row taken twice, after token {token} of its own");
                c.close(&what, &found.f_narrow(0, i as i64, 1)?, &expected)?;
            }
        }
    }
    Ok(())
}

fn clone<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let (all, steps) = ([0usize, 1, 2], c.steps());
    let copy = c.control.clone();
    demand(
        copy.role() == c.control.role(),
        format!("the role {:?} of a clone", c.control.role()),
        format!("{:?}", copy.role()),
    )?;
    let mut expected = Vec::new();
    let mut state = c.after(&all, 0)?;
    for step in 0..=steps {
        expected.push(c.scores(&mut state, &all, step)?.f_add_scalar(0)?);
        if step < steps {
            c.run(&mut state, &all, step..step + 1)?;
        }
    }
    let logits = (0..=steps).map(|step| c.logits(&all.map(|row| (row, step)))).collect::<Result<Vec<_>>>()?;
    let tokens: Vec<Vec<i64>> =
        (0..steps).map(|step| c.texts.iter().map(|text| text[step]).collect()).collect();
    let prompts = c.prompts.clone();
    let found = on_thread(move || {
        let mut state = copy.start(&prompts)?;
        let mut found = Vec::new();
        for (step, logits) in logits.into_iter().enumerate() {
            found.push(copy.score(&mut state, logits)?);
            if let Some(tokens) = tokens.get(step) {
                copy.advance(&mut state, tokens)?;
            }
        }
        Ok(found)
    })?;
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        c.close(&format!("scores of a clone on another thread after {step} tokens"), found, expected)?;
    }
    Ok(())
}

fn finish<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let mut state = c.after(&[0, 1, 2], c.steps())?;
    let together = (0..3).map(|row| c.control.finish(&state, row)).collect::<Result<Vec<f64>>>()?;
    for (row, &found) in together.iter().enumerate() {
        demand(found < f64::INFINITY, format!("a log-weight of row {row}, a number or -inf"), found)?;
        let alone = c.control.finish(&c.after(&[row], c.steps())?, 0)?;
        let near = found == alone || (found - alone).abs() <= c.tolerance * alone.abs().max(1.0);
        demand(near, format!("the log-weight {alone} of row {row}, as it is alone"), found)?;
    }
    state.reorder(&[2, 0])?;
    let (found, expected) = (c.control.finish(&state, 0)?, together[2]);
    if found == expected {
        Ok(())
    } else {
        breach(format!("the log-weight {expected} of the row that was moved"), found)
    }
}

/// What it forces is what it leaves, and it bans no more than it says.
fn forced<C: TokenControl>(c: &Case<'_, C>) -> Check {
    let all = [0usize, 1, 2];
    let may = c.control.bans();
    for step in 0..=c.steps() {
        let mut state = c.after(&all, step)?;
        let before = (0..3).map(|row| c.control.forced(&mut state, row)).collect::<Result<Vec<_>>>()?;
        let left = c.scores(&mut state, &all, step)?.f_gt(f64::NEG_INFINITY)?;
        for (row, &forced) in before.iter().enumerate() {
            let left: Vec<i64> = Vec::try_from(left.f_get(row as i64)?.f_nonzero()?.f_view(-1)?)?;
            if let Some(token) = forced {
                let found = format!("{left:?}");
                demand(
                    left == [token],
                    format!("token {token} alone, as forced after {step} tokens"),
                    found,
                )?;
            }
            let banned = c.vocab - left.len() as i64;
            demand(may != Bans::Nothing || banned == 0, "no bans, as declared", format!("{banned}"))?;
        }
        let again = (0..3).map(|row| c.control.forced(&mut state, row)).collect::<Result<Vec<_>>>()?;
        demand(again == before, format!("{before:?}, as forced before scoring"), format!("{again:?}"))?;
        if may != Bans::Any {
            for token in 0..c.vocab {
                let logits = Tensor::f_full([3, c.vocab], f64::NEG_INFINITY, (Kind::Float, Device::Cpu))?;
                let _ = logits.f_select(1, token)?.f_fill_(-1.0)?;
                let kept =
                    c.control.score(&mut state, logits)?.f_select(1, token)?.f_gt(f64::NEG_INFINITY)?;
                let kept = kept.f_all()?.f_int64_value(&[])? != 0;
                demand(kept, "the last token left to be kept, as declared", format!("token {token} banned"))?;
            }
        }
    }
    Ok(())
}
