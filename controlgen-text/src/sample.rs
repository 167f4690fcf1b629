//! Choosing tokens from scores.
//!
//! Each row is chosen on its own: what it gets depends on its scores and its uniform number, not on the batch.

use std::iter;

use controlgen_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::controls::to_vec;

/// How many tokens are summed at once before a row is searched token by token.
const BLOCK: usize = 256;

/// The most probable token of each row of scores `[B, V]`, f32; of tied ones the lowest id.
///
/// # Errors
/// [`Error::NotFinite`] for a row with a NaN or +∞; [`Error::AllBanned`] for a row that is −∞ throughout, with step 0,
/// in whose place a search puts its own ([`at_step`]); [`Error::Shape`] and [`Error::Kind`] for other tensors.
pub fn greedy(logits: &Tensor) -> Result<Vec<i64>> {
    dims(logits)?;
    let (best, ids) = logits.f_max_dim(-1, false)?;
    iter::zip(0.., to_vec(&best)?).try_for_each(|(row, best)| check_best(row, best))?;
    Ok(Vec::try_from(ids)?)
}

/// One token a row, drawn from the softmax of scores `[B, V]`, f32, with one uniform number in [0, 1) a row: the first
/// token whose cumulative probability exceeds the number (inverse transform sampling). Sums are in f64.
///
/// A token of score −∞ is never drawn. The same row and number give the same token whatever else the batch holds.
///
/// # Errors
/// As [`greedy`]; [`Error::Value`] for a number outside [0, 1) and where there is not one a row.
pub fn categorical(logits: &Tensor, uniforms: &[f64]) -> Result<Vec<i64>> {
    let (rows, vocab) = dims(logits)?;
    if uniforms.len() != rows {
        return Err(Error::value("uniform numbers", format!("{rows}, one a row"), uniforms.len()));
    }
    if let Some(u) = uniforms.iter().find(|u| !(0.0..1.0).contains(*u)) {
        return Err(Error::value("uniform number", "at least 0 and below 1", u));
    }
    // One pass; a row that has no distribution becomes NaN.
    let probs = logits.f_softmax(-1, Kind::Float)?;
    if logits.device() == Device::Cpu {
        draw_on_host(logits, &probs, vocab, uniforms)
    } else {
        draw_on_device(logits, &probs, vocab, uniforms)
    }
}

/// The natural logarithm of each row's probability of one token, under the softmax of scores `[B, V]`, f32. A banned
/// token has −∞.
///
/// # Errors
/// As [`greedy`]; [`Error::Value`] for a token that is not in 0 .. V and where there is not one a row.
pub fn log_prob_of(logits: &Tensor, tokens: &[i64]) -> Result<Vec<f64>> {
    let (rows, vocab) = dims(logits)?;
    if tokens.len() != rows {
        return Err(Error::value("tokens", format!("{rows}, one a row"), tokens.len()));
    }
    let known = |token: &&i64| usize::try_from(**token).is_ok_and(|token| token < vocab);
    if let Some(token) = tokens.iter().find(|token| !known(token)) {
        return Err(Error::value("token", format!("0 .. {vocab}"), token));
    }
    let index = Tensor::f_from_slice(tokens)?.f_to_device(logits.device())?.f_unsqueeze(1)?;
    // The best token's probability gives the normaliser without the rounding of a large log-sum-exp.
    let best = logits.f_amax([-1].as_slice(), true)?;
    let best_prob = logits.f_softmax(-1, Kind::Float)?.f_amax([-1].as_slice(), true)?;
    let found = to_vec(&Tensor::f_cat(&[logits.f_gather(1, &index, false)?, best, best_prob], 1)?)?;
    iter::zip(0.., found.chunks_exact(3))
        .map(|(row, found)| {
            check_best(row, found[1])?;
            Ok(f64::from(found[0]) - f64::from(found[1]) + f64::from(found[2]).ln())
        })
        .collect()
}

/// Puts the step of a search into [`Error::AllBanned`]; other errors pass.
pub fn at_step(error: Error, step: usize) -> Error {
    match error {
        Error::AllBanned { row, .. } => Error::AllBanned { row, step },
        other => other,
    }
}

/// Draws row by row from probabilities on the CPU.
fn draw_on_host(logits: &Tensor, probs: &Tensor, vocab: usize, uniforms: &[f64]) -> Result<Vec<i64>> {
    let mut buffer = vec![0f32; vocab];
    let draw = |(row, &u): (usize, &f64)| {
        probs.f_get(row as i64)?.f_copy_data(&mut buffer, vocab)?;
        let sums: Vec<f64> = buffer.chunks(BLOCK).map(sum).collect();
        let goal = Goal::among(&sums, u).ok_or_else(|| why_none(logits, row))?;
        let begin = goal.block * BLOCK;
        let end = vocab.min(begin + BLOCK);
        goal.token(&buffer[begin..end]).ok_or_else(|| why_none(logits, row))
    };
    uniforms.iter().enumerate().map(draw).collect()
}

