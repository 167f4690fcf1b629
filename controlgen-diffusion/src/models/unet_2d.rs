//! UNet2DModel of diffusers: the network of DDPM (Ho et al. 2020), and those made of its blocks (Dhariwal & Nichol 2021,
//! ADM; Ramesh et al. 2022, unCLIP's super-resolution).

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::Activation;
use controlgen_core::{
    Condition, Denoiser, DenoiserSpec, Error, Pass, Placement, Prediction, Prepared, Result, SiteMap,
    WeightMap,
};
use tch::Tensor;

use super::blocks::{
    Attends, BlockConfig, Fields, Known, LevelConfig, Resample, Scope, Sinusoid, Text, TimeEmbedding,
    TimeNorm, TimestepEmbedding, UNet, UNetConfig, one_of, unknown_block,
};
use super::class_labels::{ClassLabels, Labels};
use super::sample::{input, predicted};
use super::{Predicts, conditions};

/// The value of `_class_name` that this file serves.
pub const CLASS_NAME: &str = "UNet2DModel";

const DOWN: [&str; 3] = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"];
const UP: [&str; 3] = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"];

/// The dimensions of a UNet2DModel.
#[derive(Clone, Debug, PartialEq)]
pub struct UNet2dConfig {
    /// H and W that it was made for.
    pub sample_size: [i64; 2],
    /// Whether x is taken from 0 .. 1 to −1 .. 1 first.
    pub center_input_sample: bool,
    /// Cosines before sines in the time's embedding.
    pub flip_sin_to_cos: bool,
    /// Of the frequencies of the time's embedding.
    pub freq_shift: f64,
    /// What class labels are.
    pub class_labels: ClassLabels,
    /// The network.
    pub network: UNetConfig,
}

impl UNet2dConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for blocks and options that are not
    /// known, naming those that are.
    pub fn from_config(config: &Config) -> Result<Self> {
        let fields = Fields::read(config)?;
        let layers = config.int_if("layers_per_block", 1, limits::LAYERS)?.unwrap_or(2);
        // Null means one head.
        let head_dim = match config.has("attention_head_dim") {
            true => config.int_if("attention_head_dim", 1, limits::WIDTH)?,
            false => Some(8),
        };
        let heads = |channels| head_dim.map_or(Ok(1), |width| fields.heads_of(channels, width));
        let resample = |field: &str| -> Result<Resample> {
            let found = one_of(config, field, "conv", &["conv", "resnet"])?;
            Ok(if found == "conv" { Resample::Conv } else { Resample::Resnet })
        };
        let (down_type, up_type) = (resample("downsample_type")?, resample("upsample_type")?);
        let plain = |layers, attends, resample| BlockConfig {
            layers,
            attends,
            resample,
            skip_time_act: false,
            scale: 1.0,
        };
        let n = fields.channels.len();
        let mut blocks = Vec::with_capacity(n);
        for (i, &channels) in fields.channels.iter().enumerate() {
            let image = || -> Result<Attends> {
                Ok(Attends::Image { heads: heads(channels)?, groups: Some(fields.groups) })
            };
            let (down, up) = (fields.down[i], fields.up[n - 1 - i]);
            let down = match down {
                "DownBlock2D" => plain(layers, Attends::Nothing, Resample::Conv),
                "AttnDownBlock2D" => plain(layers, image()?, down_type),
                "ResnetDownsampleBlock2D" => plain(layers, Attends::Nothing, Resample::Resnet),
                other => return Err(unknown_block("down_block_types", other, &DOWN)),
            };
            let up = match up {
                "UpBlock2D" => plain(layers + 1, Attends::Nothing, Resample::Conv),
                "AttnUpBlock2D" => plain(layers + 1, image()?, up_type),
                "ResnetUpsampleBlock2D" => plain(layers + 1, Attends::Nothing, Resample::Resnet),
                other => return Err(unknown_block("up_block_types", other, &UP)),
            };
            blocks.push(LevelConfig { channels, down, up });
        }
        let last = fields.channels[n - 1];
        one_of(config, "mid_block_type", "UNetMidBlock2D", &["UNetMidBlock2D"])?;
        let mid = match config.has("mid_block_type") && config.get("mid_block_type").is_none() {
            true => None,
            false => {
                let groups = match config.int_if("attn_norm_num_groups", 1, limits::WIDTH)? {
                    None if fields.time_norm == TimeNorm::Default => Some(fields.groups),
                    groups => groups,
                };
                let attends = match config.bool("add_attention", true)? {
                    true => Attends::Image { heads: heads(last)?, groups },
                    false => Attends::Nothing,
                };
                let scale = config.positive("mid_block_scale_factor", Some(1.0))?;
                Some(BlockConfig { scale, ..plain(2, attends, Resample::None) })
            }
        };
        // diffusers has SiLU there, whatever `act_fn` says.
        let network = UNetConfig { out_act: Activation::Silu, ..fields.network(blocks, mid)? };
        Ok(Self {
            sample_size: fields.sample_size(network.multiple)?,
            center_input_sample: config.bool("center_input_sample", false)?,
            flip_sin_to_cos: config.bool("flip_sin_to_cos", true)?,
            freq_shift: config.number("freq_shift", 0.0)?,
            class_labels: ClassLabels::from_config(config, &["timestep", "identity"])?,
            network,
        })
    }
}

