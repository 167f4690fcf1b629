//! A language model small enough to write down every sequence it can say.

use std::collections::HashMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Kind, Tensor};

use crate::layers::{Embedding, Linear};
use crate::{
    Dims, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, Placement, Result, SiteMap, Source,
    State, StateImpl, Tokens, WeightMap,
};

/// What a [`TableLm`] is made of.
#[derive(Clone, Debug)]
pub struct TableLmConfig {
    /// V, at least 2. It counts `bos`, `eos` and `pad`, which the model may also say like any other token.
    pub vocab: i64,
    /// How many tokens back it looks: 1 or 2. Only with 2 does a wrong state show.
    pub order: usize,
    /// How many positions it has, padding included.
    pub context: i64,
    /// The token whose row is the distribution of the first token.
    pub bos: Option<i64>,
    /// The tokens that end a sequence.
    pub eos: Vec<i64>,
    /// The token that fills unequal rows.
    pub pad: Option<i64>,
    /// Standard deviation of the logits, drawn from a normal distribution: 0 is the uniform model.
    pub scale: f64,
    /// The seed of the logits (ChaCha8). LibTorch's generator is not touched.
    pub seed: u64,
    /// Device and element type.
    pub placement: Placement,
}

impl Default for TableLmConfig {
    fn default() -> Self {
        Self {
            vocab: 5,
            order: 2,
            context: 64,
            bos: Some(0),
            eos: vec![1],
            pad: None,
            scale: 1.0,
            seed: 0,
            placement: Placement::CPU,
        }
    }
}

/// p(next | last two tokens) from a table of logits, so that every sequence can be enumerated.
///
/// Embeddings are the unit vectors: a soft token is a mixture of tokens. With x the embedding of the token just read
/// and u that of the kept token before it, the logits are W (\[1; 0\] ⊗ x) where there is none before, W (\[0; u\] ⊗ x)
/// elsewhere; with order 1, W x. W is the linear site `lm_head`, the table of embeddings the site
/// `model.embed_tokens`.
///
/// Padding is never the token before; at a padding position itself the logits are those after the padding token, as
/// meaningless as a real model's. Positions are checked and then ignored: the model only knows order.
pub struct TableLm {
    spec: LmSpec,
    sites: Arc<SiteMap>,
    order: usize,
    embed: Embedding,
    head: Linear,
}

impl TableLm {
    /// A model with logits drawn from a seed.
    ///
    /// # Errors
    /// [`Error::Value`] for a field out of its range.
    pub fn new(config: &TableLmConfig) -> Result<Self> {
        let TableLmConfig { vocab, order, scale, .. } = *config;
        if !scale.is_finite() || scale < 0.0 {
            return Err(Error::value("scale", "a finite number >= 0", scale));
        }
        let inputs = Self::inputs(vocab, order)?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let draw = |_| -> f64 { StandardNormal.sample(&mut rng) };
        let logits: Vec<f64> = (0..vocab * inputs).map(draw).map(|z| z * scale).collect();
        Self::from_logits(config, &logits)
    }

    /// A model of the default configuration but for the number of tokens and the seed.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer than two tokens.
    pub fn random(vocab: i64, seed: u64) -> Result<Self> {
        Self::new(&TableLmConfig { vocab, seed, ..TableLmConfig::default() })
    }

