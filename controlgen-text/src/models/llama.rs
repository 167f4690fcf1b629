//! Llama (Touvron et al. 2023) and the models that differ from it by a bias or a norm: SmolLM, Mistral, Qwen2, Qwen3.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Activation, Embedding, Linear, RmsNorm, Rotary, RotaryScaling};
use controlgen_core::{
    Attn, Dims, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, Placement, Result, SiteId,
    SiteMap, Source, State, WeightMap,
};
use tch::Tensor;

use super::kv_cache::KvCache;
use super::{check_layers, decoder_only, first_sites, map_output, special_tokens};
use controlgen_core::config::{Config, limits};

/// The values of `model_type` that this file serves.
pub const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// The dimensions of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// V
    pub vocab_size: i64,
    /// D
    pub hidden_size: i64,
    /// Width of the gated product.
    pub intermediate_size: i64,
    /// How many blocks.
    pub num_hidden_layers: i64,
    /// H
    pub num_attention_heads: i64,
    /// Hk: fewer heads for keys and values (Ainslie et al. 2023).
    pub num_key_value_heads: i64,
    /// hd
    pub head_dim: i64,
    /// The longest sequence.
    pub max_position_embeddings: i64,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: RotaryScaling,
    /// Of the gate.
    pub hidden_act: Activation,
    /// Whether the output shares the table of embeddings.
    pub tie_word_embeddings: bool,
    /// Biases on queries, keys and values.
    pub qkv_bias: bool,
    /// A bias on the attention's output.
    pub output_bias: bool,
    /// Biases in the feed-forward part.
    pub mlp_bias: bool,
    /// Norms on queries and keys, head by head (Qwen3).
    pub qk_norm: bool,
}

impl LlamaConfig {
    /// Reads config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
    ///
    /// # Errors
    /// [`Error::Config`] for what is missing or makes no sense; [`Error::Unsupported`] for sliding windows and
    /// other rotary scalings.
    pub fn from_config(config: &Config, model_type: &str) -> Result<Self> {
        let hidden_size = config.int("hidden_size", 1, limits::WIDTH)?;
        let heads = config.int("num_attention_heads", 1, limits::HEADS)?;
        let kv_heads = config.int_if("num_key_value_heads", 1, heads)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return Err(config.error("num_key_value_heads", expected, kv_heads));
        }
        let head_dim = match config.int_if("head_dim", 1, limits::WIDTH)? {
            Some(head_dim) => head_dim,
            None if hidden_size % heads == 0 => hidden_size.div_euclid(heads),
            None => {
                let expected =
                    format!("a multiple of num_attention_heads = {heads}, there being no head_dim");
                return Err(config.error("hidden_size", expected, hidden_size));
            }
        };
        let windowed = match model_type {
            "mistral" => true,
            "qwen2" | "qwen3" => config.bool("use_sliding_window", false)?,
            _ => false,
        };
        let context = config.int("max_position_embeddings", 1, limits::CONTEXT)?;
        if windowed {
            // A window that no sequence fills is none.
            if let Some(window) = config.int_if("sliding_window", 1, i64::MAX)?.filter(|&w| w < context) {
                return Err(Error::unsupported(
                    format!("sliding_window {window}"),
                    "models that attend to all of their context",
                ));
            }
        }
        // Qwen2 always has biases on queries, keys and values, Mistral never; neither has a field for it.
        let bias = match model_type {
            "qwen2" => true,
            "mistral" => false,
            _ => config.bool("attention_bias", false)?,
        };
        Ok(Self {
            vocab_size: config.int("vocab_size", 1, limits::VOCAB)?,
            hidden_size,
            intermediate_size: config.int("intermediate_size", 1, limits::WIDTH)?,
            num_hidden_layers: config.int("num_hidden_layers", 1, limits::LAYERS)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: context,
            rms_norm_eps: config.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta: rope_theta(config)?,
            rope_scaling: rope_scaling(config)?,
            hidden_act: Activation::from_name(config.str("hidden_act")?.unwrap_or("silu"))?,
            tie_word_embeddings: config.bool("tie_word_embeddings", false)?,
            qkv_bias: bias,
            output_bias: bias && model_type != "qwen2",
            mlp_bias: model_type == "llama" && config.bool("mlp_bias", false)?,
            qk_norm: model_type == "qwen3",
        })
    }
}

