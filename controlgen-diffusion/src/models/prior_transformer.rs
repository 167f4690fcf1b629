//! The prior of unCLIP: from the embedding of a text to that of an image (Ramesh et al., "Hierarchical Text-Conditional
//! Image Generation with CLIP Latents", 2022, section 2.2).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Activation, LayerNorm, Linear};
use controlgen_core::{
    Attn, Condition, Denoiser, DenoiserSpec, Dims, Error, Mask, Pass, Placement, Prediction, Prepared,
    Result, SiteId, SiteMap, WeightMap,
};
use tch::{Kind, Tensor};

use super::blocks::{Scope, Sinusoid, TimestepEmbedding, add, heads};
use super::sample::predicted;
use super::{Predicts, conditions};

/// The value of `_class_name` that this file serves.
pub const CLASS_NAME: &str = "PriorTransformer";

/// The features of a condition.
const FEATURES: [&str; 3] = ["proj_embedding", "encoder_hidden_states", "attention_mask"];

/// The dimensions of a prior.
#[derive(Clone, Debug, PartialEq)]
pub struct PriorTransformerConfig {
    /// H
    pub num_attention_heads: i64,
    /// Width of a head; H of them make D.
    pub attention_head_dim: i64,
    /// How many blocks.
    pub num_layers: i64,
    /// P: width of the embeddings of text and image, and of the text's states.
    pub embedding_dim: i64,
    /// T: tokens of the text.
    pub num_embeddings: i64,
    /// Of the embedding of timesteps.
    pub time_embed_act_fn: Activation,
    /// Width inside the embedding of timesteps: D, nothing else is supported.
    pub embedding_proj_dim: i64,
    /// Whether the text's embedding is normed before its projection.
    pub embedding_proj_norm: bool,
    /// Whether the tokens are normed before the blocks.
    pub norm_in: bool,
    /// Whether a learned token at the end asks for the image's embedding (`added_emb_type` prd); else the noisy
    /// embedding's own token does.
    pub query_token: bool,
}

impl PriorTransformerConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for a prior that reads no text.
    pub fn from_config(config: &Config) -> Result<Self> {
        let named = |field: &str, known: &str, default: bool| -> Result<bool> {
            match config.str(field)? {
                _ if !config.has(field) => Ok(default),
                None => Ok(false),
                Some(found) if found == known => Ok(true),
                Some(found) => Err(config.error(field, format!("`{known}` or null"), found)),
            }
        };
        if !named("encoder_hid_proj_type", "linear", true)? {
            return Err(Error::unsupported("a prior without encoder_hid_proj_type", "linear, for a text"));
        }
        let int = |field, default, high| Ok::<_, Error>(config.int_if(field, 1, high)?.unwrap_or(default));
        let embedding_dim = int("embedding_dim", 768, limits::WIDTH)?;
        let query_token = named("added_emb_type", "prd", true)?;
        let (additional, needed) = (int("additional_embeddings", 4, 1 << 10)?, 3 + i64::from(query_token));
        if additional != needed {
            let expected = format!("{needed}, the tokens beside the text's");
            return Err(config.error("additional_embeddings", expected, additional));
        }
        if let Some(found) =
            config.int_if("clip_embed_dim", 1, limits::WIDTH)?.filter(|n| *n != embedding_dim)
        {
            let what = format!("clip_embed_dim {found} beside embedding_dim {embedding_dim}");
            return Err(Error::unsupported(what, "equal ones"));
        }
        let (heads, head) =
            (int("num_attention_heads", 32, limits::HEADS)?, int("attention_head_dim", 64, limits::WIDTH)?);
        if let Some(found) = config.int_if("time_embed_dim", 1, limits::WIDTH)?.filter(|n| *n != heads * head)
        {
            return Err(Error::unsupported(format!("time_embed_dim {found}"), format!("{}", heads * head)));
        }
        Ok(Self {
            num_attention_heads: heads,
            attention_head_dim: head,
            num_layers: int("num_layers", 20, limits::LAYERS)?,
            embedding_dim,
            num_embeddings: int("num_embeddings", 77, limits::CONTEXT)?,
            time_embed_act_fn: Activation::from_name(config.str("time_embed_act_fn")?.unwrap_or("silu"))?,
            embedding_proj_dim: int("embedding_proj_dim", embedding_dim, limits::WIDTH)?,
            embedding_proj_norm: named("embedding_proj_norm_type", "layer", false)?,
            norm_in: named("norm_in_type", "layer", false)?,
            query_token,
        })
    }

    /// D
    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }
}

