//! Prefix tuning (Li & Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation).

use std::path::Path;

use controlgen_core::{
    Adapter, AdapterId, At, Attn, Binding, Control, Dims, Error, Lanes, Next, Offset, Result, SiteId,
    SiteKind, SiteMap,
};
use serde_json::{Value, json};
use tch::{Device, Tensor};

use crate::active::{Which, acting};
use crate::directory::{fields_of, read_parameters, write};
use crate::fields::{Fields, object};
use crate::initial::{leaf, normal, zeros};

pub(crate) const TYPE: &str = "PREFIX_TUNING";
const PARAMETER: &str = "prompt_embeddings";

/// What a prefix is, in the names of PEFT.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefixConfig {
    /// n, the prefix's length: at least 1.
    pub num_virtual_tokens: i64,
    /// The model it was made for, as PEFT's file names it.
    pub base_model: Option<String>,
    /// PEFT's `task_type`.
    pub task_type: Option<String>,
}

impl Default for PrefixConfig {
    /// 20 positions.
    fn default() -> Self {
        Self { num_virtual_tokens: 20, base_model: None, task_type: Some("CAUSAL_LM".into()) }
    }
}

/// The attentions of a model, all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heads {
    layers: i64,
    kv_heads: i64,
    head_dim: i64,
}

/// Learned keys and values before all others, in every attention: n positions that no token stands at.
///
/// They are not rotated; the tokens' positions count on from n. As in PEFT, one parameter `[n, 2·L·Hk·hd]` holds them
/// all: seen as `[n, 2 L, Hk, hd]`, layer l has its keys at 2l and its values at 2l + 1, with Hk the heads of keys and
/// values. It is f32, and cast to what the model computes in. A new one is standard normal.
pub struct Prefix {
    id: AdapterId,
    config: PrefixConfig,
    heads: Heads,
    /// `[n, 2·L·Hk·hd]`
    embeddings: Tensor,
}

impl Prefix {
    /// A new prefix for a model of these sites, from stream 0 of the seed.
    ///
    /// # Errors
    /// [`Error::Value`] for a length below 1; [`Error::NoSite`] for a model without attention; [`Error::Unsupported`]
    /// for one whose attentions differ or attend to another sequence.
    pub fn new(config: PrefixConfig, sites: &SiteMap, seed: u64) -> Result<Self> {
        Self::build(config, sites, |shape| normal(shape, 1.0, seed, 0))
    }

    /// Opens PEFT's directory: `adapter_config.json` of type `PREFIX_TUNING`, `adapter_model.safetensors`. Whether a
    /// network made the prefix in training (`prefix_projection`) does not matter: PEFT saves what it made.
    ///
    /// # Errors
    /// Those of [`Lora::open`](crate::Lora::open); [`Error::Config`] for a prefix of another number of layers or heads.
    pub fn open(directory: impl AsRef<Path>, sites: &SiteMap) -> Result<Self> {
        let directory = directory.as_ref();
        let fields = fields_of(directory, TYPE)?;
        let opened = Self::build(read(&fields)?, sites, zeros)?;
        opened.heads.check(&fields)?;
        read_parameters(directory, &opened.parameters())?;
        Ok(opened)
    }

    fn build(
        config: PrefixConfig,
        sites: &SiteMap,
        embeddings: impl FnOnce(&[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        let n = config.num_virtual_tokens;
        if !(1..=1 << 20).contains(&n) {
            return Err(Error::value("num_virtual_tokens", "1 ..= 2^20", n));
        }
        let (heads, _) = Heads::of(sites)?;
        let embeddings = embeddings(&[n, heads.width()])?;
        Ok(Self { id: AdapterId::unique(), config, heads, embeddings })
    }

    /// What it is.
    pub fn config(&self) -> &PrefixConfig {
        &self.config
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { config: self.config.clone(), embeddings: self.embeddings.shallow_clone(), ..*self }
    }

    /// A copy of it on another device, with parameters of its own.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let embeddings = leaf(&self.embeddings.f_to_device(device)?)?;
        Ok(Self { id: AdapterId::unique(), embeddings, ..self.share() })
    }
}

/// n, and what must not be there.
fn read(fields: &Fields) -> Result<PrefixConfig> {
    fields.refuse(&["modules_to_save"], "a prefix alone")?;
    Ok(PrefixConfig {
        num_virtual_tokens: fields
            .count("num_virtual_tokens")?
            .ok_or_else(|| fields.error("num_virtual_tokens", "a whole number > 0", &Value::Null))?,
        base_model: fields.text("base_model_name_or_path")?,
        task_type: fields.text("task_type")?,
    })
}

impl Heads {
    fn of(sites: &SiteMap) -> Result<(Self, Vec<SiteId>)> {
        let mut found: Option<Self> = None;
        let mut at = Vec::new();
        for (site, it) in sites.of_kind(SiteKind::Attention) {
            let Dims::Attention { kv_heads, head_dim, cross, .. } = it.dims else { continue };
            if cross || found.is_some_and(|heads| (heads.kv_heads, heads.head_dim) != (kv_heads, head_dim)) {
                let what = format!("a prefix at {}, whose keys are not those of the other layers,", it.name);
                return Err(Error::unsupported(what, "decoder-only models of equal layers"));
            }
            at.push(site);
            found = Some(Self { layers: at.len() as i64, kv_heads, head_dim });
        }
        let none =
            || Error::NoSite { selector: "*".into(), kind: SiteKind::Attention.name(), near: Vec::new() };
        Ok((found.ok_or_else(none)?, at))
    }

