//! T5 (Raffel et al. 2020), v1.0 and v1.1, and Flan-T5 (Chung et al. 2022): an encoder and a decoder.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Embedding, Linear, RmsNorm};
use controlgen_core::{
    Attn, Dims, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Mask, Offset, Pass, Placement,
    Result, SiteId, SiteMap, Source, State, StateImpl, WeightMap,
};
use tch::{Kind, Tensor};

use super::kv_cache::{KvCache, Placed};
use super::relative_bias::{RelativeBias, masked};
use super::t5_encoder::{FeedForward, Loader, SelfAttention, Stack, T5Config, add_attended, named};
use super::{encoder_mask, map_output, output_product, special_tokens};
use controlgen_core::config::{Config, limits};

/// A T5. Its prompt is the encoder's input ([`Source::Encoder`]); its decoder reads what has been said so far, from
/// [`LmSpec::decoder_start`] on.
///
/// Positions are relative, so it has no longest sequence. Keys and values of the encoder's states are computed in
/// [`LanguageModel::start`], and so it is that pass's controls that act on the encoder and at `EncDecAttention.k` and `.v`.
pub struct T5 {
    config: Arc<T5Config>,
    spec: LmSpec,
    sites: Arc<SiteMap>,
    encoder: Stack,
    embed_tokens: Embedding,
    bias: RelativeBias,
    blocks: Vec<Block>,
    norm: RmsNorm,
    norm_site: SiteId,
    lm_head: Linear,
    tied: bool,
}

struct Block {
    self_attention: SelfAttention,
    cross_norm: RmsNorm,
    cross_q: Linear,
    /// Keys and values of the encoder's states, in one product.
    cross_kv: Linear,
    cross_attention: SiteId,
    cross_o: Linear,
    cross_branch: SiteId,
    feed_forward: FeedForward,
}

/// What a T5 remembers: what its decoder has read, and what its encoder made of the input.
struct T5State {
    cache: KvCache,
    /// Of all tokens read, `[B, len]`; `None` while they are 0 .. len in every row.
    positions: Option<Tensor>,
    /// Keys and values of the encoder's states by layer, `[B, H, S, hd]`.
    cross: Vec<(Tensor, Tensor)>,
    /// What queries see of them: all, or boolean `[B, 1, 1, S]`.
    mask: Mask,
    /// Which row of the encoder's input each row goes on from: beams of one prompt share theirs.
    origin: Vec<i64>,
}

const EXPECTED: &str = "one that this model started";

impl T5 {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model that the configuration
    /// describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = T5Config::from_config(config)?;
        let (d, inner) = (c.d_model, c.inner());
        let (weights, mut sites) = (named(weights), SiteMap::new());
        let table = weights.get("shared.weight", &[c.vocab_size, d])?;
        let mut loader = Loader { weights: &weights, sites: &mut sites, config: &c };
        let encoder = Stack::load(&mut loader, &table)?;
        let embed_tokens = loader.embedding("decoder", &table);
        let name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let bias = RelativeBias::load(&weights, name, c.buckets(false), c.num_heads)?;
        let mut blocks = Vec::new();
        for i in 0..c.num_decoder_layers {
            let layer = |n: i64| format!("decoder.block.{i}.layer.{n}");
            let (path, name) = (layer(1), format!("{}.EncDecAttention", layer(1)));
            blocks.push(Block {
                self_attention: loader.self_attention(&layer(0))?,
                cross_norm: loader.norm(&format!("{path}.layer_norm"))?,
                cross_q: loader.linear(&name, &["q"], (d, inner))?,
                cross_kv: loader.linear(&name, &["k", "v"], (d, inner))?,
                cross_attention: loader.sites.add(name.as_str(), c.attention(true)),
                cross_o: loader.linear(&name, &["o"], (inner, d))?,
                cross_branch: loader.hidden(&path),
                feed_forward: loader.feed_forward(&layer(2))?,
            });
        }
        let norm = loader.norm("decoder.final_layer_norm")?;
        let norm_site = loader.hidden("decoder.final_layer_norm");
        // An output of its own, as in v1.1, is one that the checkpoint has: later configurations always say it is tied.
        let (weight, tied) = output_product(&weights, "lm_head.weight", &table, true)?;
        let dims = Dims::Linear { inputs: d, outputs: c.vocab_size };
        let lm_head = Linear::new(weight, None, &[(sites.add("lm_head", dims), c.vocab_size)])?;
        let unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        weights.finish(&["*.embed_tokens.weight", unused])?;
        let (bos, eos, pad) = special_tokens(config, c.vocab_size)?;
        let start =
            config.int_if("decoder_start_token_id", 0, c.vocab_size - 1)?.or(pad).ok_or_else(|| {
                config.error("decoder_start_token_id", "the token that a decoder starts with", "nothing")
            })?;
        let spec = LmSpec {
            architecture: "t5".into(),
            vocab: c.vocab_size,
            width: d,
            context: limits::CONTEXT,
            bos,
            eos,
            pad,
            decoder_start: Some(start),
            placement,
        };
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            encoder,
            embed_tokens,
            bias,
            blocks,
            norm,
            norm_site,
            lm_head,
            tied,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// The encoder's states `[B, S, D]`, as [`LanguageModel::start`] computes them.
    ///
    /// # Errors
    /// As there.
    pub fn encode(&self, input: LmInput<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let (rows, _) = input.validate(&self.spec)?;
        pass.check(&self.sites, rows)?;
        if input.positions.is_some() {
            return Err(Error::unsupported("positions given to an encoder of relative positions", "None"));
        }
        self.encoder.forward(&self.config, input.tokens, input.keep, pass)
    }

