//! BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), which differs from it in how positions are counted.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Activation, Embedding, LayerNorm, Linear};
use controlgen_core::{
    Attn, Dims, Encoder, EncoderInput, EncoderSpec, Error, Features, Offset, Pass, Placement, Reads, Result,
    SiteId, SiteMap, Tokens, WeightMap,
};
use tch::{Kind, Tensor};

use super::{encoder_mask, text_of};
use controlgen_core::config::{Config, limits};

/// The values of `model_type` that this file serves.
pub const MODEL_TYPES: [&str; 2] = ["bert", "roberta"];

/// The dimensions of a BERT.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// `bert` or `roberta`: also what names of tensors begin with.
    pub model_type: &'static str,
    /// V
    pub vocab_size: i64,
    /// D
    pub hidden_size: i64,
    /// Width of the feed-forward part.
    pub intermediate_size: i64,
    /// How many blocks.
    pub num_hidden_layers: i64,
    /// H
    pub num_attention_heads: i64,
    /// Rows of the table of positions. RoBERTa's first position is `pad_token_id` + 1, so it has fewer.
    pub max_position_embeddings: i64,
    /// How many kinds of tokens there are: first and second text of a pair.
    pub type_vocab_size: i64,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Of the feed-forward part and of the head of the masked language model.
    pub hidden_act: Activation,
    /// The token that pads; RoBERTa counts positions without it.
    pub pad_token_id: i64,
    /// Whether the output of the masked language model shares the table of embeddings.
    pub tie_word_embeddings: bool,
}

impl BertConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for relative positions, decoders and
    /// other architectures.
    pub fn from_config(config: &Config) -> Result<Self> {
        let found = config.str("model_type")?;
        let model_type = MODEL_TYPES.into_iter().find(|name| found == Some(name)).ok_or_else(|| {
            let what = format!("model_type `{}`", found.unwrap_or("nothing"));
            Error::unsupported(what, MODEL_TYPES.join(", "))
        })?;
        if let Some(kind) = config.str("position_embedding_type")?.filter(|&kind| kind != "absolute") {
            return Err(Error::unsupported(format!("position_embedding_type `{kind}`"), "absolute"));
        }
        for field in ["is_decoder", "add_cross_attention"] {
            if config.bool(field, false)? {
                return Err(Error::unsupported(format!("{field} of a {model_type}"), "encoders"));
            }
        }
        let hidden_size = config.int("hidden_size", 1, limits::WIDTH)?;
        let heads = config.int("num_attention_heads", 1, limits::HEADS)?;
        if hidden_size % heads != 0 {
            let expected = format!("a multiple of num_attention_heads = {heads}");
            return Err(config.error("hidden_size", expected, hidden_size));
        }
        let roberta = model_type == "roberta";
        let vocab_size = config.int("vocab_size", 1, limits::VOCAB)?;
        let pad = config.int_if("pad_token_id", 0, vocab_size - 1)?.unwrap_or(i64::from(roberta));
        let least = if roberta { pad + 2 } else { 1 };
        Ok(Self {
            model_type,
            vocab_size,
            hidden_size,
            intermediate_size: config.int("intermediate_size", 1, limits::WIDTH)?,
            num_hidden_layers: config.int("num_hidden_layers", 1, limits::LAYERS)?,
            num_attention_heads: heads,
            max_position_embeddings: config.int("max_position_embeddings", least, limits::CONTEXT)?,
            type_vocab_size: config.int_if("type_vocab_size", 1, limits::VOCAB)?.unwrap_or(2),
            layer_norm_eps: config.positive("layer_norm_eps", Some(1e-12))?,
            hidden_act: Activation::from_name(config.str("hidden_act")?.unwrap_or("gelu"))?,
            pad_token_id: pad,
            tie_word_embeddings: config.bool("tie_word_embeddings", true)?,
        })
    }

    fn roberta(&self) -> bool {
        self.model_type == "roberta"
    }

    /// The longest sequence.
    pub fn context(&self) -> i64 {
        self.max_position_embeddings - if self.roberta() { self.pad_token_id + 1 } else { 0 }
    }
}

