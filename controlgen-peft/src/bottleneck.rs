//! Bottleneck adapters (Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP; Pfeiffer et al. 2021,
//! AdapterFusion).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::layers::Activation;
use controlgen_core::{Adapter, AdapterId, At, Binding, Control, Dims, Error, Result, SiteKind, SiteMap};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::active::on_rows;
use crate::directory::{fields_of, read_parameters, write};
use crate::fields::{Fields, object};
use crate::initial::{kaiming, leaf, zeros};

pub(crate) const TYPE: &str = "BOTTLENECK";

/// What a bottleneck is.
#[derive(Clone, Debug, PartialEq)]
pub struct BottleneckConfig {
    /// The branches of the residual stream it acts on, by their names' last components. Houlsby et al.: attention and
    /// feed-forward (`self_attn`, `mlp` in Llama; `attn`, `mlp` in GPT-2). Pfeiffer et al.: `mlp`.
    pub target_modules: Vec<String>,
    /// Width of the stream over width of the bottleneck, which is rounded down, to 1 at least.
    pub reduction_factor: i64,
    /// Between the two products, in transformers' names: `relu`, `gelu`, `silu`, …
    pub non_linearity: String,
    /// s
    pub scale: f64,
}

impl Default for BottleneckConfig {
    /// Pfeiffer's: `mlp`, 16, `relu`, 1.
    fn default() -> Self {
        Self {
            target_modules: vec!["mlp".into()],
            reduction_factor: 16,
            non_linearity: "relu".into(),
            scale: 1.0,
        }
    }
}

impl BottleneckConfig {
    fn read(fields: &Fields) -> Result<Self> {
        let default = Self::default();
        Ok(Self {
            target_modules: fields.texts("target_modules")?.unwrap_or(default.target_modules),
            reduction_factor: fields.count("reduction_factor")?.unwrap_or(default.reduction_factor),
            non_linearity: fields.text("non_linearity")?.unwrap_or(default.non_linearity),
            scale: fields.number("scale")?.unwrap_or(default.scale),
        })
    }

    fn write(&self) -> Map<String, Value> {
        object([
            ("peft_type", json!(TYPE)),
            ("target_modules", json!(self.target_modules)),
            ("reduction_factor", json!(self.reduction_factor)),
            ("non_linearity", json!(self.non_linearity)),
            ("scale", json!(self.scale)),
        ])
    }
}

/// h' = h + s·(U act(D h + d) + u) on a branch h of the residual stream, before it is added, with D `[m, width]` and
/// U `[width, m]`.
///
/// D begins as U(±1/√width), all else as zeros: a new bottleneck is the identity, to the bit. Parameters are f32 and so
/// is what is added, whatever the model computes in.
///
/// # Format
/// PEFT has no bottlenecks. A directory of our own looks like PEFT's: `adapter_config.json` holds `peft_type`
/// `BOTTLENECK` and the fields of [`BottleneckConfig`]; `adapter_model.safetensors` holds, for each site,
/// `<site>.adapter_down.weight` `[m, width]`, `<site>.adapter_down.bias` `[m]`, `<site>.adapter_up.weight` `[width, m]`
/// and `<site>.adapter_up.bias` `[width]`, in f32.
pub struct Bottleneck {
    id: AdapterId,
    config: Arc<BottleneckConfig>,
    activation: Activation,
    /// Name and width of each site.
    sites: Arc<Vec<(String, i64)>>,
    /// D, d, U and u of each site.
    layers: Vec<[Tensor; 4]>,
}

/// The names of D, d, U and u.
const NAMES: [&str; 4] = ["adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias"];

impl Bottleneck {
    /// A new bottleneck for a model of these sites. D of site i, in the model's order, draws from stream i of the seed.
    ///
    /// # Errors
    /// [`Error::NoSite`] for a name that is nowhere; [`Error::Value`] for a factor below 1, a scale that is no number;
    /// [`Error::Unsupported`] for an unknown non-linearity.
    pub fn new(config: BottleneckConfig, sites: &SiteMap, seed: u64) -> Result<Self> {
        if config.reduction_factor < 1 {
            return Err(Error::value("reduction_factor", ">= 1", config.reduction_factor));
        }
        if !config.scale.is_finite() {
            return Err(Error::value("scale of a bottleneck", "a finite number", config.scale));
        }
        let activation = Activation::from_name(&config.non_linearity)?;
        let mut ids = Vec::new();
        for name in &config.target_modules {
            ids.extend(sites.select(SiteKind::Hidden, name)?);
        }
        ids.sort_unstable();
        ids.dedup();
        let mut found = Vec::new();
        for site in ids.into_iter().filter_map(|id| sites.get(id)) {
            if let Dims::Hidden { width } = site.dims {
                found.push((site.name.clone(), width));
            }
        }
        if found.is_empty() {
            return Err(Error::value("target_modules of a bottleneck", "at least one name", "none"));
        }
        let layer = |(number, (_, width)): (usize, &(String, i64))| {
            let m = width.div_euclid(config.reduction_factor).max(1);
            Ok([kaiming([m, *width], seed, number)?, zeros(&[m])?, zeros(&[*width, m])?, zeros(&[*width])?])
        };
        let layers = found.iter().enumerate().map(layer).collect::<Result<_>>()?;
        let (id, sites) = (AdapterId::unique(), Arc::new(found));
        Ok(Self { id, config: Arc::new(config), activation, sites, layers })
    }

