//! CLIP's image encoder, a vision transformer (Radford et al., "Learning Transferable Visual Models From Natural
//! Language Supervision", 2021; Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021).

use std::sync::Arc;

use controlgen_core::checkpoint::{Weights, prefixes};
use controlgen_core::config::{Config, limits};
use controlgen_core::energy::checks;
use controlgen_core::layers::{Conv2d, LayerNorm, Linear};
use controlgen_core::{
    Dims, Encoder, EncoderInput, EncoderSpec, Error, Features, Mask, Pass, Placement, Reads, Result, SiteId,
    SiteMap, WeightMap,
};
use tch::Tensor;

use super::clip::{Block, ClipBlocks, Loader, tower_of};

/// The values of `model_type` that this file serves; of a whole `clip` it takes the images' part.
pub const MODEL_TYPES: [&str; 2] = ["clip_vision_model", "clip"];

/// The dimensions of a CLIP image encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    /// Its blocks.
    pub blocks: ClipBlocks,
    /// P: width of the projection, of a model that has one.
    pub projection_dim: i64,
    /// C
    pub num_channels: i64,
    /// H and W, equal.
    pub image_size: i64,
    /// Height and width of a patch.
    pub patch_size: i64,
}

impl ClipVisionConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for another architecture.
    pub fn from_config(config: &Config) -> Result<Self> {
        let (config, projection_dim) = tower_of(config, &MODEL_TYPES, "vision_config")?;
        let image_size = config.int_if("image_size", 1, 1 << 14)?.unwrap_or(224);
        Ok(Self {
            blocks: ClipBlocks::from_config(&config)?,
            projection_dim,
            num_channels: config.int_if("num_channels", 1, limits::WIDTH)?.unwrap_or(3),
            image_size,
            patch_size: config.int_if("patch_size", 1, image_size)?.unwrap_or(32.min(image_size)),
        })
    }

    /// N: patches of an image.
    fn patches(&self) -> i64 {
        self.image_size.div_euclid(self.patch_size).pow(2)
    }
}

/// CLIP's image encoder. Features are of the class's position and of each patch; the pooled one is the class's, normed, and
/// projected where the checkpoint has `visual_projection` (`CLIPVisionModelWithProjection`).
pub struct ClipVision {
    config: Arc<ClipVisionConfig>,
    spec: EncoderSpec,
    sites: Arc<SiteMap>,
    /// `[1, 1, D]`
    class_embedding: Tensor,
    patch_embedding: Conv2d,
    /// `[N + 1, D]`
    position_embedding: Tensor,
    pre_norm: LayerNorm,
    blocks: Vec<Block>,
    post_norm: LayerNorm,
    post_site: SiteId,
    projection: Option<Linear>,
    /// `[1, C, 1, 1]`: what pixels in −1 ..= 1 are multiplied with, and what is added then.
    scale: Tensor,
    shift: Tensor,
}

