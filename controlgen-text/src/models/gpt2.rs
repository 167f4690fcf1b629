//! GPT-2 (Radford et al. 2019).

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Activation, Embedding, LayerNorm, Linear};
use controlgen_core::{
    Attn, Dims, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, Placement, Result, Site, SiteId,
    SiteMap, Slice, Source, State, WeightMap,
};
use tch::Tensor;

use super::kv_cache::KvCache;
use super::{check_layers, decoder_only, first_sites, map_output, special_tokens};
use controlgen_core::config::{Config, limits};

/// The values of `model_type` that this file serves.
pub const MODEL_TYPES: [&str; 1] = ["gpt2"];

/// The dimensions of a GPT-2.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// V
    pub vocab_size: i64,
    /// D
    pub n_embd: i64,
    /// How many blocks.
    pub n_layer: i64,
    /// H
    pub n_head: i64,
    /// Width of the feed-forward part: 4 D where config.json names none.
    pub n_inner: i64,
    /// The longest sequence.
    pub n_positions: i64,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// Of the feed-forward part.
    pub activation_function: Activation,
    /// Whether scores are divided by √head_dim.
    pub scale_attn_weights: bool,
    /// Whether scores are divided by the layer's number, from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether the output shares the table of embeddings.
    pub tie_word_embeddings: bool,
}

impl Gpt2Config {
    /// Reads config.json.
    ///
    /// # Errors
    /// [`controlgen_core::Error::Config`] for what is missing or makes no sense.
    pub fn from_config(config: &Config) -> Result<Self> {
        let n_embd = config.int("n_embd", 1, limits::WIDTH)?;
        let n_head = config.int("n_head", 1, limits::HEADS)?;
        if n_embd % n_head != 0 {
            return Err(config.error("n_embd", format!("a multiple of n_head = {n_head}"), n_embd));
        }
        Ok(Self {
            vocab_size: config.int("vocab_size", 1, limits::VOCAB)?,
            n_embd,
            n_layer: config.int("n_layer", 1, limits::LAYERS)?,
            n_head,
            n_inner: config.int_if("n_inner", 1, limits::WIDTH)?.unwrap_or(4 * n_embd),
            n_positions: config.int("n_positions", 1, limits::CONTEXT)?,
            layer_norm_epsilon: config.positive("layer_norm_epsilon", Some(1e-5))?,
            activation_function: Activation::from_name(
                config.str("activation_function")?.unwrap_or("gelu_new"),
            )?,
            scale_attn_weights: config.bool("scale_attn_weights", true)?,
            scale_attn_by_inverse_layer_idx: config.bool("scale_attn_by_inverse_layer_idx", false)?,
            tie_word_embeddings: config.bool("tie_word_embeddings", true)?,
        })
    }
}

/// A GPT-2.
pub struct Gpt2 {
    config: Arc<Gpt2Config>,
    spec: LmSpec,
    sites: Arc<SiteMap>,
    wte: Embedding,
    /// Learned positions, `[n_positions, D]`.
    wpe: Tensor,
    h: Vec<Block>,
    ln_f: LayerNorm,
    ln_f_site: SiteId,
    lm_head: Linear,
}

struct Block {
    ln_1: LayerNorm,
    /// Queries, keys and values: one site with three slices, as the checkpoint stores it.
    c_attn: Linear,
    attention: SiteId,
    attn_c_proj: Linear,
    attn: SiteId,
    ln_2: LayerNorm,
    c_fc: Linear,
    mlp_c_proj: Linear,
    mlp: SiteId,
}