/// What a BERT is given.
#[derive(Clone, Copy)]
pub struct BertInput<'a> {
    /// Ids `[B, T]`, or embeddings `[B, T, D]` of the tokens alone.
    pub tokens: Tokens<'a>,
    /// Boolean `[B, T]`, false for padding; all true where `None`.
    pub keep: Option<&'a Tensor>,
    /// The kind of each token, int64 `[B, T]`: 0 where `None`.
    pub token_types: Option<&'a Tensor>,
    /// Rows of the table of positions, int64 `[B, T]`. Where `None`: BERT counts from 0, padding included; RoBERTa from
    /// `pad_token_id` + 1 without the ids that are `pad_token_id`, or without padding where embeddings are given.
    pub positions: Option<&'a Tensor>,
}

impl<'a> BertInput<'a> {
    /// Tokens and which of them are no padding.
    pub fn new(tokens: Tokens<'a>, keep: Option<&'a Tensor>) -> Self {
        Self { tokens, keep, token_types: None, positions: None }
    }
}

/// A BERT's blocks, without what is put on top of them.
pub(super) struct Body {
    pub config: Arc<BertConfig>,
    placement: Placement,
    pub word_embeddings: Embedding,
    /// `[max_position_embeddings, D]`
    position_embeddings: Tensor,
    /// `[type_vocab_size, D]`
    token_type_embeddings: Tensor,
    norm: LayerNorm,
    layers: Vec<Block>,
    encoder: SiteId,
}

struct Block {
    /// Queries, keys and values in one product.
    qkv: Linear,
    attention: SiteId,
    attention_dense: Linear,
    attention_branch: SiteId,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output_dense: Linear,
    output_branch: SiteId,
    output_norm: LayerNorm,
}

/// `{name}.weight` and `{name}.bias` as a norm.
pub(super) fn layer_norm(weights: &Weights<'_>, name: &str, c: &BertConfig) -> Result<LayerNorm> {
    let weight = weights.get(&format!("{name}.weight"), &[c.hidden_size])?;
    let bias = weights.get(&format!("{name}.bias"), &[c.hidden_size])?;
    Ok(LayerNorm::new(weight, Some(bias), c.layer_norm_eps))
}

/// `{name}.weight` and `{name}.bias` as a linear site `{prefix}{name}`.
pub(super) fn linear(
    weights: &Weights<'_>,
    sites: &mut SiteMap,
    (prefix, name): (&str, &str),
    (inputs, outputs): (i64, i64),
) -> Result<Linear> {
    let weight = weights.get(&format!("{name}.weight"), &[outputs, inputs])?;
    let bias = weights.get(&format!("{name}.bias"), &[outputs])?;
    let site = sites.add(format!("{prefix}{name}"), Dims::Linear { inputs, outputs });
    Linear::new(weight, Some(bias), &[(site, outputs)])
}