    /// A model with these logits, `scale` and `seed` being ignored: W of `[V, V]` in rows (order 1; column x) or
    /// `[V, (V + 1) · V]` (order 2; column (u + 1) · V + x, where u + 1 = 0 stands for no token before).
    ///
    /// # Errors
    /// [`Error::Value`] for a field out of its range, [`Error::NotFinite`] for a logit that is no number,
    /// [`Error::Shape`] for another number of them.
    pub fn from_logits(config: &TableLmConfig, logits: &[f64]) -> Result<Self> {
        let TableLmConfig { vocab, order, context, bos, ref eos, pad, placement, .. } = *config;
        let inputs = Self::inputs(vocab, order)?;
        if context < 1 {
            return Err(Error::value("context", ">= 1", context));
        }
        for (name, token) in bos
            .iter()
            .map(|t| ("bos", t))
            .chain(eos.iter().map(|t| ("eos", t)))
            .chain(pad.iter().map(|t| ("pad", t)))
        {
            if !(0..vocab).contains(token) {
                return Err(Error::value(name, format!("0 .. {vocab}"), token));
            }
        }
        if let Some(i) = logits.iter().position(|z| !z.is_finite()) {
            let found = format!("{}", logits[i]);
            return Err(Error::NotFinite { what: "table of logits".into(), at: format!("index {i}"), found });
        }
        if i64::try_from(logits.len()).ok() != Some(vocab * inputs) {
            let found = [i64::try_from(logits.len()).unwrap_or(i64::MAX)];
            return Err(Error::shape("table of logits", format!("[{vocab} · {inputs}]"), &found));
        }
        let mut sites = SiteMap::new();
        let embed = sites.add("model.embed_tokens", Dims::Embedding { rows: vocab, width: vocab });
        let head = sites.add("lm_head", Dims::Linear { inputs, outputs: vocab });
        let weight = Tensor::f_from_slice(logits)?.f_view([vocab, inputs])?;
        let weight = weight.f_to_kind(placement.kind)?.f_to_device(placement.device)?;
        Ok(Self {
            spec: LmSpec {
                architecture: "table".into(),
                vocab,
                width: vocab,
                context,
                bos,
                eos: eos.clone(),
                pad,
                decoder_start: None,
                placement,
            },
            sites: Arc::new(sites),
            order,
            embed: Embedding::new(Tensor::f_eye(vocab, placement.options())?, embed),
            head: Linear::new(weight, None, &[(head, vocab)])?,
        })
    }

    fn inputs(vocab: i64, order: usize) -> Result<i64> {
        if !(2..=4096).contains(&vocab) {
            return Err(Error::value("vocab", "2 ..= 4096", vocab));
        }
        match order {
            1 => Ok(vocab),
            2 => Ok((vocab + 1) * vocab),
            _ => Err(Error::value("order", "1 or 2", order)),
        }
    }