    fn width(&self) -> i64 {
        2 * self.layers * self.kv_heads * self.head_dim
    }

    /// Refuses a configuration that says otherwise.
    fn check(&self, fields: &Fields) -> Result<()> {
        let own = [
            ("num_layers", self.layers),
            ("num_attention_heads", self.kv_heads),
            ("token_dim", self.kv_heads * self.head_dim),
            ("num_transformer_submodules", 1),
        ];
        for (name, expected) in own {
            if let Some(found) = fields.count(name)?.filter(|&found| found != expected) {
                return Err(fields.error(name, format!("{expected}, the model's"), &found.into()));
            }
        }
        Ok(())
    }
}

impl Control for Prefix {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        let (heads, at) = Heads::of(sites)?;
        if heads != self.heads {
            let Heads { layers, kv_heads, head_dim } = self.heads;
            let expected = format!("[{layers}, {kv_heads}, {head_dim}], the prefix's");
            let found = [heads.layers, heads.kv_heads, heads.head_dim];
            return Err(Error::shape("layers, heads of keys and their width", expected, &found));
        }
        at.into_iter().enumerate().for_each(|(layer, site)| to.at(site, layer));
        Ok(())
    }

    fn position_offset(&self, lanes: Option<&Lanes>) -> Result<Offset> {
        let n = self.config.num_virtual_tokens;
        Ok(match acting(lanes, self.id)? {
            None => Offset::All(n),
            Some(acting) => match acting.which {
                Which::All => Offset::All(n),
                Which::None => Offset::All(0),
                _ => Offset::Rows(acting.rows().iter().map(|&on| if on { n } else { 0 }).collect()),
            },
        })
    }

    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> Result<Tensor> {
        let n = self.config.num_virtual_tokens;
        let mask = match acting(at.pass.lanes, self.id)? {
            None => attn.mask.with_prefix(n)?,
            Some(acting) => match acting.which {
                Which::All => attn.mask.with_prefix(n)?,
                Which::None => return next.run(attn),
                _ => attn.mask_with_prefix_of(n, &acting.mask)?,
            },
        };
        let rows = attn.k.size4()?.0;
        let Heads { layers, kv_heads, head_dim } = self.heads;
        let all = self.embeddings.f_view([n, 2 * layers, kv_heads, head_dim])?;
        let before = |t: &Tensor, index: i64| -> Result<Tensor> {
            let prefix = all.f_select(1, index)?.f_transpose(0, 1)?.f_to_kind(t.f_kind()?)?; // (Hk, n, hd)
            let prefix = prefix.f_unsqueeze(0)?.f_expand([rows, kv_heads, n, head_dim], false)?;
            Ok(Tensor::f_cat(&[&prefix, t], 2)?) // (B, Hk, n + Tk, hd)
        };
        let layer = i64::try_from(at.slot).unwrap_or(i64::MAX);
        let (k, v) = (before(&attn.k, 2 * layer)?, before(&attn.v, 2 * layer + 1)?);
        next.run(Attn { k, v, mask, ..attn })
    }
}

impl Adapter for Prefix {
    fn id(&self) -> AdapterId {
        self.id
    }

    fn adapter_handle(&self) -> Box<dyn Adapter> {
        Box::new(self.share())
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![(PARAMETER.to_owned(), self.embeddings.shallow_clone())]
    }

    /// Writes PEFT's directory.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn save(&self, directory: &Path) -> Result<()> {
        let Heads { layers, kv_heads, head_dim } = self.heads;
        let fields = object([
            ("peft_type", json!(TYPE)),
            ("task_type", json!(self.config.task_type)),
            ("base_model_name_or_path", json!(self.config.base_model)),
            ("inference_mode", json!(true)),
            ("num_virtual_tokens", json!(self.config.num_virtual_tokens)),
            ("num_layers", json!(layers)),
            ("num_attention_heads", json!(kv_heads)),
            ("token_dim", json!(kv_heads * head_dim)),
            ("encoder_hidden_size", json!(kv_heads * head_dim)),
            ("num_transformer_submodules", json!(1)),
            ("prefix_projection", json!(false)),
        ]);
        write(directory, &fields, &self.parameters())
    }

    fn load(&mut self, directory: &Path) -> Result<()> {
        let fields = fields_of(directory, TYPE)?;
        let (own, found) = (self.config.num_virtual_tokens, read(&fields)?.num_virtual_tokens);
        if own != found {
            return Err(fields.error("num_virtual_tokens", own, &found.into()));
        }
        self.heads.check(&fields)?;
        read_parameters(directory, &self.parameters())
    }
}
