//! Locally typical sampling.

use controlgen_core::Result;
use tch::Tensor;

use super::check;
use super::entropy::negative_entropy;
use super::mass::{self, Order, Ties, Wanted};

/// Keeps the tokens whose information is nearest to the entropy: the fewest, taken in order of rising
/// |−log p(x) − H|, whose mass reaches τ. Meister, Pimentel, Wiher and Cotterell, "Locally Typical Sampling"
/// (TACL 2023).
///
/// The most probable token may go: it says too little. All tokens tied with the last one needed are kept.
///
/// *Cost*: on the CPU a softmax and about ten passes over `[B, V]`, and only the tokens near the cut are sorted; on a
/// GPU the whole rows are, and nothing is fetched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Typical {
    mass: f64,
    keep: usize,
}

impl Typical {
    /// `mass`, the paper's τ, above 0 and below 1.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) outside that range, and for NaN.
    pub fn new(mass: f64) -> Result<Self> {
        let holds = mass > 0.0 && mass < 1.0;
        Ok(Self { mass: check::number("typical_p", "above 0 and below 1", mass, holds)?, keep: 1 })
    }

    /// Keeps at least the `n` most typical tokens, and those tied with the n-th; 1 by default.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for 0.
    pub fn min_tokens_to_keep(self, n: usize) -> Result<Self> {
        Ok(Self { keep: check::count("min_tokens_to_keep", n)?, ..self })
    }

    fn shape(&self, logits: Tensor) -> Result<Tensor> {
        let (log_probs, probs, negative) = negative_entropy(&logits)?;
        // −|−log p − H|, greatest for the most typical; the log-probabilities are not needed after this.
        let mut keys = log_probs;
        let _ = keys.f_sub_(&negative)?;
        let _ = keys.f_abs_()?;
        let _ = keys.f_neg_()?;
        let wanted = Wanted { mass: self.mass, count: self.keep, ties: Ties::All };
        mass::restrict(logits, Order::Keys(&keys), &probs, wanted)
    }
}

proposal!(Typical);