/// Draws from probabilities on another device, of which only the blocks' sums and one block a row are fetched.
fn draw_on_device(logits: &Tensor, probs: &Tensor, vocab: usize, uniforms: &[f64]) -> Result<Vec<i64>> {
    let count = vocab.div_ceil(BLOCK);
    let blocks = probs.f_constant_pad_nd([0, (count * BLOCK - vocab) as i64])?;
    let blocks = blocks.f_view([-1, BLOCK as i64])?;
    let sums = blocks.f_sum_dim_intlist([-1].as_slice(), false, Kind::Double)?;
    let mut all = vec![0f64; sums.numel()];
    sums.f_copy_data(&mut all, sums.numel())?;
    let goal = |(row, (sums, &u)): (usize, (&[f64], &f64))| {
        Goal::among(sums, u).ok_or_else(|| why_none(logits, row))
    };
    let goals: Vec<Goal> =
        iter::zip(all.chunks_exact(count), uniforms).enumerate().map(goal).collect::<Result<_>>()?;
    let wanted: Vec<i64> = goals.iter().enumerate().map(|(row, g)| (row * count + g.block) as i64).collect();
    let wanted = blocks.f_index_select(0, &Tensor::f_from_slice(&wanted)?.f_to_device(blocks.device())?)?;
    let token = |(row, (goal, block)): (usize, (&Goal, &[f32]))| {
        goal.token(block).ok_or_else(|| why_none(logits, row))
    };
    iter::zip(&goals, to_vec(&wanted)?.chunks_exact(BLOCK)).enumerate().map(token).collect()
}

/// Where in a row a number falls.
struct Goal {
    block: usize,
    /// The sum of the blocks before.
    before: f64,
    /// What the sum must exceed.
    goal: f64,
}

impl Goal {
    /// Among blocks with these sums; `None` if the sums are no distribution's.
    fn among(sums: &[f64], u: f64) -> Option<Self> {
        let total: f64 = sums.iter().sum();
        if !(total > 0.0 && total.is_finite()) {
            return None;
        }
        // Rounding must not reach the total, which nothing exceeds.
        let goal = (u * total).min(total.next_down());
        let mut before = 0.0;
        for (block, sum) in sums.iter().enumerate() {
            if before + sum > goal {
                return Some(Self { block, before, goal });
            }
            before += sum;
        }
        None
    }

    /// The token, among the block's probabilities.
    fn token(&self, probs: &[f32]) -> Option<i64> {
        let mut sum = self.before;
        let exceeds = |&p: &f32| {
            sum += f64::from(p);
            sum > self.goal
        };
        // The block was summed in another order: the last token may fall short by a rounding.
        let within = probs.iter().position(exceeds).or_else(|| probs.iter().rposition(|&p| p > 0.0))?;
        Some((self.block * BLOCK + within) as i64)
    }
}

/// The sum, in eight lanes.
fn sum(probs: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let chunks = probs.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().copied().map(f64::from).sum();
    for chunk in chunks {
        iter::zip(&mut lanes, chunk).for_each(|(lane, &p)| *lane += f64::from(p));
    }
    lanes.iter().sum::<f64>() + rest
}

/// B and V, of scores that are `[B, V]` and f32.
fn dims(logits: &Tensor) -> Result<(usize, usize)> {
    let (rows, vocab) = crate::controls::dims(logits)?;
    Ok((rows as usize, vocab as usize))
}

/// Refuses a row by its best score.
fn check_best(row: usize, best: f32) -> Result<()> {
    let problem = |found: &str| {
        Err(Error::NotFinite { what: "logits".into(), at: format!("row {row}"), found: found.into() })
    };
    if best.is_nan() {
        problem("NaN")
    } else if best == f32::INFINITY {
        problem("infinity")
    } else if best == f32::NEG_INFINITY {
        Err(Error::AllBanned { row, step: 0 })
    } else {
        Ok(())
    }
}

/// Why a row has no distribution.
fn why_none(logits: &Tensor, row: usize) -> Error {
    let best = || to_vec(&logits.f_get(row as i64)?.f_amax([-1].as_slice(), true)?);
    match best() {
        Ok(best) => best.first().map_or(Ok(()), |&best| check_best(row, best)).err().unwrap_or_else(|| {
            Error::NotFinite { what: "probabilities".into(), at: format!("row {row}"), found: "NaN".into() }
        }),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What runs on a GPU gives what runs on the CPU.
        #[test]
        fn host_and_device_agree(
            scores in prop::collection::vec(prop_oneof![4 => -6f32..6.0, 1 => Just(f32::NEG_INFINITY)], 2..1400),
            uniforms in prop::array::uniform2(0f64..1.0),
        ) {
            let vocab = scores.len() >> 1;
            let logits = Tensor::from_slice(&scores[..2 * vocab]).view([2, vocab as i64]);
            let _ = logits.narrow(1, 0, 1).fill_(0.5);
            let probs = logits.softmax(-1, Kind::Float);
            let host = draw_on_host(&logits, &probs, vocab, &uniforms).unwrap();
            prop_assert_eq!(host, draw_on_device(&logits, &probs, vocab, &uniforms).unwrap());
        }
    }

    #[test]
    fn both_say_which_row_has_no_distribution() {
        let logits = Tensor::from_slice(&[0f32, 1.0, f32::NEG_INFINITY, f32::NEG_INFINITY]).view([2, 2]);
        let probs = logits.softmax(-1, Kind::Float);
        for draw in [draw_on_host, draw_on_device] {
            let error = draw(&logits, &probs, 2, &[0.5; 2]).unwrap_err();
            assert!(matches!(error, Error::AllBanned { row: 1, .. }), "{error}");
        }
    }
}
