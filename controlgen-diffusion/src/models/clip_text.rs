//! CLIP's text encoder (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021).

use std::sync::Arc;

use controlgen_core::checkpoint::{Weights, prefixes};
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Embedding, LayerNorm, Linear};
use controlgen_core::{
    Dims, Encoder, EncoderInput, EncoderSpec, Error, Features, Mask, Offset, Pass, Placement, Reads, Result,
    SiteId, SiteMap, Tokens, WeightMap,
};
use tch::{Kind, Tensor};

use super::clip::{Block, ClipBlocks, Loader, tower_of};

/// The values of `model_type` that this file serves; of a whole `clip` it takes the text's part.
pub const MODEL_TYPES: [&str; 2] = ["clip_text_model", "clip"];

/// The dimensions of a CLIP text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    /// V
    pub vocab_size: i64,
    /// Its blocks.
    pub blocks: ClipBlocks,
    /// P: width of the projection, of a model that has one.
    pub projection_dim: i64,
    /// How many positions there are.
    pub max_position_embeddings: i64,
    /// The token that ends a text. `None` where the file says 2, which older ones say for all models: then it is the
    /// highest id of a row.
    pub eos_token_id: Option<i64>,
}

impl ClipTextConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for another architecture.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (config, projection_dim) = tower_of(config, &MODEL_TYPES, "text_config")?;
        let vocab_size = config.int("vocab_size", 1, limits::VOCAB)?;
        let eos = config.token_ids("eos_token_id", vocab_size.max(49408))?.first().copied().unwrap_or(49407);
        Ok(Self {
            vocab_size,
            blocks: ClipBlocks::from_config(&config)?,
            projection_dim,
            max_position_embeddings: config
                .int_if("max_position_embeddings", 1, limits::CONTEXT)?
                .unwrap_or(77),
            eos_token_id: Some(eos).filter(|&eos| eos != 2),
        })
    }
}

/// Which states are the features of the positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClipLayer {
    /// How many blocks before the end: 0 for the last one's states, 1 for the penultimate one's.
    pub before_last: usize,
    /// Whether they go through the final norm.
    pub norm: bool,
}

impl ClipLayer {
    /// What the whole encoder gives: transformers' `last_hidden_state`.
    pub const LAST: Self = Self { before_last: 0, norm: true };
    /// What Stable Diffusion XL reads: `hidden_states[-2]`, without the final norm.
    pub const PENULTIMATE: Self = Self { before_last: 1, norm: false };
}

/// What a CLIP text encoder is given.
#[derive(Clone, Copy)]
pub struct ClipTextInput<'a> {
    /// Ids `[B, T]`, or embeddings `[B, T, D]` of the tokens alone.
    pub tokens: Tokens<'a>,
    /// Boolean `[B, T]`, false for padding; all true where `None`, which is how Stable Diffusion reads its padding.
    pub keep: Option<&'a Tensor>,
    /// Where each text ends, int64 `[B]`: there the pooled feature is read. Where `None`: at the first `eos_token_id`,
    /// else at position 0; for embeddings at the first that equals that token's.
    pub ends: Option<&'a Tensor>,
    /// Which states are the features of the positions.
    pub layer: ClipLayer,
}

impl<'a> ClipTextInput<'a> {
    /// Tokens and which of them are no padding.
    pub fn new(tokens: Tokens<'a>, keep: Option<&'a Tensor>) -> Self {
        Self { tokens, keep, ends: None, layer: ClipLayer::LAST }
    }
}

/// CLIP's text encoder. Its pooled feature is the last state where the text ends, projected where the checkpoint has
/// `text_projection` (`CLIPTextModelWithProjection`).
pub struct ClipText {
    config: Arc<ClipTextConfig>,
    spec: EncoderSpec,
    sites: Arc<SiteMap>,
    token_embedding: Embedding,
    /// `[max_position_embeddings, D]`
    position_embedding: Tensor,
    blocks: Vec<Block>,
    final_norm: LayerNorm,
    final_site: SiteId,
    projection: Option<Linear>,
}

