//! Logit bias.

use std::collections::HashSet;
use std::sync::Arc;

use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::{Kind, Tensor};

use super::check;
use super::phrases::Phrases;
use super::scores::{self, Prepared};

/// Adds to the scores of tokens; or, for a sequence of tokens, to its last token where the history, prompt included,
/// ends with those before it. Several that meet in one token add up.
///
/// A bias b multiplies the odds of a token by exp(b); −∞ bans it.
///
/// *Cost*: one pass over `[B, V]` where single tokens are biased, one write to the cells of sequences. The history is
/// followed by an automaton, in constant time a token.
#[derive(Clone, Debug)]
pub struct LogitBias {
    single: Arc<Vec<(i64, f32)>>,
    phrases: Arc<Phrases<f32>>,
    largest: i64,
}

impl LogitBias {
    /// Biases of token ids, each a number or −∞.
    ///
    /// # Errors
    /// [`Error::Value`] for no ids, negative and repeated ones, and for a bias that is NaN, +∞ or beyond f32; `score`
    /// returns it for ids that the vocabulary lacks.
    pub fn new(biases: impl IntoIterator<Item = (i64, f64)>) -> Result<Self> {
        Self::sequences(biases.into_iter().map(|(id, bias)| ([id], bias)))
    }

    /// Biases of sequences of one or more token ids, each a number or −∞.
    ///
    /// # Errors
    /// As [`LogitBias::new`], and for an empty sequence.
    pub fn sequences(biases: impl IntoIterator<Item = (impl AsRef<[i64]>, f64)>) -> Result<Self> {
        const WHAT: &str = "biased tokens";
        let biases: Vec<(Vec<i64>, f64)> =
            biases.into_iter().map(|(sequence, bias)| (sequence.as_ref().to_vec(), bias)).collect();
        check::at_least_one(WHAT, "sequence", biases.len())?;
        let mut seen = HashSet::new();
        for (sequence, bias) in &biases {
            check::sequence(WHAT, sequence)?;
            let holds = *bias == f64::NEG_INFINITY || (*bias as f32).is_finite();
            check::number("logit_bias", "a number that f32 holds, or -inf", *bias, holds)?;
            if !seen.insert(sequence) {
                return Err(Error::value(WHAT, "each sequence once", format!("{sequence:?} twice")));
            }
        }
        let single = biases.iter().filter(|(s, _)| s.len() == 1).map(|(s, bias)| (s[0], *bias as f32));
        Ok(Self {
            single: Arc::new(single.collect()),
            phrases: Arc::new(Phrases::new(biases.iter().map(|(s, bias)| (s.as_slice(), *bias as f32)))),
            largest: biases.iter().flat_map(|(s, _)| s).copied().max().unwrap_or(0),
        })
    }

    /// The single tokens' biases, `[V]`.
    fn dense(&self, vocab: i64) -> Result<Tensor> {
        let dense = Tensor::f_zeros([vocab], (Kind::Float, tch::Device::Cpu))?;
        let (ids, biases): (Vec<i64>, Vec<f32>) = self.single.iter().copied().unzip();
        scores::add_to_cells(&dense, &ids, &biases)?;
        Ok(dense)
    }
}

/// The rows' places in sequences.
pub struct LogitBiasState {
    dense: Prepared,
    nodes: Vec<usize>,
}

impl Rows for LogitBiasState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.nodes.reorder(rows)
    }
}

impl TokenControl for LogitBias {
    type State = LogitBiasState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<LogitBiasState> {
        let nodes = scores::start_rows(prompts, |prompt| self.phrases.start(prompt))?;
        Ok(LogitBiasState { dense: Prepared::default(), nodes })
    }

    fn score(&self, state: &mut LogitBiasState, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.nodes.len())?;
        scores::in_vocabulary("biased tokens", self.largest, vocab)?;
        if !self.single.is_empty() {
            let _ = logits.f_add_(state.dense.get(logits.device(), || self.dense(vocab))?)?;
        }
        let completions = |(row, &node): (i64, &usize)| {
            self.phrases.completions(node).iter().map(move |(token, bias)| (row * vocab + token, *bias))
        };
        let (cells, biases): (Vec<i64>, Vec<f32>) =
            scores::numbered(&state.nodes).flat_map(completions).unzip();
        scores::add_to_cells(&logits, &cells, &biases)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut LogitBiasState, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(&mut state.nodes, tokens, |node, token| *node = self.phrases.next(*node, token))
    }
}
