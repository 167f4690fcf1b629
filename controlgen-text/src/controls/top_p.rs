//! Top-p, nucleus sampling.

use controlgen_core::Result;
use tch::{Kind, Tensor};

use super::check;
use super::mass::{self, Order, Ties, Wanted};

/// Keeps the nucleus: the fewest most probable tokens whose mass reaches p. Holtzman, Buys, Du, Forbes and Choi, "The
/// Curious Case of Neural Text Degeneration" (ICLR 2020), section 3.1.
///
/// A token stays if and only if the tokens before it, in order of falling probability, have a mass below p. Of tokens
/// with equal scores those with lower ids come first. At p = 1 nothing changes; at 0 the best token stays.
///
/// *Cost*: on the CPU a softmax and about four passes over `[B, V]`, and only the tokens near the cut are sorted; on a
/// GPU the whole rows are, and nothing is fetched.
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

    fn shape(&self, logits: Tensor) -> Result<Tensor> {
        if self.p >= 1.0 {
            return Ok(logits);
        }
        let probs = logits.f_softmax(-1, Kind::Float)?;
        let wanted = Wanted { mass: self.p, count: self.keep, ties: Ties::LowestIds };
        mass::restrict(logits, Order::Scores, &probs, wanted)
    }
}

proposal!(TopP);