    fn share(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            order: self.order,
            embed: self.embed.handle(),
            head: self.head.handle(),
        }
    }

    /// [`LanguageModel::map_weights`], of this type.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn mapped(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { embed: self.embed.map_weights(f)?, head: self.head.map_weights(f)?, ..self.share() })
    }

    /// The distribution after a context, log p `[V]` in f64. Computed from the weights in plain Rust, with no
    /// tensor operation: what [`LanguageModel::forward`] is checked against.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty context or a token id that is none.
    pub fn log_probs(&self, context: &[i64]) -> Result<Vec<f64>> {
        self.oracle()?.log_probs(context)
    }

    /// log p(continuation | prompt).
    ///
    /// # Errors
    /// [`Error::Value`] for an empty prompt or a token id that is none.
    pub fn log_prob(&self, prompt: &[i64], continuation: &[i64]) -> Result<f64> {
        let mut oracle = self.oracle()?;
        let (mut context, mut sum) = (prompt.to_vec(), 0.0);
        for &token in continuation {
            oracle.check(token)?;
            sum += oracle.log_probs(&context)?[index(token)];
            context.push(token);
        }
        Ok(sum)
    }

    /// Every complete sequence after `bos`, with its log p: those that end in an `eos` within `max_len` tokens, and
    /// those of `max_len` tokens without one. `bos` is left out of them, `eos` not. Their probabilities sum to 1.
    ///
    /// # Errors
    /// [`Error::Value`] where there is no `bos`, or more than four million sequences.
    pub fn enumerate(&self, max_len: usize) -> Result<Vec<(Vec<i64>, f64)>> {
        let Some(bos) = self.spec.bos else {
            return Err(Error::value("bos", "a token that starts sequences", "none"));
        };
        self.enumerate_after(&[bos], max_len)
    }

    /// Every complete continuation of a prompt, with its log p; the prompt is left out of them.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty prompt, a token id that is none, or more than four million sequences.
    pub fn enumerate_after(&self, prompt: &[i64], max_new: usize) -> Result<Vec<(Vec<i64>, f64)>> {
        self.enumerate_with(prompt, max_new, &mut |_, _| ())
    }

    /// Every complete continuation of a prompt under a sampler: `edit` is given the new tokens so far and their
    /// log-probabilities `[V]`, changes them (temperature, bans as −∞), and what it leaves is normalised.
    /// Continuations of probability 0 are left out.
    ///
    /// # Errors
    /// Those of [`Self::enumerate_after`]; [`Error::AllBanned`] where `edit` leaves nothing.
    pub fn enumerate_with(
        &self,
        prompt: &[i64],
        max_new: usize,
        edit: &mut dyn FnMut(&[i64], &mut [f64]),
    ) -> Result<Vec<(Vec<i64>, f64)>> {
        const LIMIT: usize = 4_000_000;
        let mut oracle = self.oracle()?;
        let mut done = Vec::new();
        let mut open = vec![(Vec::new(), 0.0)];
        while let Some((said, log_p)) = open.pop() {
            let ended = said.last().is_some_and(|token| self.spec.eos.contains(token));
            if ended || said.len() == max_new {
                done.push((said, log_p));
                continue;
            }
            if done.len() + open.len() > LIMIT {
                return Err(Error::value("max_new", format!("at most {LIMIT} sequences"), max_new));
            }
            let mut next = oracle.log_probs(&[prompt, &said].concat())?;
            edit(&said, &mut next);
            let Some(next) = log_softmax(&next) else {
                return Err(Error::AllBanned { row: 0, step: said.len() });
            };
            for (token, log_q) in (0i64..).zip(next).filter(|(_, log_q)| log_q.is_finite()) {
                open.push(([said.as_slice(), &[token]].concat(), log_p + log_q));
            }
        }
        Ok(done)
    }

    fn oracle(&self) -> Result<Oracle> {
        let flat = |t: &Tensor| -> Result<Vec<f64>> {
            let t = t.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
            Ok(Vec::try_from(t.f_contiguous()?.f_view(-1)?)?)
        };
        Ok(Oracle {
            vocab: index(self.spec.vocab),
            order: self.order,
            embed: flat(self.embed.weight())?,
            head: flat(self.head.weight())?,
            seen: HashMap::new(),
        })
    }

    /// What the head reads, `[B, T, inputs]`, of the embeddings `[B, n + T, V]` of which n were read before.
    fn features(&self, history: &History, len: i64) -> Result<Tensor> {
        let total = history.len();
        let x = history.x.f_narrow(1, total - len, len)?; // (B, T, V)
        if self.order == 1 {
            return Ok(x);
        }
        // For each position the last kept one before it, −1 for none.
        let device = x.device();
        let at = Tensor::f_arange(total, (Kind::Int64, device))?.f_unsqueeze(0)?;
        let kept = at.f_where_self(&history.keep, &Tensor::f_from_slice(&[-1i64])?.f_to_device(device)?)?;
        let last = kept.f_cummax(1)?.0; // (B, n + T), the last kept one up to it
        let none = Tensor::f_full([last.size()[0], 1], -1, (Kind::Int64, device))?;
        let before = Tensor::f_cat(&[&none, &last], 1)?.f_narrow(1, total - len, len)?;
        let index = before.f_clamp_min(0)?.f_unsqueeze(-1)?.f_expand([-1, -1, self.spec.width], false)?;
        let some = before.f_ge(0)?.f_unsqueeze(-1)?.f_to_kind(x.f_kind()?)?; // (B, T, 1)
        let u = history.x.f_gather(1, &index, false)?.f_mul(&some)?; // (B, T, V)
        let u = Tensor::f_cat(&[&some.f_neg()?.f_add_scalar(1.0)?, &u], -1)?; // (B, T, V + 1)
        Ok(u.f_unsqueeze(-1)?.f_mul(&x.f_unsqueeze(-2)?)?.f_flatten(2, 3)?)
    }
}

impl LanguageModel for TableLm {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(self.share())
    }

    fn spec(&self) -> &LmSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn embeddings(&self) -> &Tensor {
        self.embed.weight()
    }

    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        pass.check_sites(&self.sites)?;
        let Source::Rows(rows) = source else {
            return Err(Error::unsupported("an encoder's input to a decoder-only model", "Source::Rows"));
        };
        if rows < 1 {
            return Err(Error::value("rows", ">= 1", rows));
        }
        let device = self.spec.placement.device;
        let x = Tensor::f_zeros([rows, 0, self.spec.width], self.spec.placement.options())?;
        Ok(State::new(History { x, keep: Tensor::f_zeros([rows, 0], (Kind::Bool, device))? }))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (batch, len) = input.validate(&self.spec)?;
        pass.check(&self.sites, batch)?;
        let history: &mut History = state.downcast("one made by TableLm::start")?;
        if history.rows() != batch {
            return Err(Error::value(
                "rows of the input",
                format!("{}, as in the state", history.rows()),
                batch,
            ));
        }
        let (limit, needed) = (self.spec.context, pass.position_offset()?.most() + history.len() + len);
        if needed > limit {
            return Err(Error::Context { limit, needed });
        }
        if let Some(positions) = input.positions {
            let (low, high) = positions.f_aminmax(None, false)?;
            let (low, high) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?);
            if low < 0 || high >= limit {
                let found = if low < 0 { low } else { high };
                return Err(Error::value("position", format!("0 .. {limit}"), found));
            }
        }
        let device = self.spec.placement.device;
        let moved;
        let tokens = match input.tokens {
            Tokens::Ids(t) => {
                moved = t.f_to_device(device)?;
                Tokens::Ids(&moved)
            }
            Tokens::Embeds(t) => {
                moved = t.f_to_device(device)?;
                Tokens::Embeds(&moved)
            }
        };
        let x = self.embed.forward(tokens, pass)?;
        let keep = match input.keep {
            Some(keep) => keep.f_to_device(device)?,
            None => Tensor::f_ones([batch, len], (Kind::Bool, device))?,
        };
        let longer = History {
            x: Tensor::f_cat(&[&history.x, &x], 1)?,
            keep: Tensor::f_cat(&[&history.keep, &keep], 1)?,
        };
        let mut features = self.features(&longer, len)?;
        if input.logits == Logits::Last {
            features = features.f_narrow(1, len - 1, 1)?;
        }
        let logits = self.head.forward(&features, pass)?;
        *history = longer;
        Ok(LmOutput { logits })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(self.mapped(f)?))
    }
}

