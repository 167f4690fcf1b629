//! UNet2DConditionModel of diffusers: the denoisers of Stable Diffusion 1.x and 2.x (Rombach et al. 2022), SDXL (Podell et
//! al. 2023), DeepFloyd IF (after Saharia et al. 2022, Imagen) and of unCLIP's decoder (Ramesh et al. 2022).

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Activation, Linear};
use controlgen_core::{
    Condition, Denoiser, DenoiserSpec, Error, Pass, Placement, Prediction, Prepared, Result, SiteMap,
    WeightMap,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::blocks::{
    Attends, BlockConfig, Fields, Known, LevelConfig, Resample, Scope, Sinusoid, Text, TextNorm,
    TextTimeEmbedding, TimeEmbedding, TimestepEmbedding, UNet, UNetConfig, one_of, unknown_block,
};
use super::class_labels::{ClassLabels, Labels};
use super::sample::{input, predicted};
use super::{Predicts, conditions};

/// The value of `_class_name` that this file serves.
pub const CLASS_NAME: &str = "UNet2DConditionModel";

const DOWN: [&str; 4] =
    ["DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"];
const UP: [&str; 4] =
    ["UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"];
const MID: [&str; 3] = ["UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"];

/// Options that other models have, and what they are where nothing is made of them.
const LEFT_OUT: [(&str, &str); 6] = [
    ("class_embeddings_concat", "false"),
    ("dual_cross_attention", "false"),
    ("attention_type", "default"),
    ("num_attention_heads", "null"),
    ("reverse_transformer_layers_per_block", "null"),
    ("time_cond_proj_dim", "null"),
];

/// What else is added to the time's embedding: `addition_embed_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddedEmbedding {
    /// Nothing.
    None,
    /// The text's states, pooled by so many heads.
    Text {
        /// How many.
        heads: i64,
    },
    /// The text's one embedding, and numbers (sizes and crops), each by a sinusoid.
    TextTime {
        /// Width of a sinusoid.
        width: i64,
        /// Width of all together.
        inputs: i64,
    },
}

/// The dimensions of a UNet2DConditionModel.
#[derive(Clone, Debug, PartialEq)]
pub struct UNet2dConditionConfig {
    /// H and W that it was made for.
    pub sample_size: [i64; 2],
    /// Whether x is taken from 0 .. 1 to −1 .. 1 first.
    pub center_input_sample: bool,
    /// Cosines before sines in the time's embedding.
    pub flip_sin_to_cos: bool,
    /// Of the frequencies of the time's embedding.
    pub freq_shift: f64,
    /// Width of the text's states, as they are given.
    pub text_width: i64,
    /// Width that these are projected to first, where they are.
    pub encoder_hid_proj: Option<i64>,
    /// What class labels are.
    pub class_labels: ClassLabels,
    /// What else is added to the time's embedding.
    pub added: AddedEmbedding,
    /// On the sum of all that is embedded.
    pub time_embedding_act: Option<Activation>,
    /// After the time's second layer.
    pub timestep_post_act: Option<Activation>,
    /// The network.
    pub network: UNetConfig,
}

/// A boolean for each of `n` blocks, or one for all.
fn bools_each(config: &Config, field: &str, n: usize) -> Result<Vec<bool>> {
    let error = |value: &Value| config.error(field, format!("{n} booleans, or one"), value);
    match config.get(field) {
        None => Ok(vec![false; n]),
        Some(Value::Bool(one)) => Ok(vec![*one; n]),
        Some(value) => {
            let all: Option<Vec<bool>> =
                value.as_array().and_then(|values| values.iter().map(Value::as_bool).collect());
            all.filter(|all| all.len() == n).ok_or_else(|| error(value))
        }
    }
}