/// A UNet2DModel.
///
/// Its conditions are [`Condition::Null`] where it knows no classes, [`Condition::Class`] where it has a table of them;
/// or features: `class_labels`, a class or a level `[]` or an embedding `[D]`, as `class_embed_type` says, and `concat`
/// `[C', H, W]`, channels put after those of the sample, where it takes more channels than a sample has.
pub struct UNet2d {
    config: Arc<UNet2dConfig>,
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    class_embedding: Labels,
    network: UNet,
}

impl UNet2d {
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
        let c = UNet2dConfig::from_config(config)?;
        let spec = c.network.spec(config, (CLASS_NAME, predicts), c.sample_size, placement)?;
        let mut sites = SiteMap::new();
        let mut scope = Scope::new(weights, &mut sites, Some("lora_unet"));
        let (first, time) = (c.network.blocks[0].channels, c.network.time);
        let act = Activation::Silu;
        let time_proj = Sinusoid::new(first, c.flip_sin_to_cos, c.freq_shift, placement.device)?;
        let time_embedding =
            TimestepEmbedding::load(scope.below("time_embedding"), (first, time), act, None)?;
        let class_embedding = Labels::load(&mut scope, c.class_labels, (first, time), act)?;
        let network = UNet::load(scope, c.network.clone())?;
        weights.finish(&[])?;
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            time_proj,
            time_embedding,
            class_embedding,
            network,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &UNet2dConfig {
        &self.config
    }

    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            time_proj: self.time_proj.handle(),
            time_embedding: self.time_embedding.handle(),
            class_embedding: self.class_embedding.handle(),
            network: self.network.handle(),
        }
    }

    /// Channels of `concat`.
    fn more(&self) -> i64 {
        self.config.network.in_channels - self.spec.channels
    }
}

impl Denoiser for UNet2d {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(self.share())
    }

    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        pass.check_sites(&self.sites)?;
        let rows = i64::try_from(conditions.len()).unwrap_or(i64::MAX);
        if conditions.is_empty() {
            return Prepared::new(&self.sites, pass, 0, vec![]);
        }
        let (more, classes) = (self.more(), self.config.class_labels != ClassLabels::None);
        let known = [(more > 0, "concat"), (classes, "class_labels")];
        let known: Vec<&str> = known.into_iter().filter(|name| name.0).map(|name| name.1).collect();
        conditions::only(conditions, &known)?;
        if !classes && conditions.iter().any(|c| matches!(c, Condition::Class(_))) {
            return Err(Error::unsupported("a class", "conditions of a model that knows no classes"));
        }
        let mut tensors = Vec::new();
        if more > 0 {
            tensors.push(conditions::stacked(conditions, "concat", &[more, -1, -1], self.spec.placement)?);
        }
        let embedding = (&self.time_proj, self.config.network.time);
        let placement = self.spec.placement;
        tensors.extend(self.class_embedding.embed(conditions, embedding, placement, pass)?);
        Prepared::new(&self.sites, pass, rows, tensors)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        self.check_call(x, t, prepared, pass)?;
        let mut rest = prepared.tensors();
        let concat = (self.more() > 0).then(|| rest.split_off_first()).flatten();
        let input = input(x, concat, self.config.center_input_sample, self.spec.placement)?;
        let mut time = self.time_embedding.forward(&self.time_proj.forward(t)?, pass)?; // (B, D)
        if let Some(classes) = rest.first() {
            time = time.f_add(classes)?;
        }
        let time = TimeEmbedding::new(time, self.config.network.act)?;
        let known = Known { time: &time, text: Text::new(&[], None), pass };
        let output = self.network.forward(&input, known)?;
        predicted(&output, x, &self.spec)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Self {
            time_embedding: self.time_embedding.map_weights(f)?,
            class_embedding: self.class_embedding.map_weights(f)?,
            network: self.network.map_weights(f)?,
            ..self.share()
        }))
    }
}