/// Everything read. Tensors are never written to, hence forks share them.
struct History {
    /// `[B, n, V]`
    x: Tensor,
    /// Boolean `[B, n]`
    keep: Tensor,
}

impl StateImpl for History {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(Self { x: self.x.shallow_clone(), keep: self.keep.shallow_clone() }))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let rows = Tensor::f_from_slice(rows)?.f_to_device(self.x.device())?;
        let x = self.x.f_index_select(0, &rows)?;
        (self.x, self.keep) = (x, self.keep.f_index_select(0, &rows)?);
        Ok(())
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        let x = self.x.f_narrow(1, 0, len)?;
        (self.x, self.keep) = (x, self.keep.f_narrow(1, 0, len)?);
        Ok(())
    }

    fn len(&self) -> i64 {
        self.keep.size().get(1).copied().unwrap_or(0)
    }

    fn rows(&self) -> i64 {
        self.keep.size().first().copied().unwrap_or(0)
    }
}

/// The weights as numbers, and the rows computed so far by the tokens they depend on.
struct Oracle {
    vocab: usize,
    order: usize,
    embed: Vec<f64>,
    head: Vec<f64>,
    seen: HashMap<(Option<i64>, i64), Vec<f64>>,
}

impl Oracle {
    fn check(&self, token: i64) -> Result<()> {
        if token < 0 || index(token) >= self.vocab {
            return Err(Error::value("token id", format!("0 .. {}", self.vocab), token));
        }
        Ok(())
    }

    fn log_probs(&mut self, context: &[i64]) -> Result<Vec<f64>> {
        context.iter().try_for_each(|&token| self.check(token))?;
        let Some((&x, before)) = context.split_last() else {
            return Err(Error::value("context", "at least one token", "none"));
        };
        let u = if self.order == 2 { before.last().copied() } else { None };
        if let Some(row) = self.seen.get(&(u, x)) {
            return Ok(row.clone());
        }
        let row = self.compute(u, x);
        self.seen.insert((u, x), row.clone());
        Ok(row)
    }

    fn compute(&self, u: Option<i64>, x: i64) -> Vec<f64> {
        let embedding = |token: i64| &self.embed[index(token) * self.vocab..][..self.vocab];
        let x = embedding(x);
        let features: Vec<f64> = match (self.order, u) {
            (1, _) => x.to_vec(),
            (_, None) => x.iter().copied().chain(std::iter::repeat_n(0.0, self.vocab * self.vocab)).collect(),
            (_, Some(u)) => {
                let product = embedding(u).iter().flat_map(|u| x.iter().map(move |x| u * x));
                std::iter::repeat_n(0.0, self.vocab).chain(product).collect()
            }
        };
        let rows = self.head.chunks_exact(features.len());
        let logits: Vec<f64> = rows.map(|w| w.iter().zip(&features).map(|(w, f)| w * f).sum()).collect();
        log_softmax(&logits).unwrap_or(logits)
    }
}

/// `None` where every entry is −∞.
fn log_softmax(x: &[f64]) -> Option<Vec<f64>> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    max.is_finite().then(|| x.iter().map(|x| x - max - sum.ln()).collect())
}

/// A number that was checked to be none below 0.
fn index(i: i64) -> usize {
    usize::try_from(i).unwrap_or(0)
}

#[cfg(test)]
mod tests;