impl UNet2dConditionConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for blocks and options that are not
    /// known, naming those that are.
    pub fn from_config(config: &Config) -> Result<Self> {
        for (field, known) in LEFT_OUT {
            if let Some(found) = config.get(field)
                && found.as_str().map_or_else(|| found.to_string(), str::to_owned) != known
            {
                return Err(Error::unsupported(format!("{field} {found}"), known));
            }
        }
        let fields = Fields::read(config)?;
        let n = fields.channels.len();
        let each = |field: &str, default: i64, high: i64| -> Result<Vec<i64>> {
            Ok(config.ints_each(field, n, 1, high)?.unwrap_or_else(|| vec![default; n]))
        };
        let layers = each("layers_per_block", 2, limits::LAYERS)?;
        let depth = each("transformer_layers_per_block", 1, limits::LAYERS)?;
        let text = each("cross_attention_dim", 1280, limits::WIDTH)?;
        // The number of heads in transformer blocks, the width of one in all others.
        let head = each("attention_head_dim", 8, limits::WIDTH)?;
        let only = bools_each(config, "only_cross_attention", n)?;
        let linear_projection = config.bool("use_linear_projection", false)?;
        let text_norm = match config.str("cross_attention_norm")? {
            None => TextNorm::None,
            Some("layer_norm") => TextNorm::Layer,
            Some("group_norm") => TextNorm::Group,
            Some(other) => {
                let what = format!("cross_attention_norm `{other}`");
                return Err(Error::unsupported(what, "layer_norm, group_norm"));
            }
        };
        let skip_time_act = config.bool("resnet_skip_time_act", false)?;
        let scale = config.positive("resnet_out_scale_factor", Some(1.0))?;
        let plain = |layers, attends, resample| BlockConfig {
            layers,
            attends,
            resample,
            skip_time_act: false,
            scale: 1.0,
        };
        let resnet = |layers, attends| BlockConfig {
            skip_time_act,
            scale,
            ..plain(layers, attends, Resample::Resnet)
        };
        let transformer = |i: usize, channels: i64, only_cross_attention| -> Result<Attends> {
            if channels % head[i] != 0 {
                let expected = format!("a divisor of {channels} channels");
                return Err(config.error("attention_head_dim", expected, head[i]));
            }
            let (heads, layers, text) = (head[i], depth[i], text[i]);
            Ok(Attends::Text { heads, layers, text, linear_projection, only_cross_attention })
        };
        let added = |i: usize, width: i64, channels: i64, only_cross_attention| -> Result<Attends> {
            let (heads, text) = (fields.heads_of(channels, width)?, text[i]);
            if text_norm == TextNorm::Group && text % 32 != 0 {
                return Err(config.error("cross_attention_dim", "a multiple of 32, for a group norm", text));
            }
            if text_norm == TextNorm::Layer && text != channels {
                let expected = format!("{channels}, the channels, for a layer norm");
                return Err(config.error("cross_attention_dim", expected, text));
            }
            Ok(Attends::Added { heads, text, only_cross_attention, text_norm })
        };
        let mut blocks = Vec::with_capacity(n);
        for (i, &channels) in fields.channels.iter().enumerate() {
            let up_at = n - 1 - i;
            let down = match fields.down[i] {
                "DownBlock2D" => plain(layers[i], Attends::Nothing, Resample::Conv),
                "CrossAttnDownBlock2D" => {
                    plain(layers[i], transformer(i, channels, only[i])?, Resample::Conv)
                }
                "ResnetDownsampleBlock2D" => resnet(layers[i], Attends::Nothing),
                "SimpleCrossAttnDownBlock2D" => resnet(layers[i], added(i, head[i], channels, only[i])?),
                other => return Err(unknown_block("down_block_types", other, &DOWN)),
            };
            let more = layers[i] + 1;
            let up = match fields.up[up_at] {
                "UpBlock2D" => plain(more, Attends::Nothing, Resample::Conv),
                "CrossAttnUpBlock2D" => plain(more, transformer(i, channels, only[i])?, Resample::Conv),
                "ResnetUpsampleBlock2D" => resnet(more, Attends::Nothing),
                // diffusers counts widths of heads from the other end here.
                "SimpleCrossAttnUpBlock2D" => resnet(more, added(i, head[up_at], channels, only[i])?),
                other => return Err(unknown_block("up_block_types", other, &UP)),
            };
            blocks.push(LevelConfig { channels, down, up });
        }
        let last = fields.channels[n - 1];
        let one_only = matches!(config.get("only_cross_attention"), Some(Value::Bool(true)));
        let mid_only = config.bool("mid_block_only_cross_attention", one_only)?;
        let mid_scale = config.positive("mid_block_scale_factor", Some(1.0))?;
        let middle =
            |layers, attends| BlockConfig { scale: mid_scale, ..plain(layers, attends, Resample::None) };
        let mid = match config.has("mid_block_type") && config.get("mid_block_type").is_none() {
            true => None,
            false => Some(match one_of(config, "mid_block_type", MID[0], &MID)? {
                "UNetMidBlock2DCrossAttn" => middle(2, transformer(n - 1, last, false)?),
                "UNetMidBlock2DSimpleCrossAttn" => {
                    let attends = added(n - 1, head[n - 1], last, mid_only)?;
                    BlockConfig { skip_time_act, ..middle(2, attends) }
                }
                _ => middle(1, Attends::Nothing),
            }),
        };
        let mut network = fields.network(blocks, mid)?;
        // What is enlarged by a convolution takes the size of what is put beside it.
        let resized = |block: &BlockConfig| block.resample == Resample::Resnet;
        if network.downsample_padding == 1
            && !network.blocks.iter().any(|level| resized(&level.down) || resized(&level.up))
        {
            network.multiple = 1;
        }
        let inner = text[0];
        let encoder_hid = config.int_if("encoder_hid_dim", 1, limits::WIDTH)?;
        one_of(config, "encoder_hid_dim_type", "text_proj", &["text_proj"])?;
        let act = |field: &str| config.str(field)?.map(Activation::from_name).transpose();
        let text_width = encoder_hid.unwrap_or(inner);
        Ok(Self {
            sample_size: fields.sample_size(network.multiple)?,
            center_input_sample: config.bool("center_input_sample", false)?,
            flip_sin_to_cos: config.bool("flip_sin_to_cos", true)?,
            freq_shift: config.number("freq_shift", 0.0)?,
            text_width,
            encoder_hid_proj: encoder_hid.map(|_| inner),
            class_labels: ClassLabels::from_config(
                config,
                &["timestep", "identity", "projection", "simple_projection"],
            )?,
            added: added_embedding(config, text_width)?,
            time_embedding_act: act("time_embedding_act_fn")?,
            timestep_post_act: act("timestep_post_act")?,
            network,
        })
    }

    /// How many attentions see the text.
    fn of_text(&self) -> i64 {
        let of = |block: &BlockConfig, attending: i64| block.attends.of_text() * attending;
        let levels = self.network.blocks.iter().map(|l| of(&l.down, l.down.layers) + of(&l.up, l.up.layers));
        levels.sum::<i64>() + self.network.mid.as_ref().map_or(0, |mid| of(mid, mid.layers - 1))
    }

    /// Whether the text's states are asked for at all.
    fn reads_text(&self) -> bool {
        self.of_text() > 0 || matches!(self.added, AddedEmbedding::Text { .. })
    }
}

