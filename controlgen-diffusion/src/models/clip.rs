//! What CLIP's two towers share (Radford et al., "Learning Transferable Visual Models From Natural Language
//! Supervision", 2021): blocks with the norm before each branch.

use controlgen_core::checkpoint::Weights;
use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Activation, LayerNorm, Linear};
use controlgen_core::{Attn, Dims, Error, Mask, Pass, Result, SiteId, SiteMap, WeightMap};
use tch::Tensor;

use super::blocks::heads;

/// The dimensions of a tower's blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipBlocks {
    /// D
    pub hidden_size: i64,
    /// Width of the feed-forward part.
    pub intermediate_size: i64,
    /// How many blocks.
    pub num_hidden_layers: i64,
    /// H
    pub num_attention_heads: i64,
    /// Of the feed-forward part.
    pub hidden_act: Activation,
    /// ε of the norms.
    pub layer_norm_eps: f64,
}

impl ClipBlocks {
    /// Reads what both towers' config.json have.
    pub(super) fn from_config(config: &Config) -> Result<Self> {
        let hidden_size = config.int("hidden_size", 1, limits::WIDTH)?;
        let heads = config.int("num_attention_heads", 1, limits::HEADS)?;
        if hidden_size % heads != 0 {
            let expected = format!("a multiple of num_attention_heads = {heads}");
            return Err(config.error("hidden_size", expected, hidden_size));
        }
        Ok(Self {
            hidden_size,
            intermediate_size: config.int("intermediate_size", 1, limits::WIDTH)?,
            num_hidden_layers: config.int("num_hidden_layers", 1, limits::LAYERS)?,
            num_attention_heads: heads,
            hidden_act: Activation::from_name(config.str("hidden_act")?.unwrap_or("quick_gelu"))?,
            layer_norm_eps: config.positive("layer_norm_eps", Some(1e-5))?,
        })
    }
}

/// The configuration of one tower: the file itself, of `model_types[0]`, or `part` of a whole CLIP's, of
/// `model_types[1]`; and the width of a projection.
pub(super) fn tower_of(config: &Config, model_types: &[&str; 2], part: &str) -> Result<(Config, i64)> {
    let own = match config.str("model_type")? {
        Some(found) if found == model_types[0] => config.clone(),
        Some(found) if found == model_types[1] => {
            config.object(part)?.ok_or_else(|| config.error(part, "an object", "nothing"))?
        }
        found => {
            let what = format!("model_type `{}`", found.unwrap_or("nothing"));
            return Err(Error::unsupported(what, model_types.join(", ")));
        }
    };
    Ok((own, config.int_if("projection_dim", 1, limits::WIDTH)?.unwrap_or(512)))
}

/// Reads a tower's layers below a place in the checkpoint and declares their sites: names are the same.
pub(super) struct Loader<'l, 'w> {
    pub weights: &'l Weights<'w>,
    pub sites: &'l mut SiteMap,
    pub blocks: ClipBlocks,
}

impl Loader<'_, '_> {
    pub fn norm(&self, name: &str) -> Result<LayerNorm> {
        let read = |part| self.weights.get(&format!("{name}.{part}"), &[self.blocks.hidden_size]);
        Ok(LayerNorm::new(read("weight")?, Some(read("bias")?), self.blocks.layer_norm_eps))
    }

    /// Products of the same input, as one.
    fn linear(&mut self, names: &[String], (inputs, outputs): (i64, i64)) -> Result<Linear> {
        let dims = Dims::Linear { inputs, outputs };
        let parts: Vec<(SiteId, i64)> =
            names.iter().map(|name| (self.sites.add(name.as_str(), dims), outputs)).collect();
        let fused = |what: &str, shape: &[i64]| -> Result<Tensor> {
            let names: Vec<String> = names.iter().map(|name| format!("{name}.{what}")).collect();
            self.weights.fused(&names.iter().map(|name| (name.as_str(), shape)).collect::<Vec<_>>())
        };
        Linear::new(fused("weight", &[outputs, inputs])?, Some(fused("bias", &[outputs])?), &parts)
    }

