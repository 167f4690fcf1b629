//! The encoder of T5 (Raffel et al. 2020), v1.0 and v1.1, by itself: a text encoder.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Activation, Embedding, Linear, RmsNorm};
use controlgen_core::{
    Attn, Dims, Encoder, EncoderInput, EncoderSpec, Features, Pass, Placement, Reads, Result, SiteId,
    SiteMap, Tokens, WeightMap,
};
use tch::Tensor;

use super::relative_bias::{Buckets, RelativeBias, masked};
use super::{encoder_mask, text_of};
use controlgen_core::config::{Config, limits};

/// The values of `model_type` that this file serves.
pub const MODEL_TYPES: [&str; 1] = ["t5"];

/// The dimensions of a T5.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// V
    pub vocab_size: i64,
    /// D
    pub d_model: i64,
    /// hd: H heads of it need not make D.
    pub d_kv: i64,
    /// Width of the feed-forward part.
    pub d_ff: i64,
    /// How many blocks the encoder has.
    pub num_layers: i64,
    /// How many blocks the decoder has.
    pub num_decoder_layers: i64,
    /// H
    pub num_heads: i64,
    /// Buckets of relative positions.
    pub relative_attention_num_buckets: i64,
    /// From this distance on positions share the last bucket.
    pub relative_attention_max_distance: i64,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// Of the feed-forward part: `feed_forward_proj` without `gated-`.
    pub activation: Activation,
    /// Whether the feed-forward part is gated (Shazeer 2020), as in v1.1.
    pub gated: bool,
    /// Whether the output product reads states divided by √D, as in v1.0.
    pub scale_decoder_outputs: bool,
}

impl T5Config {
    /// Reads config.json. Whether states are scaled before the output is for `scale_decoder_outputs` to say or, where it is
    /// absent, for `tie_word_embeddings`, which is false in v1.1 only.
    ///
    /// # Errors
    /// [`controlgen_core::Error::Config`] for what is missing or makes no sense.
    pub fn from_config(config: &Config) -> Result<Self> {
        let name = config.str("feed_forward_proj")?.unwrap_or("relu");
        let (gated, function) = match name.strip_prefix("gated-") {
            // What v1.1 calls gelu is the approximation by tanh.
            Some("gelu") => (true, "gelu_new"),
            Some(function) => (true, function),
            None => (false, name),
        };
        let activation = Activation::from_name(function)
            .map_err(|_| config.error("feed_forward_proj", "`relu`, `gated-gelu` or the like", name))?;
        let num_layers = config.int("num_layers", 1, limits::LAYERS)?;
        let buckets = config.int_if("relative_attention_num_buckets", 4, 1 << 16)?.unwrap_or(32);
        let distance = config.int_if("relative_attention_max_distance", 1, 1 << 20)?.unwrap_or(128);
        if distance <= buckets >> 1 {
            let expected = format!("more than half of relative_attention_num_buckets = {buckets}");
            return Err(config.error("relative_attention_max_distance", expected, distance));
        }
        let tied = config.bool("tie_word_embeddings", true)?;
        Ok(Self {
            vocab_size: config.int("vocab_size", 1, limits::VOCAB)?,
            d_model: config.int("d_model", 1, limits::WIDTH)?,
            d_kv: config.int("d_kv", 1, limits::WIDTH)?,
            d_ff: config.int("d_ff", 1, limits::WIDTH)?,
            num_layers,
            num_decoder_layers: config.int_if("num_decoder_layers", 1, limits::LAYERS)?.unwrap_or(num_layers),
            num_heads: config.int("num_heads", 1, limits::HEADS)?,
            relative_attention_num_buckets: buckets,
            relative_attention_max_distance: distance,
            layer_norm_epsilon: config.positive("layer_norm_epsilon", Some(1e-6))?,
            activation,
            gated,
            scale_decoder_outputs: config.bool("scale_decoder_outputs", tied)?,
        })
    }

