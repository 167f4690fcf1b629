//! The Mersenne Twister MT19937, seeded and laid out as PyTorch's CPU generator has it.
//!
//! Matsumoto and Nishimura, "Mersenne Twister: a 623-dimensionally equidistributed uniform pseudo-random
//! number generator", ACM TOMACS 8(1), 1998; seeding by `init_genrand` of the authors' 2002 revision.

use crate::{Error, Result};

/// Words of state.
pub(super) const N: usize = 624;
/// Distance of the word that the recurrence mixes in.
const M: usize = 397;

/// The engine: 32 random bits a call, period 2^19937 − 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mt19937 {
    /// The seed, whole: PyTorch remembers 64 bits and uses the low 32.
    seed: u64,
    state: [u32; N],
    /// Calls until the block is used up, the refilling one included (1 before the first).
    left: u32,
    /// Index of the next word.
    next: u32,
}

impl Mt19937 {
    pub(super) fn new(seed: u64) -> Self {
        let mut state = [0_u32; N];
        state[0] = (seed & 0xffff_ffff) as u32;
        for (j, index) in (1..N).zip(1_u32..) {
            let previous = state[j - 1];
            state[j] = 1_812_433_253_u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(index);
        }
        Self { seed, state, left: 1, next: 0 }
    }

    /// The engine in the middle of its run.
    ///
    /// `left` and `next` are refused unless they agree: they count the same thing from two ends.
    pub(super) fn from_parts(seed: u64, state: [u32; N], left: u32, next: u32) -> Result<Self> {
        let fresh = left == 1 && next == 0;
        let running = (1..=N as u32).contains(&next) && left == N as u32 + 1 - next;
        if fresh || running {
            Ok(Self { seed, state, left, next })
        } else {
            Err(Error::value(
                "generator state",
                format!("left = 1 and next = 0, or next in 1 ..= {N} and left = {} - next", N + 1),
                format!("left = {left}, next = {next}"),
            ))
        }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn state(&self) -> &[u32; N] {
        &self.state
    }

    pub(super) fn left(&self) -> u32 {
        self.left
    }

    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// 32 random bits.
    pub(super) fn random(&mut self) -> u32 {
        self.left -= 1;
        if self.left == 0 {
            self.refill();
        }
        let mut y = self.state[self.next as usize];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// 64 random bits: the first draw is the high half.
    pub(super) fn random64(&mut self) -> u64 {
        let high = u64::from(self.random());
        let low = u64::from(self.random());
        (high << 32) | low
    }

    fn refill(&mut self) {
        for i in 0..N {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = (mixed >> 1) ^ if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ twist;
        }
        self.left = N as u32;
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The C++ standard fixes the 10,000th output of `std::mt19937` with the default seed ([rand.predef]).
    #[test]
    fn ten_thousandth_output_is_the_standards() {
        let mut engine = Mt19937::new(5489);
        let last = (0..10_000).map(|_| engine.random()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn parts_that_disagree_are_refused() {
        let state = *Mt19937::new(1).state();
        assert!(Mt19937::from_parts(1, state, 1, 0).is_ok());
        assert!(Mt19937::from_parts(1, state, 624, 1).is_ok());
        assert!(Mt19937::from_parts(1, state, 1, 624).is_ok());
        for (left, next) in [(0, 0), (624, 624), (2, 0), (625, 0), (1, 625), (u32::MAX, 2)] {
            assert!(
                matches!(Mt19937::from_parts(1, state, left, next), Err(Error::Value { .. })),
                "{left} {next}"
            );
        }
    }
}