    /// Opens a directory of our own format.
    ///
    /// # Errors
    /// Those of [`Lora::open`](crate::Lora::open) and of [`Bottleneck::new`].
    pub fn open(directory: impl AsRef<Path>, sites: &SiteMap) -> Result<Self> {
        let directory = directory.as_ref();
        let opened = Self::new(BottleneckConfig::read(&fields_of(directory, TYPE)?)?, sites, 0)?;
        read_parameters(directory, &opened.parameters())?;
        Ok(opened)
    }

    /// What it is.
    pub fn config(&self) -> &BottleneckConfig {
        &self.config
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        let same = |[a, b, c, d]: &[Tensor; 4]| {
            [a.shallow_clone(), b.shallow_clone(), c.shallow_clone(), d.shallow_clone()]
        };
        Self {
            id: self.id,
            config: Arc::clone(&self.config),
            activation: self.activation,
            sites: Arc::clone(&self.sites),
            layers: self.layers.iter().map(same).collect(),
        }
    }

    /// A copy of it on another device, with parameters of its own.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let moved = |t: &Tensor| leaf(&t.f_to_device(device)?);
        let layer = |[a, b, c, d]: &[Tensor; 4]| Ok([moved(a)?, moved(b)?, moved(c)?, moved(d)?]);
        let layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
        Ok(Self { id: AdapterId::unique(), layers, ..self.share() })
    }
}

impl Control for Bottleneck {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for (slot, (name, width)) in self.sites.iter().enumerate() {
            let Some((id, site)) = sites.of_kind(SiteKind::Hidden).find(|(_, site)| site.name == *name)
            else {
                sites.select(SiteKind::Hidden, name)?;
                return Err(Error::NoSite { selector: name.clone(), kind: "hidden-state", near: Vec::new() });
            };
            if site.dims != (Dims::Hidden { width: *width }) {
                let expected = format!("Hidden {{ width: {width} }}, the adapter's");
                return Err(Error::value(format!("site {name}"), expected, format!("{:?}", site.dims)));
            }
            to.at(id, slot);
        }
        Ok(())
    }

    fn hidden(&self, at: At<'_>, h: Tensor, _residual: &Tensor) -> Result<Tensor> {
        let Some([down, down_bias, up, up_bias]) = self.layers.get(at.slot) else {
            return Err(Error::value("a bottleneck's slot", format!("0 .. {}", self.layers.len()), at.slot));
        };
        let x = h.shallow_clone();
        on_rows(at.pass, self.id, &x, h, |_, h| {
            let kind = h.f_kind()?;
            let narrow = h.f_to_kind(Kind::Float)?.f_linear(down, Some(down_bias))?; // (.., m)
            let added = self.activation.forward(&narrow)?.f_linear(up, Some(up_bias))?; // (.., width)
            let added =
                if self.config.scale == 1.0 { added } else { added.f_mul_scalar(self.config.scale)? };
            Ok(h.f_add(&added)?.f_to_kind(kind)?)
        })
    }
}

impl Adapter for Bottleneck {
    fn id(&self) -> AdapterId {
        self.id
    }

    fn adapter_handle(&self) -> Box<dyn Adapter> {
        Box::new(self.share())
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let of_site = |((site, _), layer): (&(String, i64), &[Tensor; 4])| {
            let named = |(name, t): (&str, &Tensor)| (format!("{site}.{name}"), t.shallow_clone());
            NAMES.into_iter().zip(layer).map(named).collect::<Vec<_>>()
        };
        self.sites.iter().zip(&self.layers).flat_map(of_site).collect()
    }

    /// Writes a directory of our own format.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn save(&self, directory: &Path) -> Result<()> {
        write(directory, &self.config.write(), &self.parameters())
    }

    fn load(&mut self, directory: &Path) -> Result<()> {
        let fields = fields_of(directory, TYPE)?;
        let found = BottleneckConfig::read(&fields)?;
        if (&found.non_linearity, found.scale) != (&self.config.non_linearity, self.config.scale) {
            let expected = format!("{} scaled by {}", self.config.non_linearity, self.config.scale);
            let found = format!("{} scaled by {}", found.non_linearity, found.scale);
            return Err(fields.error("non_linearity", expected, &found.into()));
        }
        read_parameters(directory, &self.parameters())
    }
}
