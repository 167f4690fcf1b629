//! The fewest tokens, taken in some order, whose mass reaches a threshold: what top-p and typical sampling keep.

use std::iter;

use controlgen_core::Result;
use tch::{Device, Kind, Tensor};

use super::scores;

/// What becomes of tokens that are tied with the last one that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ties {
    /// All stay.
    All,
    /// As many stay as are needed, those with the lowest ids.
    LowestIds,
}

/// The order in which tokens are taken.
#[derive(Clone, Copy)]
pub(super) enum Order<'a> {
    /// Falling scores.
    Scores,
    /// Falling keys, `[B, V]`.
    Keys(&'a Tensor),
}

/// How many tokens are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Mass that they must reach.
    pub(super) mass: f64,
    /// Number that they must reach.
    pub(super) count: usize,
    /// What becomes of ties.
    pub(super) ties: Ties,
}

/// Bans all but the fewest tokens of each row, taken in this order, that reach what is wanted by their probabilities
/// `[B, V]`. A row whose probabilities are NaN stays as it is.
pub(super) fn restrict(logits: Tensor, order: Order<'_>, probs: &Tensor, wanted: Wanted) -> Result<Tensor> {
    if logits.device() == Device::Cpu {
        restrict_on_host(logits, order, probs, wanted)
    } else {
        restrict_on_device(logits, order, probs, wanted)
    }
}

/// Sorts nothing but the few tokens among which a row is cut.
fn restrict_on_host(mut logits: Tensor, order: Order<'_>, probs: &Tensor, wanted: Wanted) -> Result<Tensor> {
    let (rows, vocab) = scores::dims(&logits)?;
    let size = usize::try_from(vocab).unwrap_or(0);
    let (mut keys, mut row_probs) = (vec![0f32; size], vec![0f32; size]);
    let (mut cuts, mut surplus) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let source = match order {
            Order::Scores => &logits,
            Order::Keys(keys) => keys,
        };
        source.f_get(row)?.f_copy_data(&mut keys, size)?;
        probs.f_get(row)?.f_copy_data(&mut row_probs, size)?;
        let cut = cut(&keys, &row_probs, wanted);
        cuts.push(cut.key);
        surplus.extend(cut.surplus.into_iter().map(|id| row * vocab + id));
    }
    match order {
        Order::Scores => scores::ban_below(&mut logits, &cuts)?,
        Order::Keys(keys) => {
            let below = keys.f_lt_tensor(&Tensor::f_from_slice(&cuts)?.f_unsqueeze(1)?)?;
            let _ = logits.f_masked_fill_(&below, f64::NEG_INFINITY)?;
        }
    }
    scores::ban_cells(&logits, &surplus)?;
    Ok(logits)
}

/// Sorts all, and fetches nothing.
fn restrict_on_device(
    mut logits: Tensor,
    order: Order<'_>,
    probs: &Tensor,
    wanted: Wanted,
) -> Result<Tensor> {
    let (_, vocab) = scores::dims(&logits)?;
    let keys = match order {
        Order::Scores => &logits,
        Order::Keys(keys) => keys,
    };
    let (falling, ids) = keys.f_sort_stable(true, -1, true)?;
    let sorted = probs.f_gather(1, &ids, false)?.f_to_kind(Kind::Double)?;
    let sums = sorted.f_cumsum(-1, Kind::Double)?;
    let before = sums.f_sub(&sorted)?;
    let goal = sums.f_narrow(1, vocab - 1, 1)?.f_mul_scalar(wanted.mass)?;
    // Not the opposite of what stays: it must be false of NaN.
    let mut gone = before.f_ge_tensor(&goal)?;
    let count = i64::try_from(wanted.count).unwrap_or(vocab).min(vocab);
    let _ = gone.f_narrow(1, 0, count)?.f_fill_(0)?;
    if wanted.ties == Ties::All {
        let last = gone.f_logical_not()?.f_sum_dim_intlist([-1].as_slice(), true, Kind::Int64)?;
        gone = falling.f_lt_tensor(&falling.f_gather(1, &last.f_sub_scalar(1)?, false)?)?;
    }
    let gone = gone.f_empty_like()?.f_scatter_(1, &ids, &gone)?;
    let _ = logits.f_masked_fill_(&gone, f64::NEG_INFINITY)?;
    Ok(logits)
}

