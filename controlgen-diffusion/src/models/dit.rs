//! The diffusion transformer (Peebles & Xie 2022): patches of a latent, attention over all of them, and a class and a
//! timestep that scale, shift and gate every branch (adaLN-Zero).

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Activation, Conv2d, Embedding, LayerNorm, Linear};
use controlgen_core::{
    Attn, Condition, Denoiser, DenoiserSpec, Dims, Error, Mask, Pass, Placement, Prediction, Prepared,
    Result, SiteId, SiteMap, Tokens, WeightMap,
};
use tch::{Device, Kind, Tensor};

use super::Predicts;
use super::blocks::{Scope, Sinusoid, TimestepEmbedding, add, heads, in_place};
use super::sample::predicted;

/// The values of `_class_name` that this file serves: old directories say `Transformer2DModel`, with a `norm_type` of
/// `ada_norm_zero`.
pub const CLASS_NAMES: [&str; 2] = ["DiTTransformer2DModel", "Transformer2DModel"];

/// Width of the sinusoid of timesteps.
const TIME: i64 = 256;

/// The dimensions of a DiT.
#[derive(Clone, Debug, PartialEq)]
pub struct DitConfig {
    /// C
    pub in_channels: i64,
    /// C, or 2 C with a learned variance.
    pub out_channels: i64,
    /// H and W of the latents that it was trained on.
    pub sample_size: i64,
    /// p: a patch has p² places.
    pub patch_size: i64,
    /// How many blocks.
    pub num_layers: i64,
    /// Heads.
    pub num_attention_heads: i64,
    /// Width of a head; D is as many times it as there are heads.
    pub attention_head_dim: i64,
    /// Whether queries, keys and values have biases.
    pub attention_bias: bool,
    /// How many classes there are. The table has one row more, for none of them.
    pub num_embeds_ada_norm: i64,
    /// Of the feed-forward part.
    pub activation: Activation,
    /// Whether the norm before the feed-forward part has a gain and a bias.
    pub norm_elementwise_affine: bool,
    /// ε of that norm; the others' is 1e-6.
    pub norm_eps: f64,
}

impl DitConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for other norms, activations and
    /// what only other transformers have (text, codebooks).
    pub fn from_config(config: &Config) -> Result<Self> {
        if let Some(name) = config.str("_class_name")?.filter(|name| !CLASS_NAMES.contains(name)) {
            return Err(Error::unsupported(format!("_class_name `{name}`"), CLASS_NAMES.join(", ")));
        }
        let norm = config.str("norm_type")?.unwrap_or("ada_norm_zero");
        if norm != "ada_norm_zero" {
            return Err(Error::unsupported(format!("norm_type `{norm}`"), "ada_norm_zero"));
        }
        for field in ["cross_attention_dim", "caption_channels", "num_vector_embeds"] {
            if let Some(value) = config.get(field) {
                return Err(Error::unsupported(format!("{field} {value} of a DiT"), "null"));
            }
        }
        for field in ["double_self_attention", "only_cross_attention"] {
            if config.bool(field, false)? {
                return Err(Error::unsupported(format!("{field} of a DiT"), "false"));
            }
        }
        let activation = match config.str("activation_fn")?.unwrap_or("gelu-approximate") {
            "gelu" => Activation::Gelu,
            "gelu-approximate" => Activation::GeluTanh,
            other => {
                let known = "gelu, gelu-approximate";
                return Err(Error::unsupported(format!("activation_fn `{other}` of a DiT"), known));
            }
        };
        let heads = config.int_if("num_attention_heads", 1, limits::HEADS)?.unwrap_or(16);
        let head_dim = config.int_if("attention_head_dim", 1, limits::WIDTH)?.unwrap_or(72);
        if heads * head_dim % 4 != 0 {
            // Half of the width says where a patch stands along a side, half of that by sines.
            let expected = format!("a multiple of 4 times num_attention_heads = {heads}");
            return Err(config.error("attention_head_dim", expected, head_dim));
        }
        let in_channels = config.int_if("in_channels", 1, limits::WIDTH)?.unwrap_or(4);
        let out_channels = config.int_if("out_channels", 1, 2 * limits::WIDTH)?.unwrap_or(in_channels);
        if out_channels != in_channels && out_channels != 2 * in_channels {
            let expected = format!("in_channels = {in_channels}, or twice as many");
            return Err(config.error("out_channels", expected, out_channels));
        }
        let sample_size = config.int_if("sample_size", 1, limits::WIDTH)?.unwrap_or(32);
        let patch_size = config.int_if("patch_size", 1, limits::WIDTH)?.unwrap_or(2);
        if sample_size % patch_size != 0 {
            let expected = format!("a multiple of patch_size = {patch_size}");
            return Err(config.error("sample_size", expected, sample_size));
        }
        Ok(Self {
            in_channels,
            out_channels,
            sample_size,
            patch_size,
            num_layers: config.int_if("num_layers", 1, limits::LAYERS)?.unwrap_or(28),
            num_attention_heads: heads,
            attention_head_dim: head_dim,
            attention_bias: config.bool("attention_bias", true)?,
            num_embeds_ada_norm: config.int_if("num_embeds_ada_norm", 1, limits::VOCAB)?.unwrap_or(1000),
            activation,
            norm_elementwise_affine: config.bool("norm_elementwise_affine", false)?,
            norm_eps: config.positive("norm_eps", Some(1e-5))?,
        })
    }

    /// D
    pub fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }
}