    /// H · hd
    pub(super) fn inner(&self) -> i64 {
        self.num_heads * self.d_kv
    }

    pub(super) fn buckets(&self, bidirectional: bool) -> Buckets {
        let (count, max_distance) =
            (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        Buckets { count, max_distance, bidirectional }
    }

    pub(super) fn attention(&self, cross: bool) -> Dims {
        Dims::Attention { heads: self.num_heads, kv_heads: self.num_heads, head_dim: self.d_kv, cross }
    }
}

/// Loads layers below a place in the checkpoint and declares their sites: names are the same.
pub(super) struct Loader<'l, 'w> {
    pub weights: &'l Weights<'w>,
    pub sites: &'l mut SiteMap,
    pub config: &'l T5Config,
}

impl Loader<'_, '_> {
    /// One product of several parts of `outputs` each.
    pub fn linear(&mut self, path: &str, parts: &[&str], (inputs, outputs): (i64, i64)) -> Result<Linear> {
        let names: Vec<String> = parts.iter().map(|part| format!("{path}.{part}")).collect();
        let tensors: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
        let shape = [outputs, inputs];
        let shapes: Vec<(&str, &[i64])> = tensors.iter().map(|name| (name.as_str(), &shape[..])).collect();
        let dims = Dims::Linear { inputs, outputs };
        let sites: Vec<(SiteId, i64)> =
            names.into_iter().map(|name| (self.sites.add(name, dims), outputs)).collect();
        Linear::new(self.weights.fused(&shapes)?, None, &sites)
    }

    /// A norm of states.
    pub fn norm(&self, path: &str) -> Result<RmsNorm> {
        let weight = self.weights.get(&format!("{path}.weight"), &[self.config.d_model])?;
        Ok(RmsNorm::new(weight, self.config.layer_norm_epsilon))
    }

    /// A site of the residual stream.
    pub fn hidden(&mut self, path: &str) -> SiteId {
        self.sites.add(path, Dims::Hidden { width: self.config.d_model })
    }

    /// The shared table of embeddings, as the encoder's or the decoder's: two sites, each of which sees its own tokens.
    pub fn embedding(&mut self, path: &str, table: &Tensor) -> Embedding {
        let dims = Dims::Embedding { rows: self.config.vocab_size, width: self.config.d_model };
        let site = self.sites.add(format!("{path}.embed_tokens"), dims);
        Embedding::new(table.shallow_clone(), site)
    }

    /// Attention over the same sequence.
    pub fn self_attention(&mut self, path: &str) -> Result<SelfAttention> {
        let (d, inner) = (self.config.d_model, self.config.inner());
        let name = format!("{path}.SelfAttention");
        Ok(SelfAttention {
            norm: self.norm(&format!("{path}.layer_norm"))?,
            qkv: self.linear(&name, &["q", "k", "v"], (d, inner))?,
            attention: self.sites.add(name.as_str(), self.config.attention(false)),
            o: self.linear(&name, &["o"], (inner, d))?,
            branch: self.hidden(path),
        })
    }

    pub fn feed_forward(&mut self, path: &str) -> Result<FeedForward> {
        let c = self.config;
        let name = format!("{path}.DenseReluDense");
        let parts: &[&str] = if c.gated { &["wi_0", "wi_1"] } else { &["wi"] };
        Ok(FeedForward {
            norm: self.norm(&format!("{path}.layer_norm"))?,
            wi: self.linear(&name, parts, (c.d_model, c.d_ff))?,
            wo: self.linear(&name, &["wo"], (c.d_ff, c.d_model))?,
            branch: self.hidden(path),
        })
    }
}

/// Attention over the same sequence, with its norm.
pub(super) struct SelfAttention {
    pub norm: RmsNorm,
    /// Queries, keys and values in one product.
    pub qkv: Linear,
    pub attention: SiteId,
    pub o: Linear,
    pub branch: SiteId,
}

impl SelfAttention {
    pub fn share(&self) -> Self {
        Self { norm: self.norm.handle(), qkv: self.qkv.handle(), o: self.o.handle(), ..*self }
    }

    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let qkv = self.qkv.map_weights(f)?;
        Ok(Self { qkv, o: self.o.map_weights(f)?, ..self.share() })
    }