/// unCLIP's prior as a denoiser of images' CLIP embeddings, which are samples `[B, P, 1, 1]`: so every sampler and every
/// stage of guidance serves it. It predicts x₀ in Karlo and Kandinsky.
///
/// Conditions are features: `proj_embedding` `[P]`, the text's pooled embedding; `encoder_hidden_states` `[T, P]`; and
/// `attention_mask` `[T]`. With a mask (of all conditions, or of none) its attention is causal, so that what the tokens of
/// the text are does not depend on the sample: their keys and values are computed once, and a step costs 3 tokens.
/// Without one, as diffusers has it, every token sees all others.
pub struct PriorTransformer {
    config: Arc<PriorTransformerConfig>,
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    sinusoid: Sinusoid,
    time: TimestepEmbedding,
    proj_in: Linear,
    embedding_proj_norm: Option<LayerNorm>,
    embedding_proj: Linear,
    text_proj: Linear,
    /// `[1, T + 3 or 4, D]`
    positions: Tensor,
    /// `[1, 1, D]`
    query: Option<Tensor>,
    norm_in: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm_out: LayerNorm,
    out: Linear,
    /// `[1, P, 1, 1]`
    clip_mean: Tensor,
    clip_std: Tensor,
}

struct Block {
    heads: i64,
    norm1: LayerNorm,
    /// Queries, keys and values in one product.
    qkv: Linear,
    attention: SiteId,
    to_out: Linear,
    attention_branch: SiteId,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
    ff_branch: SiteId,
}

impl Block {
    fn load(mut scope: Scope<'_, '_>, c: &PriorTransformerConfig) -> Result<Self> {
        let (d, h) = (c.width(), c.num_attention_heads);
        let norm1 = scope.layer_norm("norm1", d)?;
        let mut attn = scope.below("attn1");
        let qkv = attn.fused(&["to_q", "to_k", "to_v"], (d, d), true)?;
        let dims = Dims::Attention { heads: h, kv_heads: h, head_dim: c.attention_head_dim, cross: false };
        let attention = attn.site("", dims);
        let to_out = attn.linear("to_out.0", (d, d), true)?;
        let attention_branch = attn.branch("", d);
        Ok(Self {
            heads: h,
            norm1,
            qkv,
            attention,
            to_out,
            attention_branch,
            norm3: scope.layer_norm("norm3", d)?,
            ff_in: scope.linear("ff.net.0.proj", (d, 4 * d), true)?,
            ff_out: scope.linear("ff.net.2", (4 * d, d), true)?,
            ff_branch: scope.branch("ff", d),
        })
    }

    fn share(&self) -> Self {
        Self {
            norm1: self.norm1.handle(),
            qkv: self.qkv.handle(),
            to_out: self.to_out.handle(),
            norm3: self.norm3.handle(),
            ff_in: self.ff_in.handle(),
            ff_out: self.ff_out.handle(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            qkv: self.qkv.map_weights(f)?,
            to_out: self.to_out.map_weights(f)?,
            ff_in: self.ff_in.map_weights(f)?,
            ff_out: self.ff_out.map_weights(f)?,
            ..self.share()
        })
    }