/// A diffusion transformer.
///
/// It takes [`Condition::Class`] and [`Condition::Null`], the class of none, which classifier-free guidance needs.
/// Where it has twice as many channels out as in, half of them are the variance, whatever [`Predicts`] says.
pub struct Dit {
    config: Arc<DitConfig>,
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    patches: Conv2d,
    /// `[1, T, D]` for the size that it was trained on.
    positions: Tensor,
    sinusoid: Sinusoid,
    blocks: Vec<Block>,
    /// Layer norm without gain.
    norm: LayerNorm,
    modulation: Linear,
    out: Linear,
}

struct Block {
    time: TimestepEmbedding,
    classes: Embedding,
    modulation: Linear,
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
    fn load(mut scope: Scope<'_, '_>, c: &DitConfig) -> Result<Self> {
        let (d, h) = (c.width(), c.num_attention_heads);
        let mut emb = scope.below("norm1.emb");
        let time =
            TimestepEmbedding::load(emb.below("timestep_embedder"), (TIME, d), Activation::Silu, None)?;
        let classes = emb.embedding("class_embedder.embedding_table", (c.num_embeds_ada_norm + 1, d))?;
        let modulation = scope.linear("norm1.linear", (d, 6 * d), true)?;
        let mut attn = scope.below("attn1");
        let qkv = attn.fused(&["to_q", "to_k", "to_v"], (d, d), c.attention_bias)?;
        let dims = Dims::Attention { heads: h, kv_heads: h, head_dim: c.attention_head_dim, cross: false };
        let attention = attn.site("", dims);
        let to_out = attn.linear("to_out.0", (d, d), true)?;
        let attention_branch = attn.branch("", d);
        let norm3 = if c.norm_elementwise_affine {
            let read = |what| scope.weights().get(&format!("norm3.{what}"), &[d]);
            LayerNorm::new(read("weight")?, Some(read("bias")?), c.norm_eps)
        } else {
            plain_norm(modulation.weight(), d, c.norm_eps)?
        };
        Ok(Self {
            time,
            classes,
            norm1: plain_norm(modulation.weight(), d, 1e-6)?,
            modulation,
            qkv,
            attention,
            to_out,
            attention_branch,
            norm3,
            ff_in: scope.linear("ff.net.0.proj", (d, 4 * d), true)?,
            ff_out: scope.linear("ff.net.2", (4 * d, d), true)?,
            ff_branch: scope.branch("ff", d),
        })
    }
}

/// A layer norm over D without gain and bias, where `like` lies.
fn plain_norm(like: &Tensor, d: i64, eps: f64) -> Result<LayerNorm> {
    Ok(LayerNorm::new(Tensor::f_ones([d], (like.f_kind()?, like.device()))?, None, eps))
}

