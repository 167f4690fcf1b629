//! Locally typical sampling.

use controlgen_core::Result;
use tch::Tensor;

use super::entropy::negative_entropy;
use super::{check, mass};

/// Keeps the tokens whose information is nearest to the entropy: the fewest, taken in order of rising
/// |−log p(x) − H|, whose mass reaches τ. Meister, Pimentel, Wiher and Cotterell, "Locally Typical Sampling"
/// (TACL 2023).
///
/// The most probable token may go: it says too little. All tokens tied with the last one needed are kept.
///
/// *Cost*: a softmax, about six passes over `[B, V]` and a selection of 512 among V in each row; rows whose set is
/// larger are sorted.
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

    fn shape(&self, mut logits: Tensor) -> Result<Tensor> {
        let (log_probs, probs, negative) = negative_entropy(&logits)?;
        // −|−log p − H|, greatest for the most typical; the log-probabilities are not needed after this.
        let mut keys = log_probs;
        let _ = keys.f_sub_(&negative)?;
        let _ = keys.f_abs_()?;
        let _ = keys.f_neg_()?;
        let sets = mass::smallest_sets(&keys, &probs, self.mass, self.keep, mass::Ties::All)?;
        let cuts: Vec<f32> = sets.iter().map(|set| set.cut).collect();
        let cuts = Tensor::f_from_slice(&cuts)?.f_unsqueeze(1)?.f_to_device(logits.device())?;
        let _ = logits.f_masked_fill_(&keys.f_lt_tensor(&cuts)?, f64::NEG_INFINITY)?;
        Ok(logits)
    }
}

proposal!(Typical);