impl Gpt2 {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`controlgen_core::Error::Config`]; [`controlgen_core::Error::Keys`], [`controlgen_core::Error::Shape`] where
    /// the checkpoint is not the model that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let c = Gpt2Config::from_config(config)?;
        let (d, ff) = (c.n_embd, c.n_inner);
        let mut sites = SiteMap::new();
        let root = weights.scope("transformer");

        let table = root.get("wte.weight", &[c.vocab_size, d])?;
        let site = sites.add("transformer.wte", Dims::Embedding { rows: c.vocab_size, width: d });
        let wte = Embedding::new(table, site);
        let wpe = root.get("wpe.weight", &[c.n_positions, d])?;
        let mut h = Vec::new();
        for i in 0..c.n_layer {
            let name = format!("transformer.h.{i}");
            let w = root.scope(format!("h.{i}"));
            let norm = |name: &str| -> Result<LayerNorm> {
                let weight = w.get(&format!("{name}.weight"), &[d])?;
                Ok(LayerNorm::new(weight, Some(w.get(&format!("{name}.bias"), &[d])?), c.layer_norm_epsilon))
            };
            // The checkpoint stores these [inputs, outputs].
            let mut conv1d = |part: &str, inputs, outputs, slices| -> Result<Linear> {
                let weight = w.transposed(&format!("{part}.weight"), &[outputs, inputs])?;
                let bias = w.get(&format!("{part}.bias"), &[outputs])?;
                let site = sites.add_site(Site {
                    name: format!("{name}.{part}"),
                    aliases: Vec::new(),
                    dims: Dims::Linear { inputs, outputs },
                    slices,
                });
                Linear::new(weight, Some(bias), &[(site, outputs)])
            };
            let slice = |name, n| Slice { name, start: n * d, len: d };
            let slices = vec![slice("q", 0), slice("k", 1), slice("v", 2)];
            let c_attn = conv1d("attn.c_attn", d, 3 * d, slices)?;
            let attn_c_proj = conv1d("attn.c_proj", d, d, Vec::new())?;
            let c_fc = conv1d("mlp.c_fc", d, ff, Vec::new())?;
            let mlp_c_proj = conv1d("mlp.c_proj", ff, d, Vec::new())?;
            let attention = Dims::Attention {
                heads: c.n_head,
                kv_heads: c.n_head,
                head_dim: d.div_euclid(c.n_head),
                cross: false,
            };
            h.push(Block {
                ln_1: norm("ln_1")?,
                c_attn,
                attention: sites.add(format!("{name}.attn"), attention),
                attn_c_proj,
                attn: sites.add(format!("{name}.attn"), Dims::Hidden { width: d }),
                ln_2: norm("ln_2")?,
                c_fc,
                mlp_c_proj,
                mlp: sites.add(format!("{name}.mlp"), Dims::Hidden { width: d }),
            });
        }
        let ln_f = LayerNorm::new(
            root.get("ln_f.weight", &[d])?,
            Some(root.get("ln_f.bias", &[d])?),
            c.layer_norm_epsilon,
        );
        let ln_f_site = sites.add("transformer.ln_f", Dims::Hidden { width: d });
        let dims = Dims::Linear { inputs: d, outputs: c.vocab_size };
        let head = [(sites.add("lm_head", dims), c.vocab_size)];
        let lm_head = if c.tie_word_embeddings {
            Linear::new(wte.weight().shallow_clone(), None, &head)?
        } else {
            Linear::new(weights.get("lm_head.weight", &[c.vocab_size, d])?, None, &head)?
        };
        let (bos, eos, pad) = special_tokens(config, c.vocab_size)?;
        let spec = LmSpec {
            architecture: "gpt2".into(),
            vocab: c.vocab_size,
            width: d,
            context: c.n_positions,
            bos,
            eos,
            pad,
            decoder_start: None,
            placement,
        };
        Ok(Self { config: Arc::new(c), spec, sites: Arc::new(sites), wte, wpe, h, ln_f, ln_f_site, lm_head })
    }

    /// Its dimensions.
    pub fn config(&self) -> &Gpt2Config {
        &self.config
    }

    /// Its first `layers` blocks over the same weights, as [`first_layers`](super::first_layers) has them.
    ///
    /// # Errors
    /// [`controlgen_core::Error::Value`] for no layers or more than there are.
    pub fn first_layers(&self, layers: usize) -> Result<Self> {
        check_layers(layers, self.h.len())?;
        let (sites, ln_f_site, head) = first_sites(&self.sites, "transformer.h", layers)?;
        let n_layer = i64::try_from(layers).unwrap_or(i64::MAX);
        let weight = self.lm_head.weight().shallow_clone();
        Ok(Self {
            config: Arc::new(Gpt2Config { n_layer, ..(*self.config).clone() }),
            sites: Arc::new(sites),
            h: self.h.iter().take(layers).map(Block::share).collect(),
            ln_f_site,
            lm_head: Linear::new(weight, None, &[(head, self.spec.vocab)])?,
            ..self.share()
        })
    }

    /// The factor on a layer's scores.
    fn scale(&self, layer: usize) -> f64 {
        let mut scale = 1.0;
        if self.config.scale_attn_weights {
            scale /= (self.config.n_embd as f64 / self.config.n_head as f64).sqrt();
        }
        if self.config.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        scale
    }

    /// Another handle over the same storage.
    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            wte: self.wte.handle(),
            wpe: self.wpe.shallow_clone(),
            h: self.h.iter().map(Block::share).collect(),
            ln_f: self.ln_f.handle(),
            ln_f_site: self.ln_f_site,
            lm_head: self.lm_head.handle(),
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let wte = self.wte.map_weights(f)?;
        let h = self.h.iter().map(|block| block.map(f)).collect::<Result<_>>()?;
        let tables = self.config.tie_word_embeddings.then_some((&self.wte, &wte));
        let lm_head = map_output(&self.lm_head, tables, f)?;
        Ok(Self { wte, h, lm_head, ..self.share() })
    }
}