fn added_embedding(config: &Config, text_width: i64) -> Result<AddedEmbedding> {
    Ok(match config.str("addition_embed_type")? {
        None => AddedEmbedding::None,
        Some("text") => {
            let heads = config.int_if("addition_embed_type_num_heads", 1, limits::HEADS)?.unwrap_or(64);
            if text_width % heads != 0 {
                let expected = format!("a divisor of {text_width}, the text's width");
                return Err(config.error("addition_embed_type_num_heads", expected, heads));
            }
            AddedEmbedding::Text { heads }
        }
        Some("text_time") => AddedEmbedding::TextTime {
            width: config.int("addition_time_embed_dim", 2, limits::WIDTH)?,
            inputs: config.int("projection_class_embeddings_input_dim", 1, limits::WIDTH)?,
        },
        Some(other) => {
            return Err(Error::unsupported(format!("addition_embed_type `{other}`"), "text, text_time"));
        }
    })
}

/// The layers for what else is added.
enum Added {
    None,
    Text(TextTimeEmbedding),
    TextTime(Sinusoid, TimestepEmbedding),
}

impl Added {
    fn handle(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Text(layer) => Self::Text(layer.handle()),
            Self::TextTime(sinusoid, layer) => Self::TextTime(sinusoid.handle(), layer.handle()),
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(match self {
            Self::None => Self::None,
            Self::Text(layer) => Self::Text(layer.map_weights(f)?),
            Self::TextTime(sinusoid, layer) => Self::TextTime(sinusoid.handle(), layer.map_weights(f)?),
        })
    }
}