impl ClipText {
    /// Loads the weights that config.json describes, under the names with `text_model.` or, as transformers 5 writes the
    /// model without a projection, without it.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = ClipTextConfig::from_config(config)?;
        let weights = weights.rename(prefixes(&[("text_model.", "")]));
        let (d, positions, mut sites) = (c.blocks.hidden_size, c.max_position_embeddings, SiteMap::new());
        let mut loader = Loader { weights: &weights, sites: &mut sites, blocks: c.blocks };
        let name = "text_model.embeddings.token_embedding";
        let table = weights.get(&format!("{name}.weight"), &[c.vocab_size, d])?;
        let site = loader.sites.add(name, Dims::Embedding { rows: c.vocab_size, width: d });
        let position_embedding =
            weights.get("text_model.embeddings.position_embedding.weight", &[positions, d])?;
        let blocks = loader.layers("text_model")?;
        let final_norm = loader.norm("text_model.final_layer_norm")?;
        let final_site = loader.sites.add("text_model.final_layer_norm", Dims::Hidden { width: d });
        let head = (config, "CLIPTextModelWithProjection");
        let projection = loader.projection_of(head, "text_projection", c.projection_dim)?;
        // The other tower of a whole CLIP, and positions that old files count out.
        weights.finish(&["*position_ids", "vision_model.*", "visual_projection.*", "logit_scale"])?;
        let spec = EncoderSpec {
            architecture: MODEL_TYPES[0].to_owned(),
            width: d,
            pooled: Some(if projection.is_some() { c.projection_dim } else { d }),
            reads: Reads::Text { vocab: c.vocab_size, context: Some(positions) },
            placement,
        };
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            token_embedding: Embedding::new(table, site),
            position_embedding,
            blocks,
            final_norm,
            final_site,
            projection,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Where it runs.
    pub fn placement(&self) -> Placement {
        self.spec.placement
    }

    /// Whether its pooled feature is projected.
    pub fn projects(&self) -> bool {
        self.projection.is_some()
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            token_embedding: self.token_embedding.handle(),
            position_embedding: self.position_embedding.shallow_clone(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            final_norm: self.final_norm.handle(),
            final_site: self.final_site,
            projection: self.projection.as_ref().map(Linear::handle),
        }
    }