    /// `[B, T, D] → [B, T, D]`, after the keys and values of `past` `[B, 2, H, Tp, hd]`; and its own keys and values.
    fn forward(
        &self,
        x: &Tensor,
        past: Option<&Tensor>,
        mask: &Mask,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let qkv = self.qkv.forward(&self.norm1.forward(x)?, pass)?; // (B, T, 3 D)
        let part = |n| heads(&qkv, (n, 3), self.heads); // (B, H, T, hd)
        let own = Tensor::f_stack(&[part(1)?, part(2)?], 1)?;
        let all = match past {
            Some(past) => Tensor::f_cat(&[past, &own], 3)?,
            None => own.shallow_clone(),
        };
        let (k, v) = (all.f_select(1, 0)?, all.f_select(1, 1)?);
        let attn = Attn { q: part(0)?, k, v, mask: mask.handle(), scale: None };
        let y = pass.attention(self.attention, attn)?.f_transpose(1, 2)?.f_reshape(x.size())?;
        let y = pass.hidden(self.attention_branch, self.to_out.forward(&y, pass)?, x)?;
        let x = add(y, x, pass)?;
        let y = Activation::Gelu.forward(&self.ff_in.forward(&self.norm3.forward(&x)?, pass)?)?;
        let y = pass.hidden(self.ff_branch, self.ff_out.forward(&y, pass)?, &x)?;
        Ok((add(y, &x, pass)?, own))
    }
}

impl PriorTransformer {
    /// Opens a component's directory: config.json and diffusion_pytorch_model.safetensors.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`]; those of [`Self::load`].
    pub fn open(directory: impl AsRef<Path>, predicts: Predicts, placement: Placement) -> Result<Self> {
        let directory = directory.as_ref();
        let config = Config::open(&directory.join("config.json"))?;
        let source = Safetensors::open(directory)?;
        Self::load(&config, &Weights::new(&source, placement.options()), predicts, placement)
    }

    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(
        config: &Config,
        weights: &Weights<'_>,
        predicts: Predicts,
        placement: Placement,
    ) -> Result<Self> {
        let c = PriorTransformerConfig::from_config(config)?;
        if predicts.learned_variance {
            return Err(Error::unsupported("a prior with a learned variance", "a fixed one"));
        }
        let (d, p, mut sites) = (c.width(), c.embedding_dim, SiteMap::new());
        let mut root = Scope::new(weights, &mut sites, None);
        let time = TimestepEmbedding::load(root.below("time_embedding"), (d, d), c.time_embed_act_fn, None)?;
        let proj_in = root.linear("proj_in", (p, d), true)?;
        let proj_norm =
            c.embedding_proj_norm.then(|| root.layer_norm("embedding_proj_norm", c.embedding_proj_dim));
        let embedding_proj_norm = proj_norm.transpose()?;
        let embedding_proj = root.linear("embedding_proj", (c.embedding_proj_dim, d), true)?;
        let text_proj = root.linear("encoder_hidden_states_proj", (p, d), true)?;
        let tokens = c.num_embeddings + 3 + i64::from(c.query_token);
        let positions = weights.get("positional_embedding", &[1, tokens, d])?;
        let query = c.query_token.then(|| weights.get("prd_embedding", &[1, 1, d])).transpose()?;
        let norm_in = c.norm_in.then(|| root.layer_norm("norm_in", d)).transpose()?;
        let mut blocks = Vec::new();
        for i in 0..c.num_layers {
            blocks.push(Block::load(root.below(format!("transformer_blocks.{i}")), &c)?);
        }
        let norm_out = root.layer_norm("norm_out", d)?;
        let out = root.linear("proj_to_clip_embeddings", (d, p), true)?;
        let of_clip = |name| Ok::<_, Error>(weights.get(name, &[1, p])?.f_view([1, p, 1, 1])?);
        let (clip_mean, clip_std) = (of_clip("clip_mean")?, of_clip("clip_std")?);
        weights.finish(&["causal_attention_mask"])?; // computed
        let spec = DenoiserSpec {
            architecture: CLASS_NAME.to_owned(),
            channels: p,
            size: [1, 1],
            multiple: 1,
            parameterisation: predicts.parameterisation,
            learned_variance: false,
            placement,
        };
        let sinusoid = Sinusoid::new(d, true, 0.0, placement.device)?;
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            sinusoid,
            time,
            proj_in,
            embedding_proj_norm,
            embedding_proj,
            text_proj,
            positions,
            query,
            norm_in,
            blocks,
            norm_out,
            out,
            clip_mean,
            clip_std,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &PriorTransformerConfig {
        &self.config
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            sinusoid: self.sinusoid.handle(),
            time: self.time.handle(),
            proj_in: self.proj_in.handle(),
            embedding_proj_norm: self.embedding_proj_norm.as_ref().map(LayerNorm::handle),
            embedding_proj: self.embedding_proj.handle(),
            text_proj: self.text_proj.handle(),
            positions: self.positions.shallow_clone(),
            query: self.query.as_ref().map(Tensor::shallow_clone),
            norm_in: self.norm_in.as_ref().map(LayerNorm::handle),
            blocks: self.blocks.iter().map(Block::share).collect(),
            norm_out: self.norm_out.handle(),
            out: self.out.handle(),
            clip_mean: self.clip_mean.shallow_clone(),
            clip_std: self.clip_std.shallow_clone(),
        }
    }