/// A UNet2DConditionModel.
///
/// Its conditions are features: `encoder_hidden_states` `[T, D]` and perhaps `encoder_attention_mask` `[T]`, not 0 for
/// what is to be seen; `text_embeds` `[P]` and `time_ids` `[n]` where its `addition_embed_type` is `text_time`;
/// `class_labels`, a class or a level `[]` or an embedding `[D]`, as its `class_embed_type` says; `concat`
/// `[C', H, W]`, channels put after those of the sample, where it takes more channels than a sample has.
///
/// Keys and values of the text, and all that is added to the time's embedding, are computed by `prepare`.
pub struct UNet2dCondition {
    config: Arc<UNet2dConditionConfig>,
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    time_proj: Sinusoid,
    time_embedding: TimestepEmbedding,
    encoder_hid_proj: Option<Linear>,
    class_embedding: Labels,
    add_embedding: Added,
    network: UNet,
}

impl UNet2dCondition {
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
        let c = UNet2dConditionConfig::from_config(config)?;
        let spec = c.network.spec(config, (CLASS_NAME, predicts), c.sample_size, placement)?;
        let mut sites = SiteMap::new();
        let mut scope = Scope::new(weights, &mut sites, Some("lora_unet"));
        let (first, time, act) = (c.network.blocks[0].channels, c.network.time, c.network.act);
        let sinusoid = |width| Sinusoid::new(width, c.flip_sin_to_cos, c.freq_shift, placement.device);
        let time_embedding =
            TimestepEmbedding::load(scope.below("time_embedding"), (first, time), act, c.timestep_post_act)?;
        let encoder_hid_proj = match c.encoder_hid_proj {
            Some(width) => Some(scope.linear("encoder_hid_proj", (c.text_width, width), true)?),
            None => None,
        };
        let class_embedding = Labels::load(&mut scope, c.class_labels, (first, time), act)?;
        let below = scope.below("add_embedding");
        let add_embedding = match c.added {
            AddedEmbedding::None => Added::None,
            AddedEmbedding::Text { heads } => {
                Added::Text(TextTimeEmbedding::load(below, (c.text_width, time), heads)?)
            }
            AddedEmbedding::TextTime { width, inputs } => Added::TextTime(
                sinusoid(width)?,
                TimestepEmbedding::load(below, (inputs, time), Activation::Silu, None)?,
            ),
        };
        let time_proj = sinusoid(first)?;
        let network = UNet::load(scope, c.network.clone())?;
        weights.finish(&[])?;
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            time_proj,
            time_embedding,
            encoder_hid_proj,
            class_embedding,
            add_embedding,
            network,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &UNet2dConditionConfig {
        &self.config
    }

    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            time_proj: self.time_proj.handle(),
            time_embedding: self.time_embedding.handle(),
            encoder_hid_proj: self.encoder_hid_proj.as_ref().map(Linear::handle),
            class_embedding: self.class_embedding.handle(),
            add_embedding: self.add_embedding.handle(),
            network: self.network.handle(),
        }
    }

    /// Channels of `concat`.
    fn more(&self) -> i64 {
        self.config.network.in_channels - self.spec.channels
    }

    /// The features that it takes.
    fn features(&self) -> Vec<&'static str> {
        let c = &*self.config;
        let added = matches!(c.added, AddedEmbedding::TextTime { .. });
        [
            (c.reads_text(), "encoder_hidden_states"),
            (self.config.of_text() > 0, "encoder_attention_mask"),
            (added, "text_embeds"),
            (added, "time_ids"),
            (c.class_labels != ClassLabels::None, "class_labels"),
            (self.more() > 0, "concat"),
        ]
        .into_iter()
        .filter(|name| name.0)
        .map(|name| name.1)
        .collect()
    }

    /// What is added to the time's embedding, `[B, D]`.
    fn embed(
        &self,
        conditions: &[Condition],
        text: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<Option<Tensor>> {
        let (placement, time) = (self.spec.placement, self.config.network.time);
        let numbers = placement.with_kind(Kind::Float);
        let stacked = |name: &str, shape: &[i64]| conditions::stacked(conditions, name, shape, placement);
        let labels = self.class_embedding.embed(conditions, (&self.time_proj, time), placement, pass)?;
        let added = match (&self.add_embedding, text) {
            (Added::None, _) | (Added::Text(_), None) => None,
            (Added::Text(layer), Some(text)) => Some(layer.forward(text, pass)?),
            (Added::TextTime(sinusoid, layer), _) => {
                let embeds = stacked("text_embeds", &[-1])?; // (B, P)
                let ids = conditions::stacked(conditions, "time_ids", &[-1], numbers)?; // (B, n)
                let times = sinusoid.forward(&ids)?.f_flatten(1, -1)?.f_to_kind(placement.kind)?; // (B, n w)
                let both = Tensor::f_cat(&[&embeds, &times], 1)?;
                if let AddedEmbedding::TextTime { width, inputs } = self.config.added
                    && both.size() != [embeds.size()[0], inputs]
                {
                    let expected = format!("[{inputs} − {width} n], beside `time_ids` [n]");
                    return Err(Error::shape("`text_embeds`", expected, &embeds.size()[1..]));
                }
                Some(layer.forward(&both, pass)?)
            }
        };
        Ok(match (labels, added) {
            (Some(labels), Some(added)) => Some(labels.f_add(&added)?),
            (labels, added) => labels.or(added),
        })
    }
}