    /// Queries, keys and values `[B, H, T, hd]` of states `[B, T, D]`.
    pub fn project(&self, c: &T5Config, x: &Tensor, pass: &Pass<'_>) -> Result<[Tensor; 3]> {
        let &[b, t, ..] = x.size().as_slice() else {
            return Err(controlgen_core::Error::shape("states", "[B, T, D]", &x.size()));
        };
        let qkv = self.qkv.forward(&self.norm.forward(x)?, pass)?.f_view([b, t, 3, c.num_heads, c.d_kv])?;
        let part = |n| -> Result<Tensor> { Ok(qkv.f_select(2, n)?.f_transpose(1, 2)?) };
        Ok([part(0)?, part(1)?, part(2)?])
    }
}

/// The output of an attention `[B, H, T, hd]`, added to the stream x `[B, T, D]`.
pub(super) fn add_attended(
    x: &Tensor,
    attended: &Tensor,
    o: &Linear,
    branch: SiteId,
    pass: &Pass<'_>,
) -> Result<Tensor> {
    let y = attended.f_transpose(1, 2)?.f_flatten(2, 3)?; // (B, T, H · hd)
    let y = o.forward(&y, pass)?;
    Ok(x.f_add(&pass.hidden(branch, y, x)?)?)
}

/// The feed-forward part, plain or gated, with its norm.
pub(super) struct FeedForward {
    norm: RmsNorm,
    /// One product, or gate and up in one.
    wi: Linear,
    wo: Linear,
    branch: SiteId,
}

impl FeedForward {
    pub fn share(&self) -> Self {
        Self { norm: self.norm.handle(), wi: self.wi.handle(), wo: self.wo.handle(), ..*self }
    }

    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let wi = self.wi.map_weights(f)?;
        Ok(Self { wi, wo: self.wo.map_weights(f)?, ..self.share() })
    }

    /// The stream x `[B, T, D]` with its branch added.
    pub fn forward(&self, c: &T5Config, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let y = self.wi.forward(&self.norm.forward(x)?, pass)?;
        let y = if c.gated {
            let gate = c.activation.forward(&y.f_narrow(-1, 0, c.d_ff)?)?;
            gate.f_mul(&y.f_narrow(-1, c.d_ff, c.d_ff)?)?
        } else {
            c.activation.forward(&y)?
        };
        let y = self.wo.forward(&y, pass)?;
        Ok(x.f_add(&pass.hidden(self.branch, y, x)?)?)
    }
}

/// The encoder's blocks.
pub(super) struct Stack {
    pub embed_tokens: Embedding,
    bias: RelativeBias,
    blocks: Vec<(SelfAttention, FeedForward)>,
    norm: RmsNorm,
    norm_site: SiteId,
}

impl Stack {
    /// Loads `encoder`, over the shared table.
    pub fn load(loader: &mut Loader<'_, '_>, table: &Tensor) -> Result<Self> {
        let c = loader.config;
        let embed_tokens = loader.embedding("encoder", table);
        let name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        let bias = RelativeBias::load(loader.weights, name, c.buckets(true), c.num_heads)?;
        let blocks = (0..c.num_layers)
            .map(|i| {
                let attention = loader.self_attention(&format!("encoder.block.{i}.layer.0"))?;
                Ok((attention, loader.feed_forward(&format!("encoder.block.{i}.layer.1"))?))
            })
            .collect::<Result<_>>()?;
        let norm = loader.norm("encoder.final_layer_norm")?;
        Ok(Self { embed_tokens, bias, blocks, norm, norm_site: loader.hidden("encoder.final_layer_norm") })
    }