impl Block {
    fn share(&self) -> Self {
        Self {
            ln_1: self.ln_1.handle(),
            c_attn: self.c_attn.handle(),
            attn_c_proj: self.attn_c_proj.handle(),
            ln_2: self.ln_2.handle(),
            c_fc: self.c_fc.handle(),
            mlp_c_proj: self.mlp_c_proj.handle(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            c_attn: self.c_attn.map_weights(f)?,
            attn_c_proj: self.attn_c_proj.map_weights(f)?,
            c_fc: self.c_fc.map_weights(f)?,
            mlp_c_proj: self.mlp_c_proj.map_weights(f)?,
            ..self.share()
        })
    }
}

impl LanguageModel for Gpt2 {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(self.share())
    }

    fn spec(&self) -> &LmSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn embeddings(&self) -> &Tensor {
        self.wte.weight()
    }

    fn start(&self, source: Source<'_>, _pass: &Pass<'_>) -> Result<State> {
        let rows = decoder_only(source)?;
        Ok(State::new(KvCache::new(&self.sites, self.h.len(), rows, self.spec.context)))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (b, t) = input.validate(&self.spec)?;
        pass.check(&self.sites, b)?;
        let cache = KvCache::of(state, &self.sites)?;
        let placed = cache.place(&input, (b, t), &pass.position_offset()?, self.spec.placement)?;
        let (d, h) = (self.config.n_embd, self.config.n_head);

        let x = self.wte.forward(input.tokens, pass)?;
        let mut x = x.f_add(&placed.lookup(&self.wpe)?)?; // (B, T, D)
        for (i, block) in self.h.iter().enumerate() {
            let qkv = block.c_attn.forward(&block.ln_1.forward(&x)?, pass)?;
            let heads = |n: i64| -> Result<Tensor> {
                let part = qkv.f_narrow(-1, n * d, d)?;
                Ok(part.f_view([b, t, h, -1])?.f_transpose(1, 2)?) // (B, H, T, hd)
            };
            let q = heads(0)?;
            let (k, v) = cache.push(i, &heads(1)?, &heads(2)?)?;
            let attn = Attn { q, k, v, mask: placed.mask.handle(), scale: Some(self.scale(i)) };
            let y = pass.attention(block.attention, attn)?;
            let y = y.f_transpose(1, 2)?.f_reshape([b, t, d])?;
            let y = block.attn_c_proj.forward(&y, pass)?;
            x = x.f_add(&pass.hidden(block.attn, y, &x)?)?;

            let y = block.c_fc.forward(&block.ln_2.forward(&x)?, pass)?;
            let y = block.mlp_c_proj.forward(&self.config.activation_function.forward(&y)?, pass)?;
            x = x.f_add(&pass.hidden(block.mlp, y, &x)?)?;
        }
        if input.logits == Logits::Last {
            x = x.f_narrow(1, t - 1, 1)?;
        }
        let x = self.ln_f.forward(&x)?;
        let x = pass.hidden(self.ln_f_site, x.shallow_clone(), &x)?;
        let logits = self.lm_head.forward(&x, pass)?; // (B, T or 1, V)
        cache.commit(placed);
        Ok(LmOutput { logits })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(self.map(f)?))
    }
}