impl ClipVision {
    /// The mean and the deviation of CLIP's training images, in 0 ..= 1.
    pub const NORMALISATION: ([f64; 3], [f64; 3]) =
        ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]);

    /// Loads the weights that config.json describes, under the names with `vision_model.` or, as transformers 5 writes the
    /// model without a projection, without it. Pixels are normalised by [`Self::NORMALISATION`].
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model
    /// that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = ClipVisionConfig::from_config(config)?;
        let weights = weights.rename(prefixes(&[("vision_model.", "")]));
        let (d, patch, mut sites) = (c.blocks.hidden_size, c.patch_size, SiteMap::new());
        let mut loader = Loader { weights: &weights, sites: &mut sites, blocks: c.blocks };
        let class = weights.get("vision_model.embeddings.class_embedding", &[d])?;
        let name = "vision_model.embeddings.patch_embedding";
        let weight = weights.get(&format!("{name}.weight"), &[d, c.num_channels, patch, patch])?;
        let dims = Dims::Conv { inputs: c.num_channels, outputs: d, kernel: [patch, patch] };
        let patch_embedding = Conv2d::new(weight, None, (patch, 0), loader.sites.add(name, dims))?;
        let name = "vision_model.embeddings.position_embedding.weight";
        let position_embedding = weights.get(name, &[c.patches() + 1, d])?;
        let pre_norm = loader.norm("vision_model.pre_layrnorm")?;
        let blocks = loader.layers("vision_model")?;
        let post_norm = loader.norm("vision_model.post_layernorm")?;
        let post_site = loader.sites.add("vision_model.post_layernorm", Dims::Hidden { width: d });
        let head = (config, "CLIPVisionModelWithProjection");
        let projection = loader.projection_of(head, "visual_projection", c.projection_dim)?;
        // The other tower of a whole CLIP, and positions that old files count out.
        weights.finish(&["*position_ids", "text_model.*", "text_projection.*", "logit_scale"])?;
        let spec = EncoderSpec {
            architecture: MODEL_TYPES[0].to_owned(),
            width: d,
            pooled: Some(if projection.is_some() { c.projection_dim } else { d }),
            reads: Reads::Image { channels: c.num_channels, size: [c.image_size; 2] },
            placement,
        };
        let one = Tensor::f_ones([1], placement.options())?;
        let made = Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            class_embedding: class.f_view([1, 1, d])?,
            patch_embedding,
            position_embedding,
            pre_norm,
            blocks,
            post_norm,
            post_site,
            projection,
            scale: one.shallow_clone(),
            shift: one,
        };
        let (mean, deviation) = Self::NORMALISATION;
        if made.config.num_channels == 3 {
            made.with_normalisation(&mean, &deviation)
        } else {
            let c = usize::try_from(made.config.num_channels).unwrap_or(0);
            made.with_normalisation(&vec![0.5; c], &vec![0.5; c])
        }
    }

    /// With another mean and deviation of pixels in 0 ..= 1, one a channel: `image_mean` and `image_std` of
    /// preprocessor_config.json.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of channels, or a deviation that is not > 0.
    pub fn with_normalisation(self, mean: &[f64], deviation: &[f64]) -> Result<Self> {
        let channels = self.config.num_channels;
        for numbers in [mean, deviation] {
            if i64::try_from(numbers.len()) != Ok(channels) {
                return Err(Error::value("channels of the normalisation", channels, numbers.len()));
            }
        }
        if let Some(bad) = deviation.iter().find(|&&s| !s.is_finite() || s <= 0.0) {
            return Err(Error::value("deviation of pixels", "> 0", bad));
        }
        if let Some(bad) = mean.iter().find(|m| !m.is_finite()) {
            return Err(Error::value("mean of pixels", "a finite number", bad));
        }
        // ((p + 1) / 2 − mean) / deviation
        let scale: Vec<f64> = deviation.iter().map(|s| 0.5 / s).collect();
        let shift: Vec<f64> = mean.iter().zip(deviation).map(|(m, s)| (0.5 - m) / s).collect();
        let placed = |numbers: &[f64]| -> Result<Tensor> {
            let placement = self.spec.placement;
            let numbers = Tensor::f_from_slice(numbers)?.f_to_kind(placement.kind)?;
            Ok(numbers.f_to_device(placement.device)?.f_view([1, channels, 1, 1])?)
        };
        Ok(Self { scale: placed(&scale)?, shift: placed(&shift)?, ..self })
    }

    /// Its dimensions.
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
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
            class_embedding: self.class_embedding.shallow_clone(),
            patch_embedding: self.patch_embedding.handle(),
            position_embedding: self.position_embedding.shallow_clone(),
            pre_norm: self.pre_norm.handle(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            post_norm: self.post_norm.handle(),
            post_site: self.post_site,
            projection: self.projection.as_ref().map(Linear::handle),
            scale: self.scale.shallow_clone(),
            shift: self.shift.shallow_clone(),
        }
    }

    /// Encodes `pixel_values` `[B, C, H, W]` that are normalised already, as transformers' model takes them.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn forward(&self, pixel_values: &Tensor, pass: &Pass<'_>) -> Result<Features> {
        let c = &*self.config;
        let size = pixel_values.size();
        let expected = [c.num_channels, c.image_size, c.image_size];
        if size.len() != 4 || size[1..] != expected {
            let [channels, h, w] = expected;
            return Err(Error::shape("images", format!("[B, {channels}, {h}, {w}]"), &size));
        }
        let b = size[0];
        if b == 0 {
            return Err(Error::value("images", "at least one", b));
        }
        checks::floating("images", pixel_values)?;
        pass.check(&self.sites, b)?;
        let pixels =
            pixel_values.f_to_device(self.spec.placement.device)?.f_to_kind(self.spec.placement.kind)?;
        let patches = self.patch_embedding.forward(&pixels, pass)?; // (B, D, h, w)
        let patches = patches.f_flatten(2, 3)?.f_transpose(1, 2)?; // (B, N, D)
        let class = self.class_embedding.f_expand([b, 1, c.blocks.hidden_size], false)?;
        let x = Tensor::f_cat(&[&class, &patches], 1)?.f_add(&self.position_embedding)?; // (B, 1 + N, D)
        let mut x = self.pre_norm.forward(&x)?;
        for block in &self.blocks {
            x = block.forward(&x, &Mask::Full, pass)?;
        }
        let pooled = self.post_norm.forward(&x.f_select(1, 0)?)?.f_unsqueeze(1)?; // (B, 1, D)
        let pooled = pass.hidden(self.post_site, pooled.shallow_clone(), &pooled)?.f_squeeze_dim(1)?;
        let pooled = match &self.projection {
            Some(projection) => projection.forward(&pooled, pass)?, // (B, P)
            None => pooled,
        };
        Ok(Features { hidden: x, pooled: Some(pooled) })
    }
}

impl Encoder for ClipVision {
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
        None
    }

    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let EncoderInput::Image(pixels) = input else {
            return Err(Error::unsupported("text given to an encoder of images", "EncoderInput::Image"));
        };
        if pixels.size().get(1) != Some(&self.config.num_channels) || !pixels.is_floating_point() {
            return self.forward(pixels, pass); // which says what is wrong
        }
        let pixels = pixels.f_to_device(self.spec.placement.device)?.f_to_kind(self.spec.placement.kind)?;
        self.forward(&pixels.f_mul(&self.scale)?.f_add(&self.shift)?, pass)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(Self {
            patch_embedding: self.patch_embedding.map_weights(f)?,
            blocks: self.blocks.iter().map(|block| block.map(f)).collect::<Result<_>>()?,
            projection: self.projection.as_ref().map(|layer| layer.map_weights(f)).transpose()?,
            ..self.share()
        }))
    }
}
