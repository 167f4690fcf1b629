//! Gumbel noise: a search for the best text becomes a draw.

use controlgen_core::noise::Stream;
use controlgen_core::{Result, Role, Rows, TokenControl};
use tch::Tensor;

use super::{check, scores};

/// Adds noise to the scores, so that a search for the best text finds another one for each seed.
///
/// ```text
/// s(v) + τ · gₜ(v),   gₜ(v) = −log(−log u),   u uniform in (0, 1), one for each token v of each step t
/// ```
///
/// All hypotheses of a step have the same noise. Under greedy search this *is* sampling at temperature τ, by the
/// Gumbel-max trick; under beams it is Papandreou and Yuille, "Perturb-and-MAP Random Fields" (ICCV 2011): the best text of
/// a model that is a little wrong at random. It gives searches for constraints, which have one best text for a prompt,
/// the variety of sampling. Scores hold the noise; log-probabilities are the model's.
///
/// Prompts of a batch have the same noise too, so that each finds what it finds alone; completions of one prompt differ
/// as a search's do, not as samples.
///
/// *Cost*: one number for each token of the vocabulary in each step, about a millisecond for 49k.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GumbelNoise {
    seed: u64,
    temperature: f64,
}

impl GumbelNoise {
    /// A seed, and a temperature τ of at least 0, in nats: 1 is as random as the model is.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for a temperature that is negative or no finite number.
    pub fn new(seed: u64, temperature: f64) -> Result<Self> {
        let holds = temperature.is_finite() && temperature >= 0.0;
        Ok(Self {
            seed,
            temperature: check::number("temperature of noise", "a finite number >= 0", temperature, holds)?,
        })
    }

    /// The noise of a step, `[V]`.
    fn noise(&self, step: u64, vocab: i64) -> Result<Tensor> {
        let mut stream = Stream::new(self.seed, step);
        let gumbel = |_| {
            let u = stream.uniform().max(f64::MIN_POSITIVE);
            (-(-u.ln()).ln() * self.temperature) as f32
        };
        Ok(Tensor::f_from_slice(&(0..vocab).map(gumbel).collect::<Vec<f32>>())?)
    }
}

/// How many tokens each row has, and the last noise.
pub struct GumbelNoiseState {
    steps: Vec<u64>,
    last: Option<(u64, Tensor)>,
}

impl Rows for GumbelNoiseState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.steps.reorder(rows)
    }
}

impl TokenControl for GumbelNoise {
    type State = GumbelNoiseState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<GumbelNoiseState> {
        Ok(GumbelNoiseState { steps: vec![0; prompts.len()], last: None })
    }

    fn score(&self, state: &mut GumbelNoiseState, logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.steps.len())?;
        for (row, &step) in scores::numbered(&state.steps) {
            let noise = match state.last.take() {
                Some((at, noise)) if at == step && noise.numel() as i64 == vocab => noise,
                _ => self.noise(step, vocab)?.f_to_device(logits.device())?,
            };
            let _ = logits.f_get(row)?.f_add_(&noise)?;
            state.last = Some((step, noise));
        }
        Ok(logits)
    }

    fn advance(&self, state: &mut GumbelNoiseState, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.steps, tokens, |step, _| *step += 1)
    }

    fn role(&self) -> Role {
        Role::Proposal
    }
}