fn rope_theta(config: &Config) -> Result<f64> {
    match config.object("rope_parameters")? {
        Some(rope) if rope.get("rope_theta").is_some() => rope.positive("rope_theta", None),
        _ => config.positive("rope_theta", Some(10000.0)),
    }
}

fn rope_scaling(config: &Config) -> Result<RotaryScaling> {
    let rope = match config.object("rope_parameters")? {
        Some(rope) => Some(rope),
        None => config.object("rope_scaling")?,
    };
    let Some(rope) = rope else { return Ok(RotaryScaling::None) };
    let name = match rope.str("rope_type")? {
        Some(name) => name,
        None => rope.str("type")?.unwrap_or("default"),
    };
    Ok(match name {
        "default" => RotaryScaling::None,
        "linear" => RotaryScaling::Linear { factor: rope.positive("factor", None)? },
        "llama3" => {
            let original = "original_max_position_embeddings";
            let factor = rope.positive("factor", None)?;
            let low_freq_factor = rope.positive("low_freq_factor", None)?;
            let high_freq_factor = rope.positive("high_freq_factor", None)?;
            let original_context = rope.positive(original, None)?;
            if low_freq_factor >= high_freq_factor {
                return Err(rope.error("low_freq_factor", "less than high_freq_factor", low_freq_factor));
            }
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }
        }
        other => return Err(Error::unsupported(format!("rope_type `{other}`"), "default, linear, llama3")),
    })
}

/// A Llama.
pub struct Llama {
    config: Arc<LlamaConfig>,
    spec: LmSpec,
    sites: Arc<SiteMap>,
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    norm_site: SiteId,
    lm_head: Linear,
    rotary: Rotary,
}

struct Block {
    input_layernorm: RmsNorm,
    /// Queries, keys and values in one product.
    qkv_proj: Linear,
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    attention: SiteId,
    o_proj: Linear,
    self_attn: SiteId,
    post_attention_layernorm: RmsNorm,
    /// Gate and up in one product.
    gate_up_proj: Linear,
    down_proj: Linear,
    mlp: SiteId,
}

impl Llama {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the
    /// model that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        let architecture = config.str("model_type")?.unwrap_or("llama").to_owned();
        let c = LlamaConfig::from_config(config, &architecture)?;
        let (d, ff, hd) = (c.hidden_size, c.intermediate_size, c.head_dim);
        let (q, kv) = (c.num_attention_heads * hd, c.num_key_value_heads * hd);
        let mut sites = SiteMap::new();
        let linear = |inputs, outputs| Dims::Linear { inputs, outputs };