/// Where a row is cut.
struct Cut {
    /// The least key that stays; −∞ where all do.
    key: f32,
    /// Tokens with that key that go.
    surplus: Vec<i64>,
}

/// How many of a key's leading bits tell its bucket: sign, exponent and three bits of the fraction.
const BUCKET_BITS: u32 = 12;

/// Sums the probabilities by buckets of similar keys, finds the bucket in which they reach the mass, and puts that
/// bucket's tokens in order.
fn cut(keys: &[f32], probs: &[f32], wanted: Wanted) -> Cut {
    let everything = Cut { key: f32::NEG_INFINITY, surplus: Vec::new() };
    if probs.first().is_none_or(|p| p.is_nan()) {
        return everything;
    }
    let mut buckets = vec![(0f64, 0usize); 1 << BUCKET_BITS];
    for (&key, &p) in iter::zip(keys, probs) {
        let bucket = &mut buckets[bucket(rising_bits(key))];
        bucket.0 += f64::from(p);
        bucket.1 += 1;
    }
    // In f32 the probabilities' sum is not quite 1.
    let goal = wanted.mass * buckets.iter().map(|bucket| bucket.0).sum::<f64>();
    let reached = |mass: f64, count: usize| mass >= goal && count >= wanted.count;
    let (mut mass, mut count) = (0.0, 0);
    for (at, &(more, tokens)) in buckets.iter().enumerate().rev() {
        if reached(mass + more, count + tokens) {
            let mut falling: Vec<u64> = iter::zip(0u64.., keys)
                .map(|(id, &key)| (rising_bits(key), id))
                .filter(|&(bits, _)| bucket(bits) == at)
                .map(|(bits, id)| u64::from(!bits) << 32 | id)
                .collect();
            falling.sort_unstable();
            let id = |&pair: &u64| (pair & u64::from(u32::MAX)) as usize;
            let enough = falling.iter().position(|pair| {
                mass += f64::from(probs[id(pair)]);
                count += 1;
                reached(mass, count)
            });
            // The bucket was summed in another order: all of it may fall short by a rounding.
            let Some(last) = enough.or(falling.len().checked_sub(1)) else { return everything };
            let tied = falling[last + 1..].iter().take_while(|&pair| pair >> 32 == falling[last] >> 32);
            let surplus = match wanted.ties {
                Ties::All => Vec::new(),
                Ties::LowestIds => tied.map(|pair| id(pair) as i64).collect(),
            };
            return Cut { key: keys[id(&falling[last])], surplus };
        }
        mass += more;
        count += tokens;
    }
    everything
}

fn bucket(bits: u32) -> usize {
    (bits >> (u32::BITS - BUCKET_BITS)) as usize
}

/// Bits that rise as the numbers do, −0 and 0 being the same.
fn rising_bits(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What runs on a GPU gives what runs on the CPU.
        #[test]
        fn host_and_device_agree(
            scores in prop::collection::vec(prop_oneof![5 => -5f32..5.0, 1 => Just(f32::NEG_INFINITY)], 3 * 50),
            coarse in any::<bool>(), mass in 0f64..1.0, count in 1usize..60, by_key in any::<bool>(),
        ) {
            let mut logits = Tensor::from_slice(&scores).view([3, 50]);
            if coarse {
                logits = logits.round();
            }
            let _ = logits.get(2).get(3).fill_(f64::NAN);
            let probs = logits.softmax(-1, Kind::Float);
            let keys = -(&logits - 0.7).abs();
            let order = if by_key { Order::Keys(&keys) } else { Order::Scores };
            for ties in [Ties::All, Ties::LowestIds] {
                let wanted = Wanted { mass, count, ties };
                let host = restrict_on_host(logits.copy(), order, &probs, wanted).unwrap();
                let device = restrict_on_device(logits.copy(), order, &probs, wanted).unwrap();
                prop_assert!(host.allclose(&device, 0.0, 0.0, true), "{host:?} {device:?}");
                prop_assert!(host.get(2).allclose(&logits.get(2), 0.0, 0.0, true));
            }
        }
    }
}