    /// What the decoder's new queries see of all keys, and how far away.
    fn seen(&self, placed: &Placed, positions: Option<&Tensor>, held: i64) -> Result<Mask> {
        let bias = match positions {
            None => self.bias.range(held, placed.len)?,
            Some(keys) => self.bias.at(&keys.f_narrow(1, held, placed.len)?, keys)?,
        };
        masked(bias, &placed.mask)
    }

    /// Another handle over the same storage.
    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            encoder: self.encoder.share(),
            embed_tokens: self.embed_tokens.handle(),
            bias: self.bias.handle(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            norm: self.norm.handle(),
            norm_site: self.norm_site,
            lm_head: self.lm_head.handle(),
            tied: self.tied,
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let encoder = self.encoder.map(f)?;
        let embed_tokens = self.embed_tokens.map_weights(f)?;
        let blocks = self.blocks.iter().map(|block| block.map(f)).collect::<Result<_>>()?;
        let tables = self.tied.then_some((&self.embed_tokens, &embed_tokens));
        let lm_head = map_output(&self.lm_head, tables, f)?;
        Ok(Self { encoder, embed_tokens, blocks, lm_head, ..self.share() })
    }
}

impl Block {
    fn share(&self) -> Self {
        Self {
            self_attention: self.self_attention.share(),
            cross_norm: self.cross_norm.handle(),
            cross_q: self.cross_q.handle(),
            cross_kv: self.cross_kv.handle(),
            cross_o: self.cross_o.handle(),
            feed_forward: self.feed_forward.share(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            self_attention: self.self_attention.map(f)?,
            cross_q: self.cross_q.map_weights(f)?,
            cross_kv: self.cross_kv.map_weights(f)?,
            cross_o: self.cross_o.map_weights(f)?,
            feed_forward: self.feed_forward.map(f)?,
            ..self.share()
        })
    }
}

impl LanguageModel for T5 {
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
        self.embed_tokens.weight()
    }

    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        let Source::Encoder(input) = source else {
            return Err(Error::unsupported(
                "an encoder–decoder without its encoder's input",
                "Source::Encoder",
            ));
        };
        let states = self.encode(input, pass)?; // (B, S, D)
        let &[rows, len, _] = states.size().as_slice() else {
            return Err(Error::shape("the encoder's states", "[B, S, D]", &states.size()));
        };
        let c = &*self.config;
        let cross = self.blocks.iter().map(|block| {
            let kv = block.cross_kv.forward(&states, pass)?.f_view([rows, len, 2, c.num_heads, c.d_kv])?;
            let part = |n| kv.f_select(2, n)?.f_transpose(1, 2)?.f_contiguous(); // (B, H, S, hd)
            Ok((part(0)?, part(1)?))
        });
        Ok(State::new(T5State {
            cross: cross.collect::<Result<_>>()?,
            cache: KvCache::new(&self.sites, self.blocks.len(), rows, self.spec.context),
            positions: None,
            mask: encoder_mask(input.keep, self.spec.placement.device)?,
            origin: (0..rows).collect(),
        }))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (b, t) = input.validate(&self.spec)?;
        pass.check(&self.sites, b)?;
        let state: &mut T5State = state.downcast(EXPECTED)?;
        state.cache.check(&self.sites)?;
        // Only how far tokens stand apart counts: what controls put before them does not move them.
        let placed = state.cache.place(&input, (b, t), &Offset::default(), self.spec.placement)?;
        let positions = state.positions_with(&placed, (b, t))?;
        let mask = self.seen(&placed, positions.as_ref(), state.cache.len())?;
        let c = &*self.config;

        let mut x = self.embed_tokens.forward(input.tokens, pass)?; // (B, T, D)
        for (i, (block, (ck, cv))) in self.blocks.iter().zip(&state.cross).enumerate() {
            let own = &block.self_attention;
            let [q, k, v] = own.project(c, &x, pass)?;
            let (k, v) = state.cache.push(i, &k, &v)?;
            let attn = Attn { q, k, v, mask: mask.handle(), scale: Some(1.0) };
            let y = pass.attention(own.attention, attn)?;
            x = add_attended(&x, &y, &own.o, own.branch, pass)?;

            let q = block.cross_q.forward(&block.cross_norm.forward(&x)?, pass)?;
            let q = q.f_view([b, t, c.num_heads, c.d_kv])?.f_transpose(1, 2)?; // (B, H, T, hd)
            let (k, v) = (ck.shallow_clone(), cv.shallow_clone());
            let attn = Attn { q, k, v, mask: state.mask.handle(), scale: Some(1.0) };
            let y = pass.attention(block.cross_attention, attn)?;
            x = add_attended(&x, &y, &block.cross_o, block.cross_branch, pass)?;

            x = block.feed_forward.forward(c, &x, pass)?;
        }
        if input.logits == Logits::Last {
            x = x.f_narrow(1, t - 1, 1)?;
        }
        let x = self.norm.forward(&x)?;
        let mut x = pass.hidden(self.norm_site, x.shallow_clone(), &x)?;
        if c.scale_decoder_outputs {
            x = x.f_mul_scalar((c.d_model as f64).powf(-0.5))?;
        }
        let logits = self.lm_head.forward(&x, pass)?; // (B, T or 1, V)
        state.positions = positions;
        state.cache.commit(placed);
        Ok(LmOutput { logits })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(self.map(f)?))
    }
}