        let table = weights.get("model.embed_tokens.weight", &[c.vocab_size, d])?;
        let site = sites.add("model.embed_tokens", Dims::Embedding { rows: c.vocab_size, width: d });
        let embed_tokens = Embedding::new(table, site);
        let mut layers = Vec::new();
        for i in 0..c.num_hidden_layers {
            let name = format!("model.layers.{i}");
            let w = weights.scope(&name);
            let norm = |name: &str, width| -> Result<RmsNorm> {
                Ok(RmsNorm::new(w.get(name, &[width])?, c.rms_norm_eps))
            };
            // Several projections of the same input, as one product.
            let mut fused = |parts: &[(&str, i64, i64)], bias: bool| -> Result<Linear> {
                let mut ids = Vec::new();
                for &(part, inputs, outputs) in parts {
                    ids.push((sites.add(format!("{name}.{part}"), linear(inputs, outputs)), outputs));
                }
                let weights: Vec<_> = parts.iter().map(|p| (format!("{}.weight", p.0), [p.2, p.1])).collect();
                let weights: Vec<_> = weights.iter().map(|(n, s)| (n.as_str(), &s[..])).collect();
                let weight = w.fused(&weights)?;
                let bias = if bias {
                    let biases: Vec<_> = parts.iter().map(|p| (format!("{}.bias", p.0), [p.2])).collect();
                    let biases: Vec<_> = biases.iter().map(|(n, s)| (n.as_str(), &s[..])).collect();
                    Some(w.fused(&biases)?)
                } else {
                    None
                };
                Linear::new(weight, bias, &ids)
            };
            let qkv_proj = fused(
                &[("self_attn.q_proj", d, q), ("self_attn.k_proj", d, kv), ("self_attn.v_proj", d, kv)],
                c.qkv_bias,
            )?;
            let o_proj = fused(&[("self_attn.o_proj", q, d)], c.output_bias)?;
            let gate_up_proj = fused(&[("mlp.gate_proj", d, ff), ("mlp.up_proj", d, ff)], c.mlp_bias)?;
            let down_proj = fused(&[("mlp.down_proj", ff, d)], c.mlp_bias)?;
            let qk_norm = if c.qk_norm {
                Some((norm("self_attn.q_norm.weight", hd)?, norm("self_attn.k_norm.weight", hd)?))
            } else {
                None
            };
            let attention = Dims::Attention {
                heads: c.num_attention_heads,
                kv_heads: c.num_key_value_heads,
                head_dim: hd,
                cross: false,
            };
            layers.push(Block {
                input_layernorm: norm("input_layernorm.weight", d)?,
                qkv_proj,
                qk_norm,
                attention: sites.add(format!("{name}.self_attn"), attention),
                o_proj,
                self_attn: sites.add(format!("{name}.self_attn"), Dims::Hidden { width: d }),
                post_attention_layernorm: norm("post_attention_layernorm.weight", d)?,
                gate_up_proj,
                down_proj,
                mlp: sites.add(format!("{name}.mlp"), Dims::Hidden { width: d }),
            });
        }
        let norm = RmsNorm::new(weights.get("model.norm.weight", &[d])?, c.rms_norm_eps);
        let norm_site = sites.add("model.norm", Dims::Hidden { width: d });
        let dims = Dims::Linear { inputs: d, outputs: c.vocab_size };
        let head = [(sites.add("lm_head", dims), c.vocab_size)];
        let lm_head = if c.tie_word_embeddings {
            Linear::new(embed_tokens.weight().shallow_clone(), None, &head)?
        } else {
            Linear::new(weights.get("lm_head.weight", &[c.vocab_size, d])?, None, &head)?
        };
        let rotary = Rotary::new(hd, c.rope_theta, c.rope_scaling, placement)?;
        let (bos, eos, pad) = special_tokens(config, c.vocab_size)?;
        let spec = LmSpec {
            architecture,
            vocab: c.vocab_size,
            width: d,
            context: c.max_position_embeddings,
            bos,
            eos,
            pad,
            decoder_start: None,
            placement,
        };
        Ok(Self {
            config: Arc::new(c),
            spec,
            sites: Arc::new(sites),
            embed_tokens,
            layers,
            norm,
            norm_site,
            lm_head,
            rotary,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Its first `layers` blocks over the same weights, as [`first_layers`](super::first_layers) has them.
    ///
    /// # Errors
    /// [`Error::Value`] for no layers or more than there are.
    pub fn first_layers(&self, layers: usize) -> Result<Self> {
        check_layers(layers, self.layers.len())?;
        let (sites, norm_site, head) = first_sites(&self.sites, "model.layers", layers)?;
        let num_hidden_layers = i64::try_from(layers).unwrap_or(i64::MAX);
        let weight = self.lm_head.weight().shallow_clone();
        Ok(Self {
            config: Arc::new(LlamaConfig { num_hidden_layers, ..(*self.config).clone() }),
            sites: Arc::new(sites),
            layers: self.layers.iter().take(layers).map(Block::share).collect(),
            norm_site,
            lm_head: Linear::new(weight, None, &[(head, self.spec.vocab)])?,
            ..self.share()
        })
    }

    /// Another handle over the same storage.
    fn share(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            embed_tokens: self.embed_tokens.handle(),
            layers: self.layers.iter().map(Block::share).collect(),
            norm: self.norm.handle(),
            norm_site: self.norm_site,
            lm_head: self.lm_head.handle(),
            rotary: self.rotary.handle(),
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        let embed_tokens = self.embed_tokens.map_weights(f)?;
        let layers = self.layers.iter().map(|block| block.map(f)).collect::<Result<_>>()?;
        let tables = self.config.tie_word_embeddings.then_some((&self.embed_tokens, &embed_tokens));
        let lm_head = map_output(&self.lm_head, tables, f)?;
        Ok(Self { embed_tokens, layers, lm_head, ..self.share() })
    }
}

impl Block {
    fn share(&self) -> Self {
        Self {
            input_layernorm: self.input_layernorm.handle(),
            qkv_proj: self.qkv_proj.handle(),
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| (q.handle(), k.handle())),
            o_proj: self.o_proj.handle(),
            post_attention_layernorm: self.post_attention_layernorm.handle(),
            gate_up_proj: self.gate_up_proj.handle(),
            down_proj: self.down_proj.handle(),
            ..*self
        }
    }

    fn map(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self {
            qkv_proj: self.qkv_proj.map_weights(f)?,
            o_proj: self.o_proj.map_weights(f)?,
            gate_up_proj: self.gate_up_proj.map_weights(f)?,
            down_proj: self.down_proj.map_weights(f)?,
            ..self.share()
        })
    }
}