impl Dit {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Value`] where a variance is expected of a model without one;
    /// [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model that the configuration describes.
    pub fn load(
        config: &Config,
        weights: &Weights<'_>,
        predicts: Predicts,
        placement: Placement,
    ) -> Result<Self> {
        let c = DitConfig::from_config(config)?;
        let learned_variance = c.out_channels == 2 * c.in_channels;
        if predicts.learned_variance && !learned_variance {
            let expected = format!("{}, half of them the variance", 2 * c.in_channels);
            return Err(Error::value("out_channels of a DiT", expected, c.out_channels));
        }
        let (d, p, mut sites) = (c.width(), c.patch_size, SiteMap::new());
        let mut root = Scope::new(weights, &mut sites, None);
        let patches = root.conv("pos_embed.proj", (c.in_channels, d), p, (p, 0))?;
        let norm = plain_norm(patches.weight(), d, 1e-6)?;
        let mut blocks = Vec::new();
        for i in 0..c.num_layers {
            blocks.push(Block::load(root.below(format!("transformer_blocks.{i}")), &c)?);
        }
        let modulation = root.linear("proj_out_1", (d, 2 * d), true)?;
        let out = root.linear("proj_out_2", (d, p * p * c.out_channels), true)?;
        weights.finish(&["pos_embed.pos_embed"])?; // computed
        let spec = DenoiserSpec {
            architecture: config.str("_class_name")?.unwrap_or(CLASS_NAMES[0]).to_owned(),
            channels: c.in_channels,
            size: [c.sample_size; 2],
            multiple: p,
            parameterisation: predicts.parameterisation,
            learned_variance,
            placement,
        };
        let side = c.sample_size.div_euclid(p);
        let positions = positions(d, [side, side], side, placement)?;
        let sinusoid = Sinusoid::new(TIME, true, 1.0, placement.device)?;
        let (config, sites) = (Arc::new(c), Arc::new(sites));
        Ok(Self { config, spec, sites, patches, positions, sinusoid, blocks, norm, modulation, out })
    }

    /// Its dimensions.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            patches: self.patches.handle(),
            positions: self.positions.shallow_clone(),
            sinusoid: self.sinusoid.handle(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            norm: self.norm.handle(),
            modulation: self.modulation.handle(),
            out: self.out.handle(),
        }
    }

    /// The row of the tables of classes.
    fn class(&self, condition: &Condition) -> Result<i64> {
        let classes = self.config.num_embeds_ada_norm;
        match condition {
            Condition::Null => Ok(classes),
            Condition::Class(class) if (0..classes).contains(class) => Ok(*class),
            Condition::Class(class) => Err(Error::value("class", format!("0 .. {classes}"), class)),
            _ => Err(Error::unsupported("a condition of a DiT with features", "a class, or none")),
        }
    }

    /// The network on x `[B, C, H, W]`, in its own element type: `[B, out_channels, H, W]`.
    fn network(&self, x: &Tensor, t: &Tensor, classes: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (c, p) = (&*self.config, self.config.patch_size);
        let (b, _, height, width) = x.size4()?;
        let grid @ [rows, columns] = [height.div_euclid(p), width.div_euclid(p)];
        let x = self.patches.forward(x, pass)?.f_flatten(2, 3)?.f_transpose(1, 2)?; // (B, T, D)
        let side = c.sample_size.div_euclid(p);
        let mut x = if grid == [side, side] {
            x.f_add(&self.positions)?
        } else {
            x.f_add(&positions(c.width(), grid, side, self.spec.placement)?)?
        };
        let t = self.sinusoid.forward(t)?; // (B, 256)
        let mut first = None;
        for (i, block) in self.blocks.iter().enumerate() {
            let emb = block.embedding(&t, &classes.f_select(1, i as i64)?, pass)?;
            x = block.forward(&x, &emb, c, pass)?;
            first.get_or_insert(emb);
        }
        if let Some(emb) = first {
            let parts = self.modulation.forward(&emb, pass)?.f_unsqueeze(1)?.f_chunk(2, -1)?;
            x = modulate(&self.norm.forward(&x)?, &parts[0], &parts[1])?;
        }
        let x = self.out.forward(&x, pass)?.f_view([b, rows, columns, p, p, c.out_channels])?;
        Ok(x.f_permute([0, 5, 1, 3, 2, 4])?.f_reshape([b, c.out_channels, height, width])?)
    }
}

impl Block {
    fn share(&self) -> Self {
        Self {
            time: self.time.handle(),
            classes: self.classes.handle(),
            modulation: self.modulation.handle(),
            qkv: self.qkv.handle(),
            to_out: self.to_out.handle(),
            norm1: self.norm1.handle(),
            norm3: self.norm3.handle(),
            ff_in: self.ff_in.handle(),
            ff_out: self.ff_out.handle(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            time: self.time.map_weights(f)?,
            classes: self.classes.map_weights(f)?,
            modulation: self.modulation.map_weights(f)?,
            qkv: self.qkv.map_weights(f)?,
            to_out: self.to_out.map_weights(f)?,
            ff_in: self.ff_in.map_weights(f)?,
            ff_out: self.ff_out.map_weights(f)?,
            ..self.share()
        })
    }

    /// silu(timestep + class): of the sinusoid `[B, 256]` and the class `[B, D]`, `[B, D]`.
    fn embedding(&self, t: &Tensor, class: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        Ok(self.time.forward(t, pass)?.f_add(class)?.f_silu()?)
    }

    /// `[B, T, D] → [B, T, D]`, with the embedding `[B, D]`.
    fn forward(&self, x: &Tensor, emb: &Tensor, c: &DitConfig, pass: &Pass<'_>) -> Result<Tensor> {
        let (b, t, d) = x.size3()?;
        let parts = self.modulation.forward(emb, pass)?.f_unsqueeze(1)?.f_chunk(6, -1)?; // of (B, 1, D)
        let [shift_attention, scale_attention, gate_attention, shift_ff, scale_ff, gate_ff] = &parts[..]
        else {
            return Err(Error::shape("modulation", format!("[{b}, 1, {}]", 6 * d), &[parts.len() as i64]));
        };
        let y = self.norm1.forward(x)?;
        let qkv = self.qkv.forward(&modulate(&y, shift_attention, scale_attention)?, pass)?;
        let part = |n| heads(&qkv, (n, 3), c.num_attention_heads); // (B, H, T, hd)
        let attn = Attn { q: part(0)?, k: part(1)?, v: part(2)?, mask: Mask::Full, scale: None };
        let y = pass.attention(self.attention, attn)?.f_transpose(1, 2)?.f_reshape([b, t, d])?;
        let y = gated(self.to_out.forward(&y, pass)?, gate_attention, pass)?;
        let x = add(pass.hidden(self.attention_branch, y, x)?, x, pass)?;

        let y = modulate(&self.norm3.forward(&x)?, shift_ff, scale_ff)?;
        let y = self.ff_in.forward(&y, pass)?; // (B, T, 4 D)
        let y = if in_place(pass) { c.activation.consume(y)? } else { c.activation.forward(&y)? };
        let y = gated(self.ff_out.forward(&y, pass)?, gate_ff, pass)?;
        add(pass.hidden(self.ff_branch, y, &x)?, &x, pass)
    }
}

/// (1 + scale) x + shift
fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    Ok(shift.f_addcmul(x, &scale.f_add_scalar(1.0)?)?)
}

/// A branch times its gate, in the place of a layer's output where that may be overwritten.
fn gated(mut y: Tensor, gate: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
    Ok(if in_place(pass) { y.f_mul_(gate)? } else { y.f_mul(gate)? })
}

/// Sines and cosines of where a patch stands, its column in the first half and its row in the second, with frequencies
/// 10000^(−4 i / D): `[1, rows · columns, D]`. Grids of another size than that of the training are stretched over it.
fn positions(d: i64, [rows, columns]: [i64; 2], side: i64, placement: Placement) -> Result<Tensor> {
    let quarter = d.div_euclid(4);
    let options = (Kind::Double, Device::Cpu);
    let exponent = Tensor::f_arange(quarter, options)?.f_mul_scalar(-(10000f64.ln()) / quarter as f64)?;
    let omega = exponent.f_exp()?;
    let along = |n: i64| -> Result<Tensor> {
        let places = Tensor::f_arange(n, options)?.f_mul_scalar(side as f64 / n as f64)?;
        let angle = places.f_unsqueeze(1)?.f_mul(&omega)?;
        Ok(Tensor::f_cat(&[angle.f_sin()?, angle.f_cos()?], 1)?) // (n, D / 2)
    };
    let shape = [rows, columns, 2 * quarter];
    let column = along(columns)?.f_unsqueeze(0)?.f_expand(shape, false)?;
    let row = along(rows)?.f_unsqueeze(1)?.f_expand(shape, false)?;
    let all = Tensor::f_cat(&[column, row], -1)?.f_view([1, rows * columns, d])?;
    Ok(all.f_to_device(placement.device)?.f_to_kind(placement.kind)?)
}

impl Denoiser for Dit {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(self.share())
    }

    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// Embeds the class, in every block by its own table.
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        pass.check_sites(&self.sites)?;
        let classes: Vec<i64> = conditions.iter().map(|c| self.class(c)).collect::<Result<_>>()?;
        let rows = classes.len() as i64;
        let classes = Tensor::f_from_slice(&classes)?.f_to_device(self.spec.placement.device)?;
        let ids = classes.f_unsqueeze(1)?; // (R, 1)
        let each = self.blocks.iter().map(|block| block.classes.forward(Tokens::Ids(&ids), pass));
        let all = Tensor::f_cat(&each.collect::<Result<Vec<_>>>()?, 1)?; // (R, L, D)
        Prepared::new(&self.sites, pass, rows, vec![all])
    }

    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        self.check_call(x, t, prepared, pass)?;
        let Placement { device, kind } = self.spec.placement;
        let own = x.f_to_device(device)?.f_to_kind(kind)?;
        let y = self.network(&own, &t.f_to_device(device)?, &prepared.tensors()[0], pass)?;
        predicted(&y, x, &self.spec)
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        let blocks = self.blocks.iter().map(|block| block.map(f)).collect::<Result<_>>()?;
        Ok(Box::new(Self {
            patches: self.patches.map_weights(f)?,
            blocks,
            modulation: self.modulation.map_weights(f)?,
            out: self.out.map_weights(f)?,
            ..self.share()
        }))
    }
}