    /// The handle of [`Encoder::map_weights`], by its own type.
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            token_embedding: self.token_embedding.map_weights(f)?,
            blocks: self.blocks.iter().map(|block| block.map(f)).collect::<Result<_>>()?,
            projection: self.projection.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            ..self.share()
        })
    }

    /// Encodes, with everything that a CLIP text encoder can be told.
    ///
    /// # Errors
    /// As [`Encoder::encode`]; [`Error::Value`] for a layer that there is not, or an end outside the text.
    pub fn forward(&self, input: ClipTextInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let (c, kind) = (&*self.config, self.spec.placement.kind);
        let (b, t) = input.tokens.validate(input.keep, c.vocab_size, c.blocks.hidden_size, kind)?;
        pass.check(&self.sites, b)?;
        let Some(wanted) = self.blocks.len().checked_sub(input.layer.before_last) else {
            let expected = format!("0 ..= {}", self.blocks.len());
            return Err(Error::value("blocks before the last", expected, input.layer.before_last));
        };
        let mask = self.mask(input.keep, t)?;
        let places = self.positions((b, t), &pass.position_offset()?)?;

        let embeds = self.token_embedding.forward(input.tokens, pass)?; // (B, T, D)
        let mut x = embeds.f_add(&places)?;
        let mut hidden = x.shallow_clone();
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mask, pass)?;
            if i + 1 == wanted {
                hidden = x.shallow_clone();
            }
        }
        let last = self.final_norm.forward(&x)?;
        let last = pass.hidden(self.final_site, last.shallow_clone(), &last)?;

        let ends = self.ends(&input, (b, t))?.f_view([b, 1, 1])?.f_expand([b, 1, last.size()[2]], false)?;
        let pooled = last.f_gather(1, &ends, false)?.f_squeeze_dim(1)?; // (B, D)
        let pooled = match &self.projection {
            Some(projection) => projection.forward(&pooled, pass)?, // (B, P)
            None => pooled,
        };
        let hidden = match input.layer {
            ClipLayer::LAST => last,
            ClipLayer { norm: true, .. } => self.final_norm.forward(&hidden)?,
            ClipLayer { norm: false, .. } => hidden,
        };
        Ok(Features { hidden, pooled: Some(pooled) })
    }

    /// What each position sees: itself and what is before it, but for padding.
    fn mask(&self, keep: Option<&Tensor>, t: i64) -> Result<Mask> {
        let Some(keep) = keep else { return Ok(Mask::Causal) };
        let kept: Vec<i64> = Vec::try_from(keep.f_sum_dim_intlist(&[1i64][..], false, Kind::Int64)?)?;
        if let Some(row) = kept.iter().position(|&n| n == 0) {
            return Err(Error::value(format!("keep, row {row}"), "at least one token", "padding alone"));
        }
        if kept.iter().all(|&n| n == t) {
            return Ok(Mask::Causal);
        }
        let device = self.spec.placement.device;
        let before = Tensor::f_ones([t, t], (Kind::Bool, device))?.f_tril(0)?;
        // Padding sees itself, so that no attention is over nothing.
        let itself = Tensor::f_eye(t, (Kind::Bool, device))?;
        let keep = keep.f_to_device(device)?.f_view([-1, 1, 1, t])?;
        Ok(Mask::Keep(before.f_logical_and(&keep)?.f_logical_or(&itself)?)) // (B, 1, T, T)
    }

    /// What is added to the embeddings for where they stand: `[1 or B, T, D]`.
    fn positions(&self, (b, t): (i64, i64), offset: &Offset) -> Result<Tensor> {
        let (table, limit) = (&self.position_embedding, self.config.max_position_embeddings);
        let needed = t + offset.most();
        if needed > limit {
            return Err(Error::Context { limit, needed });
        }
        match offset {
            Offset::All(n) => Ok(table.f_narrow(0, *n, t)?.f_unsqueeze(0)?),
            Offset::Rows(rows) if i64::try_from(rows.len()) != Ok(b) => {
                Err(Error::value("rows of the position offset", b, rows.len()))
            }
            Offset::Rows(rows) => {
                let device = self.spec.placement.device;
                let at = Tensor::f_from_slice(rows)?.f_to_device(device)?.f_unsqueeze(1)?;
                let at = at.f_add(&Tensor::f_arange(t, (Kind::Int64, device))?)?;
                Ok(Tensor::f_embedding(table, &at, -1, false, false)?)
            }
        }
    }

    /// Where each text ends, `[B]`.
    fn ends(&self, input: &ClipTextInput<'_>, (b, t): (i64, i64)) -> Result<Tensor> {
        let device = self.spec.placement.device;
        if let Some(ends) = input.ends {
            if ends.size() != [b] {
                return Err(Error::shape("ends of the texts", format!("[{b}]"), &ends.size()));
            }
            let ends = ends.f_to_kind(Kind::Int64)?;
            let found: Vec<i64> = Vec::try_from(&ends)?;
            if let Some(end) = found.iter().find(|end| !(0..t).contains(*end)) {
                return Err(Error::value("end of a text", format!("0 .. {t}"), end));
            }
            return Ok(ends.f_to_device(device)?);
        }
        let hidden = |at: &Tensor| -> Result<Tensor> {
            match input.keep {
                Some(keep) => Ok(at.f_masked_fill(&keep.f_to_device(device)?.f_logical_not()?, -1)?),
                None => Ok(at.shallow_clone()),
            }
        };
        let last = self.config.vocab_size - 1;
        let score = match (input.tokens, self.config.eos_token_id) {
            (Tokens::Ids(ids), None) => ids.shallow_clone(),
            (Tokens::Ids(ids), Some(eos)) => ids.f_eq(eos)?.f_to_kind(Kind::Int64)?,
            (Tokens::Embeds(embeds), eos) => {
                // CLIP's own end is the last token of its vocabulary.
                let eos = self.token_embedding.weight().f_get(eos.unwrap_or(last).min(last))?;
                embeds.f_eq_tensor(&eos)?.f_all_dim(-1, false)?.f_to_kind(Kind::Int64)?
            }
        };
        Ok(hidden(&score)?.f_argmax(1, false)?)
    }
}

impl Encoder for ClipText {
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
        Some(self.token_embedding.weight())
    }

    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        match input {
            EncoderInput::Text { tokens, keep } => self.forward(ClipTextInput::new(tokens, keep), pass),
            _ => Err(Error::unsupported("images given to an encoder of text", "EncoderInput::Text")),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(self.map(f)?))
    }
}
