//! The smallest sets of tokens, in some order, whose mass reaches a threshold: what top-p and typical sampling keep.

use std::iter;

use controlgen_core::Result;
use tch::{Device, Tensor};

use super::scores;

/// How many tokens of each row are put in order before the whole row is.
const HEAD: i64 = 512;

/// What becomes of tokens that are tied with the last one that is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ties {
    /// All stay.
    All,
    /// As many stay as are needed, those with the lowest ids.
    LowestIds,
}

/// The set that one row keeps.
#[derive(Debug, PartialEq)]
pub(super) struct Set {
    /// The least key that stays. −∞ keeps the row as it is.
    pub(super) cut: f32,
    /// Tokens that go although their key is the least that stays, in no order.
    pub(super) surplus: Vec<i64>,
}

/// The smallest sets of tokens, taken in order of falling `keys` `[B, V]`, whose `probs` `[B, V]` sum to `mass` or
/// more and that hold `keep` tokens or more; one set a row.
///
/// Keys of −∞ stand for banned tokens. A row whose probabilities are NaN is kept as it is.
pub(super) fn smallest_sets(
    keys: &Tensor,
    probs: &Tensor,
    mass: f64,
    keep: usize,
    ties: Ties,
) -> Result<Vec<Set>> {
    let (_, vocab) = scores::dims(keys)?;
    let (head, ids) = keys.f_topk(HEAD.min(vocab), -1, true, true)?;
    let decide = |head: &Tensor, ids: &Tensor, probs: &Tensor| -> Result<Vec<Option<Set>>> {
        Ordered::new(head, ids, probs)?.sets(&Wanted { mass, keep, ties, vocab })
    };
    let mut sets = decide(&head, &ids, probs)?;
    let undecided: Vec<i64> =
        scores::numbered(&sets).filter(|(_, set)| set.is_none()).map(|(i, _)| i).collect();
    if !undecided.is_empty() {
        let rows = Tensor::f_from_slice(&undecided)?.f_to_device(keys.device())?;
        let (keys, probs) = (keys.f_index_select(0, &rows)?, probs.f_index_select(0, &rows)?);
        let ids = falling(&keys)?;
        let whole = decide(&keys.f_gather(1, &ids, false)?, &ids, &probs)?;
        iter::zip(sets.iter_mut().filter(|set| set.is_none()), whole).for_each(|(set, found)| *set = found);
    }
    // The whole row always decides.
    Ok(sets.into_iter().map(|set| set.unwrap_or_else(Set::everything)).collect())
}

/// Ids in order of falling keys, equal keys in order of rising ids.
fn falling(keys: &Tensor) -> Result<Tensor> {
    if keys.device() != Device::Cpu {
        return Ok(keys.f_sort_stable(true, -1, true)?.1);
    }
    // LibTorch's sort takes several times as long on the CPU.
    let (rows, vocab) = scores::dims(keys)?;
    let mut ids = Vec::with_capacity(keys.numel());
    for row in scores::to_vec(keys)?.chunks_exact(usize::try_from(vocab).unwrap_or(1)) {
        let mut order: Vec<u64> =
            iter::zip(0u64.., row).map(|(id, &key)| u64::from(!rising_bits(key)) << 32 | id).collect();
        order.sort_unstable();
        ids.extend(order.iter().map(|pair| i64::from(*pair as u32)));
    }
    Ok(Tensor::f_from_slice(&ids)?.f_view([rows, vocab])?)
}

/// Bits that are ordered as the numbers are, with −0 = 0.
fn rising_bits(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// What is asked of every row.
struct Wanted {
    mass: f64,
    keep: usize,
    ties: Ties,
    vocab: i64,
}

/// Some of each row's tokens, in order of falling keys.
struct Ordered<'a> {
    /// Keys and then probabilities, `[B, 2 k]`.
    values: Vec<f32>,
    /// `[B, k]`.
    ids: &'a Tensor,
    k: usize,
}

impl<'a> Ordered<'a> {
    /// Of falling keys and their ids `[B, k]`, and the whole rows' probabilities `[B, V]`.
    fn new(keys: &Tensor, ids: &'a Tensor, probs: &Tensor) -> Result<Self> {
        let (_, k) = scores::dims(keys)?;
        let values = Tensor::f_cat(&[keys, &probs.f_gather(1, ids, false)?], 1)?;
        Ok(Self { values: scores::to_vec(&values)?, ids, k: usize::try_from(k).unwrap_or(0) })
    }

    /// The rows' sets; `None` where more tokens must be known to tell.
    fn sets(&self, wanted: &Wanted) -> Result<Vec<Option<Set>>> {
        let rows = self.values.chunks_exact(2 * self.k);
        iter::zip(0.., rows)
            .map(|(row, values)| {
                let (keys, probs) = values.split_at(self.k);
                self.set(row, keys, probs, wanted)
            })
            .collect()
    }

    fn set(&self, row: i64, keys: &[f32], probs: &[f32], wanted: &Wanted) -> Result<Option<Set>> {
        let complete = i64::try_from(self.k).is_ok_and(|k| k == wanted.vocab);
        let everything = Ok(Some(Set::everything()));
        if probs.iter().any(|p| p.is_nan()) {
            return everything;
        }
        let mut mass = 0.0;
        let enough = iter::zip(1.., probs).find_map(|(n, &p)| {
            mass += f64::from(p);
            (mass >= wanted.mass && n >= wanted.keep).then_some(n)
        });
        let banned = keys.last().is_some_and(|&key| key == f32::NEG_INFINITY);
        let n = match enough {
            Some(n) => n,
            // All that is left has no probability, or there is nothing left.
            None if banned || complete => return everything,
            None => return Ok(None),
        };
        let cut = keys[n - 1];
        if wanted.ties == Ties::All || cut == f32::NEG_INFINITY {
            return Ok(Some(Set { cut, surplus: Vec::new() }));
        }
        let first = keys.partition_point(|&key| key > cut);
        let end = keys.partition_point(|&key| key >= cut);
        if end == self.k && !complete {
            return Ok(None);
        }
        let mut surplus = Vec::new();
        if end > n {
            let tied = self.ids.f_select(0, row)?.f_slice(0, first as i64, end as i64, 1)?;
            surplus = Vec::<i64>::try_from(tied)?;
            surplus.sort_unstable();
            surplus.drain(..n - first);
        }
        Ok(Some(Set { cut, surplus }))
    }
}

impl Set {
    /// The row as it is.
    fn everything() -> Self {
        Self { cut: f32::NEG_INFINITY, surplus: Vec::new() }
    }
}