impl T5State {
    /// The positions of the tokens held and the new ones, `[B, len + T]`; `None` while they are 0, 1, 2 … in every row.
    fn positions_with(&self, placed: &Placed, (b, t): (i64, i64)) -> Result<Option<Tensor>> {
        let held = self.cache.len();
        let device = self.cross.first().map_or(tch::Device::Cpu, |(k, _)| k.device());
        let counted = |from, to| -> Result<Tensor> {
            let range = Tensor::f_arange_start(from, to, (Kind::Int64, device))?;
            Ok(range.f_unsqueeze(0)?.f_expand([b, -1], false)?)
        };
        let before = |known: &Option<Tensor>| match known {
            Some(known) => Ok(known.shallow_clone()),
            None => counted(0, held),
        };
        let new = match (placed.rows(), &self.positions) {
            (None, None) => return Ok(None),
            (Some(rows), _) => rows.f_expand([b, -1], false)?,
            (None, Some(_)) => counted(held, held + t)?,
        };
        Ok(Some(Tensor::f_cat(&[&before(&self.positions)?, &new], 1)?))
    }
}

impl StateImpl for T5State {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(Self {
            cache: self.cache.share(),
            positions: self.positions.as_ref().map(Tensor::shallow_clone),
            cross: self.cross.iter().map(|(k, v)| (k.shallow_clone(), v.shallow_clone())).collect(),
            mask: self.mask.handle(),
            origin: self.origin.clone(),
        }))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let of = |row: &i64| usize::try_from(*row).ok().and_then(|row| self.origin.get(row).copied());
        let origin: Vec<i64> = rows.iter().filter_map(of).collect();
        let device = self.cross.first().map_or(tch::Device::Cpu, |(k, _)| k.device());
        let index = Tensor::f_from_slice(rows)?.f_to_device(device)?;
        // Beams of the same prompts in the same places: the encoder's keys are theirs already.
        let moved = if origin == self.origin {
            None
        } else {
            let pick = |(k, v): &(Tensor, Tensor)| -> Result<(Tensor, Tensor)> {
                Ok((k.f_index_select(0, &index)?, v.f_index_select(0, &index)?))
            };
            let cross = self.cross.iter().map(pick).collect::<Result<Vec<_>>>()?;
            let mask = match &self.mask {
                Mask::Keep(keep) => Mask::Keep(keep.f_index_select(0, &index)?),
                other => other.handle(),
            };
            Some((cross, mask))
        };
        let positions = self.positions.as_ref().map(|all| all.f_index_select(0, &index)).transpose()?;
        self.cache.reorder(rows)?;
        // Only now: a cache that failed has no rows, and the rest is as it was.
        if let Some((cross, mask)) = moved {
            (self.cross, self.mask, self.origin) = (cross, mask, origin);
        }
        self.positions = positions;
        Ok(())
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        if let Some(positions) = &mut self.positions {
            *positions = positions.f_narrow(1, 0, len)?;
        }
        self.cache.truncate(len)
    }

    fn len(&self) -> i64 {
        self.cache.len()
    }

    fn rows(&self) -> i64 {
        self.cache.rows()
    }

    fn reserve(&mut self, len: i64) -> Result<()> {
        self.cache.reserve(len)
    }
}