impl Body {
    /// Loads what is below `weights`; its sites begin with `prefix`.
    pub fn load(
        c: BertConfig,
        weights: &Weights<'_>,
        sites: &mut SiteMap,
        prefix: &str,
        placement: Placement,
    ) -> Result<Self> {
        let (d, ff, h) = (c.hidden_size, c.intermediate_size, c.num_attention_heads);
        let w = weights.scope("embeddings");
        let table = w.get("word_embeddings.weight", &[c.vocab_size, d])?;
        let name = format!("{prefix}embeddings.word_embeddings");
        let site = sites.add(name, Dims::Embedding { rows: c.vocab_size, width: d });
        let word_embeddings = Embedding::new(table, site);
        let position_embeddings = w.get("position_embeddings.weight", &[c.max_position_embeddings, d])?;
        let token_type_embeddings = w.get("token_type_embeddings.weight", &[c.type_vocab_size, d])?;
        let norm = layer_norm(&w, "LayerNorm", &c)?;
        let mut layers = Vec::new();
        for i in 0..c.num_hidden_layers {
            let path = format!("encoder.layer.{i}");
            let (w, at) = (weights.scope(&path), format!("{prefix}{path}."));
            let names = ["query", "key", "value"].map(|part| format!("attention.self.{part}"));
            let parts: Vec<(SiteId, i64)> = names
                .iter()
                .map(|name| (sites.add(format!("{at}{name}"), Dims::Linear { inputs: d, outputs: d }), d))
                .collect();
            let fused = |what: &str, shape: &[i64]| -> Result<Tensor> {
                let names = names.each_ref().map(|name| format!("{name}.{what}"));
                w.fused(&names.each_ref().map(|name| (name.as_str(), shape)))
            };
            let qkv = Linear::new(fused("weight", &[d, d])?, Some(fused("bias", &[d])?), &parts)?;
            let attention =
                Dims::Attention { heads: h, kv_heads: h, head_dim: d.div_euclid(h), cross: false };
            let hidden = Dims::Hidden { width: d };
            layers.push(Block {
                qkv,
                attention: sites.add(format!("{at}attention.self"), attention),
                attention_dense: linear(&w, sites, (&at, "attention.output.dense"), (d, d))?,
                attention_branch: sites.add(format!("{at}attention"), hidden),
                attention_norm: layer_norm(&w, "attention.output.LayerNorm", &c)?,
                intermediate: linear(&w, sites, (&at, "intermediate.dense"), (d, ff))?,
                output_dense: linear(&w, sites, (&at, "output.dense"), (ff, d))?,
                output_branch: sites.add(format!("{at}output"), hidden),
                output_norm: layer_norm(&w, "output.LayerNorm", &c)?,
            });
        }
        Ok(Self {
            config: Arc::new(c),
            placement,
            word_embeddings,
            position_embeddings,
            token_type_embeddings,
            norm,
            layers,
            encoder: sites.add(format!("{prefix}encoder"), Dims::Hidden { width: d }),
        })
    }