    /// The image embeddings `[B, P]` of clean samples `[B, P, 1, 1]`: x · `clip_std` + `clip_mean`. The prior works on
    /// embeddings that are normalised.
    ///
    /// # Errors
    /// [`Error::Shape`] for what is no such sample.
    pub fn embeddings(&self, x: &Tensor) -> Result<Tensor> {
        self.check_size(x)?;
        let x = x.f_to_device(self.clip_std.device())?.f_to_kind(self.spec.placement.kind)?;
        Ok(x.f_mul(&self.clip_std)?.f_add(&self.clip_mean)?.f_flatten(1, -1)?)
    }

    fn check_size(&self, x: &Tensor) -> Result<()> {
        let p = self.config.embedding_dim;
        match x.size().as_slice() {
            [_, channels, 1, 1] if *channels == p => Ok(()),
            other => Err(Error::shape("an embedding as a sample", format!("[B, {p}, 1, 1]"), other)),
        }
    }

    /// The tokens of the text and of its embedding, `[B, T + 1, D]`.
    fn prefix(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Tensor> {
        let (c, placement) = (&*self.config, self.spec.placement);
        let text = conditions::stacked(
            conditions,
            "encoder_hidden_states",
            &[c.num_embeddings, c.embedding_dim],
            placement,
        )?;
        let proj = conditions::stacked(conditions, "proj_embedding", &[c.embedding_proj_dim], placement)?;
        let proj = match &self.embedding_proj_norm {
            Some(norm) => norm.forward(&proj)?,
            None => proj,
        };
        let proj = self.embedding_proj.forward(&proj, pass)?.f_unsqueeze(1)?; // (B, 1, D)
        let text = self.text_proj.forward(&text, pass)?; // (B, T, D)
        self.placed(&Tensor::f_cat(&[text, proj], 1)?, 0)
    }

    /// Tokens `[B, n, D]` with the embeddings of their positions, the first of which is `from`.
    fn placed(&self, tokens: &Tensor, from: i64) -> Result<Tensor> {
        let x = tokens.f_add(&self.positions.f_narrow(1, from, tokens.size3()?.1)?)?;
        self.norm_in.as_ref().map_or(Ok(x.shallow_clone()), |norm| norm.forward(&x))
    }

    /// What the last n tokens of a causal sequence see of it: what is before them and kept, and themselves, so that no
    /// attention is over nothing. `keep` is boolean `[B, T']`; `[B, 1, n, T']`.
    fn causal(keep: &Tensor, n: i64) -> Result<Mask> {
        let (b, all) = keep.size2()?;
        let ones = Tensor::f_ones([n, all], (Kind::Bool, keep.device()))?;
        let before = ones.f_tril(all - n - 1)?;
        let itself = ones.f_tril(all - n)?.f_logical_xor(&before)?;
        let seen = before.f_logical_and(&keep.f_view([b, 1, 1, all])?)?;
        Ok(Mask::Keep(seen.f_logical_or(&itself)?))
    }
}

impl Denoiser for PriorTransformer {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(self.share())
    }

    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// With masks: each block's keys and values of the text, and what of them is kept. Without: its tokens.
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        pass.check_sites(&self.sites)?;
        conditions::only(conditions, &FEATURES)?;
        let rows = i64::try_from(conditions.len()).unwrap_or(i64::MAX);
        let mut x = self.prefix(conditions, pass)?; // (B, T + 1, D)
        let masked = conditions.iter().filter(|c| c.feature("attention_mask").is_ok()).count();
        if masked == 0 {
            return Prepared::new(&self.sites, pass, rows, vec![x]);
        }
        if masked < conditions.len() {
            let found = format!("{masked} of {}", conditions.len());
            return Err(Error::value("conditions with an `attention_mask`", "all, or none", found));
        }
        let placement = self.spec.placement;
        let keep = conditions::masks(conditions, "attention_mask", self.config.num_embeddings, placement)?;
        let own = Tensor::f_ones([rows, 1], (Kind::Bool, placement.device))?;
        let keep = Tensor::f_cat(&[keep, own], 1)?; // (B, T + 1)
        let mask = Self::causal(&keep, self.config.num_embeddings + 1)?;
        let mut kept = vec![keep];
        for block in &self.blocks {
            let (y, kv) = block.forward(&x, None, &mask, pass)?;
            kept.push(kv); // (B, 2, H, T + 1, hd)
            x = y;
        }
        Prepared::new(&self.sites, pass, rows, kept)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        let batch = self.check_call(x, t, prepared, pass)?;
        self.check_size(x)?;
        let Placement { device, kind } = self.spec.placement;
        let own = x.f_to_device(device)?.f_to_kind(kind)?.f_flatten(1, -1)?; // (B, P)
        let time = self.time.forward(&self.sinusoid.forward(&t.f_to_device(device)?)?, pass)?;
        let own = self.proj_in.forward(&own, pass)?;
        let mut tokens = vec![time.f_unsqueeze(1)?, own.f_unsqueeze(1)?];
        if let Some(query) = &self.query {
            tokens.push(query.f_expand([batch, 1, -1], false)?);
        }
        let tokens = Tensor::f_cat(&tokens, 1)?;
        let mut y = self.placed(&tokens, self.config.num_embeddings + 1)?; // (B, 2 or 3, D)
        if let [keep, past @ ..] = prepared.tensors()
            && past.len() == self.blocks.len()
        {
            let n = y.size3()?.1;
            let own = Tensor::f_ones([batch, n], (Kind::Bool, device))?;
            let mask = Self::causal(&Tensor::f_cat(&[keep, &own], 1)?, n)?;
            for (block, past) in self.blocks.iter().zip(past) {
                y = block.forward(&y, Some(past), &mask, pass)?.0;
            }
        } else {
            y = Tensor::f_cat(&[&prepared.tensors()[0], &y], 1)?; // (B, T + 3 or 4, D)
            for block in &self.blocks {
                y = block.forward(&y, None, &Mask::Full, pass)?.0;
            }
        }
        let y = self.norm_out.forward(&y.f_select(1, -1)?)?; // (B, D)
        let y = self.out.forward(&y, pass)?.f_view(x.size().as_slice())?;
        predicted(&y, x, &self.spec)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Self {
            time: self.time.map_weights(f)?,
            proj_in: self.proj_in.map_weights(f)?,
            embedding_proj: self.embedding_proj.map_weights(f)?,
            text_proj: self.text_proj.map_weights(f)?,
            blocks: self.blocks.iter().map(|block| block.map(f)).collect::<Result<_>>()?,
            out: self.out.map_weights(f)?,
            ..self.share()
        }))
    }
}