impl LanguageModel for Llama {
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
        self.embed_tokens.weight()
    }

    fn start(&self, source: Source<'_>, _pass: &Pass<'_>) -> Result<State> {
        let rows = decoder_only(source)?;
        Ok(State::new(KvCache::new(&self.sites, self.layers.len(), rows, self.spec.context)))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (b, t) = input.validate(&self.spec)?;
        pass.check(&self.sites, b)?;
        let cache = KvCache::of(state, &self.sites)?;
        let placed = cache.place(&input, (b, t), &pass.position_offset()?, self.spec.placement)?;
        let rotations = placed.rotations(&self.rotary)?;
        let (h, hk, hd) =
            (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim);
        let act = self.config.hidden_act;
        let ff = self.config.intermediate_size;

        let mut x = self.embed_tokens.forward(input.tokens, pass)?; // (B, T, D)
        for (i, block) in self.layers.iter().enumerate() {
            let qkv = block.qkv_proj.forward(&block.input_layernorm.forward(&x)?, pass)?;
            let qkv = qkv.f_view([b, t, h + 2 * hk, hd])?;
            let v = qkv.f_narrow(2, h + hk, hk)?.f_transpose(1, 2)?; // (B, Hk, T, hd)
            let qk = match &block.qk_norm {
                None => rotations.apply(&qkv.f_narrow(2, 0, h + hk)?)?,
                Some((q_norm, k_norm)) => {
                    let q = q_norm.forward(&qkv.f_narrow(2, 0, h)?)?;
                    let k = k_norm.forward(&qkv.f_narrow(2, h, hk)?)?;
                    rotations.apply(&Tensor::f_cat(&[&q, &k], 2)?)?
                }
            };
            let q = qk.f_narrow(2, 0, h)?.f_transpose(1, 2)?; // (B, H, T, hd)
            let k = qk.f_narrow(2, h, hk)?.f_transpose(1, 2)?; // (B, Hk, T, hd)
            let (k, v) = cache.push(i, &k, &v)?;
            let attn = Attn { q, k, v, mask: placed.mask.handle(), scale: None };
            let y = pass.attention(block.attention, attn)?;
            let y = y.f_transpose(1, 2)?.f_reshape([b, t, h * hd])?;
            let y = block.o_proj.forward(&y, pass)?;
            x = x.f_add(&pass.hidden(block.self_attn, y, &x)?)?;

            let y = block.gate_up_proj.forward(&block.post_attention_layernorm.forward(&x)?, pass)?;
            let y = act.forward(&y.f_narrow(-1, 0, ff)?)?.f_mul(&y.f_narrow(-1, ff, ff)?)?;
            let y = block.down_proj.forward(&y, pass)?;
            x = x.f_add(&pass.hidden(block.mlp, y, &x)?)?;
        }
        if input.logits == Logits::Last {
            x = x.f_narrow(1, t - 1, 1)?;
        }
        let x = self.norm.forward(&x)?;
        let x = pass.hidden(self.norm_site, x.shallow_clone(), &x)?;
        let logits = self.lm_head.forward(&x, pass)?; // (B, T or 1, V)
        cache.commit(placed);
        Ok(LmOutput { logits })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(self.map(f)?))
    }
}