    /// A projection without a bias, of a model of the `class` that has one, or where the checkpoint does.
    pub fn projection_of(
        &mut self,
        (config, class): (&Config, &str),
        name: &str,
        outputs: i64,
    ) -> Result<Option<Linear>> {
        let named = config.strs_if("architectures")?.is_some_and(|names| names.contains(&class));
        let projects = named || self.weights.find(&format!("{name}.weight")).is_some();
        projects.then(|| self.projection(name, outputs)).transpose()
    }

    fn projection(&mut self, name: &str, outputs: i64) -> Result<Linear> {
        let inputs = self.blocks.hidden_size;
        let weight = self.weights.get(&format!("{name}.weight"), &[outputs, inputs])?;
        let site = self.sites.add(name, Dims::Linear { inputs, outputs });
        Linear::new(weight, None, &[(site, outputs)])
    }

    /// `{tower}.encoder.layers`.
    pub fn layers(&mut self, tower: &str) -> Result<Vec<Block>> {
        let c = self.blocks;
        let (d, heads) = (c.hidden_size, c.num_attention_heads);
        let attention =
            Dims::Attention { heads, kv_heads: heads, head_dim: d.div_euclid(heads), cross: false };
        let hidden = Dims::Hidden { width: d };
        let load = |i: i64| -> Result<Block> {
            let at = format!("{tower}.encoder.layers.{i}");
            let qkv = ["q", "k", "v"].map(|part| format!("{at}.self_attn.{part}_proj"));
            Ok(Block {
                norm1: self.norm(&format!("{at}.layer_norm1"))?,
                qkv: self.linear(&qkv, (d, d))?,
                attention: self.sites.add(format!("{at}.self_attn"), attention),
                out_proj: self.linear(&[format!("{at}.self_attn.out_proj")], (d, d))?,
                attention_branch: self.sites.add(format!("{at}.self_attn"), hidden),
                norm2: self.norm(&format!("{at}.layer_norm2"))?,
                fc1: self.linear(&[format!("{at}.mlp.fc1")], (d, c.intermediate_size))?,
                fc2: self.linear(&[format!("{at}.mlp.fc2")], (c.intermediate_size, d))?,
                mlp_branch: self.sites.add(format!("{at}.mlp"), hidden),
                heads,
                hidden_act: c.hidden_act,
            })
        };
        (0..c.num_hidden_layers).map(load).collect()
    }
}

/// One block.
pub(super) struct Block {
    norm1: LayerNorm,
    /// Queries, keys and values in one product.
    qkv: Linear,
    attention: SiteId,
    out_proj: Linear,
    attention_branch: SiteId,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    mlp_branch: SiteId,
    heads: i64,
    hidden_act: Activation,
}

impl Block {
    pub fn share(&self) -> Self {
        Self {
            norm1: self.norm1.handle(),
            qkv: self.qkv.handle(),
            out_proj: self.out_proj.handle(),
            norm2: self.norm2.handle(),
            fc1: self.fc1.handle(),
            fc2: self.fc2.handle(),
            ..*self
        }
    }

    pub fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            qkv: self.qkv.map_weights(f)?,
            out_proj: self.out_proj.map_weights(f)?,
            fc1: self.fc1.map_weights(f)?,
            fc2: self.fc2.map_weights(f)?,
            ..self.share()
        })
    }

    /// The stream `[B, T, D]` with both branches added.
    pub fn forward(&self, x: &Tensor, mask: &Mask, pass: &Pass<'_>) -> Result<Tensor> {
        let (b, t, d) = x.size3()?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?, pass)?; // (B, T, 3 D)
        let part = |n| heads(&qkv, (n, 3), self.heads); // (B, H, T, hd)
        let attn = Attn { q: part(0)?, k: part(1)?, v: part(2)?, mask: mask.handle(), scale: None };
        let y = pass.attention(self.attention, attn)?.f_transpose(1, 2)?.f_reshape([b, t, d])?;
        let y = self.out_proj.forward(&y, pass)?;
        let x = x.f_add(&pass.hidden(self.attention_branch, y, x)?)?;

        let y = self.hidden_act.forward(&self.fc1.forward(&self.norm2.forward(&x)?, pass)?)?;
        let y = self.fc2.forward(&y, pass)?;
        Ok(x.f_add(&pass.hidden(self.mlp_branch, y, &x)?)?)
    }
}