    pub fn share(&self) -> Self {
        Self {
            embed_tokens: self.embed_tokens.handle(),
            bias: self.bias.handle(),
            blocks: self.blocks.iter().map(|(a, f)| (a.share(), f.share())).collect(),
            norm: self.norm.handle(),
            norm_site: self.norm_site,
        }
    }

    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let embed_tokens = self.embed_tokens.map_weights(f)?;
        let blocks = self.blocks.iter().map(|(a, ff)| Ok((a.map(f)?, ff.map(f)?))).collect::<Result<_>>()?;
        Ok(Self { embed_tokens, blocks, ..self.share() })
    }

    /// Hidden states `[B, T, D]` of tokens that were validated.
    pub fn forward(
        &self,
        c: &T5Config,
        tokens: Tokens<'_>,
        keep: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let mut x = self.embed_tokens.forward(tokens, pass)?; // (B, T, D)
        let mask = masked(self.bias.range(0, x.size()[1])?, &encoder_mask(keep, x.device())?)?;
        for (attention, feed_forward) in &self.blocks {
            let [q, k, v] = attention.project(c, &x, pass)?;
            let attn = Attn { q, k, v, mask: mask.handle(), scale: Some(1.0) };
            let y = pass.attention(attention.attention, attn)?;
            x = add_attended(&x, &y, &attention.o, attention.branch, pass)?;
            x = feed_forward.forward(c, &x, pass)?;
        }
        let x = self.norm.forward(&x)?;
        pass.hidden(self.norm_site, x.shallow_clone(), &x)
    }
}

/// The shared table, under any of its names, and what is left over of a checkpoint then.
pub(super) fn named<'a>(weights: &Weights<'a>) -> Weights<'a> {
    weights.rename(|name| {
        let mut names = vec![name.to_owned()];
        if name == "shared.weight" {
            names.extend(["encoder", "decoder"].map(|stack| format!("{stack}.embed_tokens.weight")));
        }
        names
    })
}

/// T5's encoder as a text encoder: `T5EncoderModel`, or the encoder of a whole T5.
pub struct T5Encoder {
    config: Arc<T5Config>,
    spec: EncoderSpec,
    sites: Arc<SiteMap>,
    stack: Stack,
}

impl T5Encoder {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`controlgen_core::Error::Config`]; [`controlgen_core::Error::Keys`], [`controlgen_core::Error::Shape`] where
    /// the checkpoint is not the model that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = T5Config::from_config(config)?;
        let (weights, mut sites) = (named(weights), SiteMap::new());
        let table = weights.get("shared.weight", &[c.vocab_size, c.d_model])?;
        let stack = Stack::load(&mut Loader { weights: &weights, sites: &mut sites, config: &c }, &table)?;
        weights.finish(&["*.embed_tokens.weight", "decoder.*", "lm_head.weight"])?;
        let spec = EncoderSpec {
            architecture: "t5".into(),
            width: c.d_model,
            pooled: None,
            reads: Reads::Text { vocab: c.vocab_size, context: None },
            placement,
        };
        Ok(Self { config: Arc::new(c), spec, sites: Arc::new(sites), stack })
    }

    /// Its dimensions.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            stack: self.stack.share(),
        }
    }
}

impl Encoder for T5Encoder {
    fn handle(&self) -> Box<dyn Encoder> {
        Box::new(self.share())
    }

    fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn embeddings(&self) -> Option<&Tensor> {
        Some(self.stack.embed_tokens.weight())
    }

    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let (tokens, keep) = text_of(input)?;
        let c = &*self.config;
        let (batch, _) = tokens.validate(keep, c.vocab_size, c.d_model, self.spec.placement.kind)?;
        pass.check(&self.sites, batch)?;
        Ok(Features { hidden: self.stack.forward(c, tokens, keep, pass)?, pooled: None })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(Self { stack: self.stack.map(f)?, ..self.share() }))
    }
}
