//! Top-p, nucleus sampling.

use controlgen_core::Result;
use tch::{Kind, Tensor};

use super::{check, mass, scores};

/// Keeps the nucleus: the fewest most probable tokens whose mass reaches p. Holtzman, Buys, Du, Forbes and Choi, "The
/// Curious Case of Neural Text Degeneration" (ICLR 2020), section 3.1.
///
/// A token stays if and only if the tokens before it, in order of falling probability, have a mass below p. Of tokens
/// with equal scores those with lower ids come first. At p = 1 nothing changes; at 0 the best token stays.
///
/// *Cost*: a softmax, a selection of 512 among V in each row and one pass; rows whose nucleus is larger are sorted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopP {
    p: f64,
    keep: usize,
}

impl TopP {
    /// `p` in 0 ..= 1.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(p: f64) -> Result<Self> {
        Ok(Self { p: check::number("top_p", "0 ..= 1", p, (0.0..=1.0).contains(&p))?, keep: 1 })
    }

    /// Keeps at least the `n` most probable tokens, whatever their mass; 1 by default.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { keep: check::count("min_tokens_to_keep", n)?, ..self })
    }

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        if self.p >= 1.0 {
            return Ok(logits);
        }
        let (_, vocab) = scores::dims(&logits)?;
        let probs = logits.f_softmax(-1, Kind::Float)?;
        let sets = mass::smallest_sets(&logits, &probs, self.p, self.keep, mass::Ties::LowestIds)?;
        let cuts: Vec<f32> = sets.iter().map(|set| set.cut).collect();
        scores::ban_below(&mut logits, &cuts)?;
        let cell = |row: i64| move |&id: &i64| row * vocab + id;
        let surplus: Vec<i64> =
            scores::numbered(&sets).flat_map(|(row, set)| set.surplus.iter().map(cell(row))).collect();
        scores::ban_cells(&logits, &surplus)?;
        Ok(logits)
    }
}

proposal!(TopP);