impl Denoiser for UNet2dCondition {
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
        let (c, placement, known) = (&*self.config, self.spec.placement, self.features());
        conditions::only(conditions, &known)?;
        let classes = matches!(self.class_embedding, Labels::Table(_)) && !c.reads_text();
        if !classes && conditions.iter().any(|condition| matches!(condition, Condition::Class(_))) {
            return Err(Error::unsupported("a class", format!("features {}", known.join(", "))));
        }
        let text = match c.reads_text() {
            true => Some(conditions::stacked(
                conditions,
                "encoder_hidden_states",
                &[-1, c.text_width],
                placement,
            )?), // (B, T, D)
            false => None,
        };
        let mut tensors = Vec::new();
        if self.more() > 0 {
            tensors.push(conditions::stacked(conditions, "concat", &[self.more(), -1, -1], placement)?);
        }
        tensors.extend(self.embed(conditions, text.as_ref(), pass)?);
        if let Some(text) = text {
            if conditions::any(conditions, "encoder_attention_mask") {
                let len = text.size3()?.1;
                tensors.push(conditions::masks(conditions, "encoder_attention_mask", len, placement)?);
            }
            let states = match &self.encoder_hid_proj {
                Some(proj) => proj.forward(&text, pass)?,
                None => text,
            };
            tensors.extend(self.network.prepare(&states, pass)?);
        }
        Prepared::new(&self.sites, pass, rows, tensors)
    }

    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        self.check_call(x, t, prepared, pass)?;
        let c = &*self.config;
        let mut rest = prepared.tensors();
        let concat = (self.more() > 0).then(|| rest.split_off_first()).flatten();
        let embeds = c.class_labels != ClassLabels::None || c.added != AddedEmbedding::None;
        let embedded = embeds.then(|| rest.split_off_first()).flatten();
        let of_text = usize::try_from(c.of_text()).unwrap_or(usize::MAX);
        let keep = (rest.len() > of_text).then(|| rest.split_off_first()).flatten();

        let input = input(x, concat, c.center_input_sample, self.spec.placement)?;
        let mut time = self.time_embedding.forward(&self.time_proj.forward(t)?, pass)?; // (B, D)
        if let Some(embedded) = embedded {
            time = time.f_add(embedded)?;
        }
        if let Some(act) = c.time_embedding_act {
            time = act.forward(&time)?;
        }
        let time = TimeEmbedding::new(time, c.network.act)?;
        let output =
            self.network.forward(&input, Known { time: &time, text: Text::new(rest, keep), pass })?;
        predicted(&output, x, &self.spec)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Self {
            time_embedding: self.time_embedding.map_weights(f)?,
            encoder_hid_proj: self.encoder_hid_proj.as_ref().map(|proj| proj.map_weights(f)).transpose()?,
            class_embedding: self.class_embedding.map_weights(f)?,
            add_embedding: self.add_embedding.map_weights(f)?,
            network: self.network.map_weights(f)?,
            ..self.share()
        }))
    }
}