    /// Another handle over the same storage.
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            placement: self.placement,
            word_embeddings: self.word_embeddings.handle(),
            position_embeddings: self.position_embeddings.shallow_clone(),
            token_type_embeddings: self.token_type_embeddings.shallow_clone(),
            norm: self.norm.handle(),
            layers: self.layers.iter().map(Block::share).collect(),
            encoder: self.encoder,
        }
    }

    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let word_embeddings = self.word_embeddings.map_weights(f)?;
        let layers = self.layers.iter().map(|block| block.map(f)).collect::<Result<_>>()?;
        Ok(Self { word_embeddings, layers, ..self.share() })
    }

    /// Hidden states `[B, T, D]`.
    pub fn forward(&self, input: BertInput<'_>, sites: &SiteMap, pass: &Pass<'_>) -> Result<Tensor> {
        let c = &*self.config;
        let (b, t) = input.tokens.validate(input.keep, c.vocab_size, c.hidden_size, self.placement.kind)?;
        pass.check(sites, b)?;
        let mask = encoder_mask(input.keep, self.placement.device)?;
        let places = self.places(&input, (b, t), &pass.position_offset()?)?; // (1 or B, T, D)

        let x = self.word_embeddings.forward(input.tokens, pass)?;
        let mut x = self.norm.forward(&x.f_add(&places)?)?; // (B, T, D)
        for block in &self.layers {
            let qkv = block.qkv.forward(&x, pass)?;
            let qkv = qkv.f_view([b, t, 3, c.num_attention_heads, -1])?;
            let part = |n| qkv.f_select(2, n)?.f_transpose(1, 2); // (B, H, T, hd)
            let attn = Attn { q: part(0)?, k: part(1)?, v: part(2)?, mask: mask.handle(), scale: None };
            let y = pass.attention(block.attention, attn)?;
            let y = y.f_transpose(1, 2)?.f_reshape([b, t, c.hidden_size])?;
            let y = block.attention_dense.forward(&y, pass)?;
            x = block.attention_norm.forward(&x.f_add(&pass.hidden(block.attention_branch, y, &x)?)?)?;

            let y = c.hidden_act.forward(&block.intermediate.forward(&x, pass)?)?;
            let y = block.output_dense.forward(&y, pass)?;
            x = block.output_norm.forward(&x.f_add(&pass.hidden(block.output_branch, y, &x)?)?)?;
        }
        pass.hidden(self.encoder, x.shallow_clone(), &x)
    }

    /// What is added to the embeddings of tokens for where they stand and of which kind they are: `[1 or B, T, D]`.
    fn places(&self, input: &BertInput<'_>, (b, t): (i64, i64), offset: &Offset) -> Result<Tensor> {
        let c = &*self.config;
        let needed = t + offset.most();
        if needed > c.context() {
            return Err(Error::Context { limit: c.context(), needed });
        }
        let rows = |what: &str, given: &Tensor, table: &Tensor| -> Result<Tensor> {
            if given.f_kind()? != Kind::Int64 {
                let (expected, found) = ("Int64".to_owned(), format!("{:?}", given.f_kind()?));
                return Err(Error::Kind { what: what.to_owned(), expected, found });
            }
            if given.size() != [b, t] {
                return Err(Error::shape(what, format!("[{b}, {t}]"), &given.size()));
            }
            let (low, high) = given.f_aminmax(None, false)?;
            let (low, high, limit) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?, table.size()[0]);
            if low < 0 || high >= limit {
                let found = if low < 0 { low } else { high };
                return Err(Error::value(what, format!("0 .. {limit}"), found));
            }
            Ok(Tensor::f_embedding(table, &given.f_to_device(table.device())?, -1, false, false)?)
        };
        let places = match (input.positions, self.positions(input, (b, t), offset)?) {
            (Some(given), _) => rows("positions", given, &self.position_embeddings)?,
            (None, Positions::Range(start)) => {
                self.position_embeddings.f_narrow(0, start, t)?.f_unsqueeze(0)?
            }
            (None, Positions::Rows(at)) => {
                Tensor::f_embedding(&self.position_embeddings, &at, -1, false, false)?
            }
        };
        Ok(match input.token_types {
            None => places.f_add(&self.token_type_embeddings.f_get(0)?)?,
            Some(types) => places.f_add(&rows("token types", types, &self.token_type_embeddings)?)?,
        })
    }

    /// The rows of the table of positions that are counted.
    fn positions(&self, input: &BertInput<'_>, (b, t): (i64, i64), offset: &Offset) -> Result<Positions> {
        let c = &*self.config;
        let device = self.placement.device;
        let real = match (c.roberta(), input.tokens) {
            (true, Tokens::Ids(ids)) => Some(ids.f_ne(c.pad_token_id)?),
            (true, Tokens::Embeds(_)) => input.keep.map(Tensor::shallow_clone),
            (false, _) => None,
        };
        let first = if c.roberta() { c.pad_token_id + 1 } else { 0 };
        let offset = match offset {
            Offset::All(n) if real.is_none() => return Ok(Positions::Range(first + n)),
            Offset::All(n) => Tensor::f_full([1, 1], *n, (Kind::Int64, device))?,
            Offset::Rows(rows) if i64::try_from(rows.len()) != Ok(b) => {
                return Err(Error::value("rows of the position offset", b, rows.len()));
            }
            Offset::Rows(rows) => Tensor::f_from_slice(rows)?.f_to_device(device)?.f_unsqueeze(1)?,
        };
        let Some(real) = real else {
            let range = Tensor::f_arange_start(first, first + t, (Kind::Int64, device))?;
            return Ok(Positions::Rows(range.f_unsqueeze(0)?.f_add(&offset)?));
        };
        // Padding stands at `pad_token_id`, the first token right after it.
        let real = real.f_to_device(device)?.f_to_kind(Kind::Int64)?;
        let counted = real.f_cumsum(1, Kind::Int64)?.f_add(&offset)?.f_mul(&real)?;
        Ok(Positions::Rows(counted.f_add_scalar(c.pad_token_id)?))
    }
}

enum Positions {
    /// `start .. start + T` in every row
    Range(i64),
    /// `[B, T]`
    Rows(Tensor),
}

