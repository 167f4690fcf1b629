//! What unCLIP's decoder is told of an image and a text (Ramesh et al., "Hierarchical Text-Conditional Image Generation
//! with CLIP Latents", 2022, section 2.1).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{LayerNorm, Linear};
use controlgen_core::{Error, Pass, Placement, Result, SiteMap, WeightMap};
use tch::Tensor;

use super::blocks::Scope;

/// The dimensions of the projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnClipTextProjConfig {
    /// How many tokens of context an image is.
    pub clip_extra_context_tokens: i64,
    /// P: width of the embeddings of image and text, and of the text's states.
    pub clip_embeddings_dim: i64,
    /// Width of the decoder's embedding of timesteps.
    pub time_embed_dim: i64,
    /// C: width of the states that the decoder attends to.
    pub cross_attention_dim: i64,
}

impl UnClipTextProjConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense.
    pub fn from_config(config: &Config) -> Result<Self> {
        Ok(Self {
            clip_extra_context_tokens: config.int_if("clip_extra_context_tokens", 1, 1 << 10)?.unwrap_or(4),
            clip_embeddings_dim: config.int_if("clip_embeddings_dim", 1, limits::WIDTH)?.unwrap_or(768),
            time_embed_dim: config.int("time_embed_dim", 1, limits::WIDTH)?,
            cross_attention_dim: config.int("cross_attention_dim", 1, limits::WIDTH)?,
        })
    }
}

/// The embeddings of an image and a text, projected onto the decoder's embedding of timesteps, and the image's into
/// tokens of context before the text's.
pub struct UnClipTextProj {
    config: UnClipTextProjConfig,
    placement: Placement,
    sites: Arc<SiteMap>,
    /// `[P]`: the embedding of no image.
    null: Tensor,
    text_to_time: Linear,
    image_to_time: Linear,
    image_to_tokens: Linear,
    states: Linear,
    norm: LayerNorm,
}

/// What the decoder is told.
#[derive(Debug)]
pub struct UnClipConditions {
    /// `[B, N + T, C]`: the image's tokens, then the text's.
    pub encoder_hidden_states: Tensor,
    /// `[B, time_embed_dim]`: what is added to the embedding of timesteps.
    pub class_labels: Tensor,
}

impl UnClipTextProj {
    /// Opens a component's directory: config.json and diffusion_pytorch_model.safetensors.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`]; those of [`Self::load`].
    pub fn open(directory: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = directory.as_ref();
        let config = Config::open(&directory.join("config.json"))?;
        let source = Safetensors::open(directory)?;
        Self::load(&config, &Weights::new(&source, placement.options()), placement)
    }

    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model that the configuration
    /// describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = UnClipTextProjConfig::from_config(config)?;
        let (p, time, width) = (c.clip_embeddings_dim, c.time_embed_dim, c.cross_attention_dim);
        let mut sites = SiteMap::new();
        let mut root = Scope::new(weights, &mut sites, None);
        let null = weights.get("learned_classifier_free_guidance_embeddings", &[p])?;
        let text_to_time = root.linear("embedding_proj", (p, time), true)?;
        let image_to_time =
            root.linear("clip_image_embeddings_project_to_time_embeddings", (p, time), true)?;
        let tokens = c.clip_extra_context_tokens.saturating_mul(width);
        let image_to_tokens = root.linear("clip_extra_context_tokens_proj", (p, tokens), true)?;
        let states = root.linear("encoder_hidden_states_proj", (p, width), true)?;
        let norm = root.layer_norm("text_encoder_hidden_states_norm", width)?;
        weights.finish(&[])?;
        let sites = Arc::new(sites);
        Ok(Self {
            config: c,
            placement,
            sites,
            null,
            text_to_time,
            image_to_time,
            image_to_tokens,
            states,
            norm,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> UnClipTextProjConfig {
        self.config
    }

    /// Where controls may act.
    pub fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            sites: Arc::clone(&self.sites),
            null: self.null.shallow_clone(),
            text_to_time: self.text_to_time.handle(),
            image_to_time: self.image_to_time.handle(),
            image_to_tokens: self.image_to_tokens.handle(),
            states: self.states.handle(),
            norm: self.norm.handle(),
            ..*self
        }
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            text_to_time: self.text_to_time.map_weights(f)?,
            image_to_time: self.image_to_time.map_weights(f)?,
            image_to_tokens: self.image_to_tokens.map_weights(f)?,
            states: self.states.map_weights(f)?,
            ..self.share()
        })
    }

    /// Of embeddings of images `[B, P]`, of no image where `None`; of texts, `[B, P]`; and of the texts' states
    /// `[B, T, P]`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::ForeignSites`]; the controls'.
    pub fn forward(
        &self,
        image_embeds: Option<&Tensor>,
        text_embeds: &Tensor,
        states: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<UnClipConditions> {
        let c = self.config;
        let (p, shape) = (c.clip_embeddings_dim, states.size());
        let &[b, _, width] = shape.as_slice() else {
            return Err(Error::shape("states of the texts", format!("[B, T, {p}]"), &shape));
        };
        if width != p {
            return Err(Error::shape("states of the texts", format!("[B, T, {p}]"), &shape));
        }
        for (what, t) in
            [("embeddings of the texts", Some(text_embeds)), ("embeddings of images", image_embeds)]
        {
            if let Some(t) = t.filter(|t| t.size() != [b, p]) {
                return Err(Error::shape(what, format!("[{b}, {p}]"), &t.size()));
            }
        }
        pass.check(&self.sites, b)?;
        let Placement { device, kind } = self.placement;
        let own = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(device)?.f_to_kind(kind)?) };
        let image = match image_embeds {
            Some(image) => own(image)?,
            None => self.null.f_expand([b, p], false)?,
        };
        let of_text = self.text_to_time.forward(&own(text_embeds)?, pass)?;
        let class_labels = self.image_to_time.forward(&image, pass)?.f_add(&of_text)?;
        // A token is every Nth number.
        let tokens = self.image_to_tokens.forward(&image, pass)?;
        let tokens = tokens.f_view([b, -1, c.clip_extra_context_tokens])?.f_transpose(1, 2)?; // (B, N, C)
        let text = self.norm.forward(&self.states.forward(&own(states)?, pass)?)?; // (B, T, C)
        Ok(UnClipConditions { encoder_hidden_states: Tensor::f_cat(&[tokens, text], 1)?, class_labels })
    }
}