impl Block {
    fn share(&self) -> Self {
        Self {
            qkv: self.qkv.handle(),
            attention_dense: self.attention_dense.handle(),
            attention_norm: self.attention_norm.handle(),
            intermediate: self.intermediate.handle(),
            output_dense: self.output_dense.handle(),
            output_norm: self.output_norm.handle(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            qkv: self.qkv.map_weights(f)?,
            attention_dense: self.attention_dense.map_weights(f)?,
            intermediate: self.intermediate.map_weights(f)?,
            output_dense: self.output_dense.map_weights(f)?,
            ..self.share()
        })
    }
}

/// A BERT or RoBERTa as an encoder. Its pooled feature is tanh(W h₀ + b) of the first position, where the checkpoint has a
/// pooler.
pub struct Bert {
    body: Body,
    pooler: Option<Linear>,
    spec: EncoderSpec,
    sites: Arc<SiteMap>,
}

impl Bert {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = BertConfig::from_config(config)?;
        let weights = named(weights, &c);
        let root = weights.scope(c.model_type);
        let (d, mut sites) = (c.hidden_size, SiteMap::new());
        let body = Body::load(c, &root, &mut sites, "", placement)?;
        let pooled = root.find("pooler.dense.weight").is_some();
        let pooler = pooled.then(|| linear(&root, &mut sites, ("", "pooler.dense"), (d, d))).transpose()?;
        // Heads of other tasks, and positions that old files count out.
        weights.finish(&["*position_ids", "cls.*", "lm_head.*", "classifier.*", "qa_outputs.*"])?;
        let spec = EncoderSpec {
            architecture: body.config.model_type.to_owned(),
            width: d,
            pooled: pooler.is_some().then_some(d),
            reads: Reads::Text { vocab: body.config.vocab_size, context: Some(body.config.context()) },
            placement,
        };
        Ok(Self { body, pooler, spec, sites: Arc::new(sites) })
    }

    /// Its dimensions.
    pub fn config(&self) -> &BertConfig {
        &self.body.config
    }

    /// Encodes, with everything that a BERT can be told.
    ///
    /// # Errors
    /// As [`Encoder::encode`]; [`Error::Value`] for a kind of token or a position that is none.
    pub fn forward(&self, input: BertInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let hidden = self.body.forward(input, &self.sites, pass)?;
        let pooled = self.pooler.as_ref().map(|pooler| pool(pooler, &hidden, pass)).transpose()?;
        Ok(Features { hidden, pooled })
    }

    fn share(&self) -> Self {
        Self {
            body: self.body.share(),
            pooler: self.pooler.as_ref().map(Linear::handle),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
        }
    }
}

/// tanh(W h₀ + b): hidden states `[B, T, D]` to `[B, D]`.
pub(super) fn pool(pooler: &Linear, hidden: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
    Ok(pooler.forward(&hidden.f_select(1, 0)?, pass)?.f_tanh()?)
}

/// The same tensors under the names that older files have: without the prefix of a head's body, with γ and β for a norm's
/// weight and bias, and with the bias of the output beside the output product.
pub(super) fn named<'a>(weights: &Weights<'a>, c: &BertConfig) -> Weights<'a> {
    let prefix = format!("{}.", c.model_type);
    weights.rename(move |name| {
        let mut names = vec![name.to_owned()];
        names.extend(name.strip_prefix(&prefix).map(str::to_owned));
        for (new, old) in [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")] {
            let older: Vec<String> =
                names.iter().filter_map(|name| Some(format!("{}{old}", name.strip_suffix(new)?))).collect();
            names.extend(older);
        }
        if matches!(name, "cls.predictions.decoder.bias" | "lm_head.decoder.bias") {
            names.push(name.replace(".decoder.bias", ".bias"));
        }
        names
    })
}

impl Encoder for Bert {
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
        Some(self.body.word_embeddings.weight())
    }

    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let (tokens, keep) = text_of(input)?;
        self.forward(BertInput::new(tokens, keep), pass)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>> {
        let body = self.body.map(f)?;
        let pooler = self.pooler.as_ref().map(|pooler| pooler.map_weights(f)).transpose()?;
        Ok(Box::new(Self { body, pooler, ..self.share() }))
    }
}
