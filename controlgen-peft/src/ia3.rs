//! (IA)³ (Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::{
    Adapter, AdapterId, At, Binding, Control, Error, MergedWeights, Result, SiteId, SiteMap,
};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::active::on_rows;
use crate::directory::{fields_of, read_parameters, write};
use crate::fields::{Fields, object};
use crate::initial::{leaf, ones};
use crate::targets::{Place, Targets, whole};

pub(crate) const TYPE: &str = "IA3";

/// What an (IA)³ is, in the names of PEFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Ia3Config {
    /// Where it acts. The paper: keys, values, and the feed-forward part's activations; in Llama `k_proj`, `v_proj`,
    /// `down_proj`, in GPT-2 `c_attn.k`, `c_attn.v`, `mlp.c_proj` (or, in PEFT's terms, all of `c_attn`).
    pub target_modules: Targets,
    /// Which of them are scaled before the product instead of after it. A name is the end of a site's name, as in PEFT.
    pub feedforward_modules: Targets,
    /// Whether the model keeps these weights transposed (GPT-2). It changes nothing here; PEFT wants to know.
    pub fan_in_fan_out: bool,
    /// The model it was made for, as PEFT's file names it.
    pub base_model: Option<String>,
    /// PEFT's `task_type`.
    pub task_type: Option<String>,
}

impl Default for Ia3Config {
    /// The paper's places in Llama.
    fn default() -> Self {
        Self {
            target_modules: Targets::names(["k_proj", "v_proj", "down_proj"]),
            feedforward_modules: Targets::names(["down_proj"]),
            fan_in_fan_out: false,
            base_model: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

/// Whether something holds of a site's name.
type SaysOf<'a> = Box<dyn Fn(&str) -> bool + 'a>;

impl Ia3Config {
    fn read(fields: &Fields) -> Result<Self> {
        fields
            .refuse(&["modules_to_save", "exclude_modules"], "(IA)³ alone, at all of its target_modules")?;
        Ok(Self {
            target_modules: Targets::read(fields, "target_modules")?.ok_or_else(|| {
                fields.error("target_modules", "names, a pattern or `all-linear`", &Value::Null)
            })?,
            feedforward_modules: Targets::read(fields, "feedforward_modules")?
                .unwrap_or(Targets::Names(Vec::new())),
            fan_in_fan_out: fields.flag("fan_in_fan_out")?,
            base_model: fields.text("base_model_name_or_path")?,
            task_type: fields.text("task_type")?,
        })
    }

    fn write(&self) -> Map<String, Value> {
        object([
            ("peft_type", json!(TYPE)),
            ("task_type", json!(self.task_type)),
            ("base_model_name_or_path", json!(self.base_model)),
            ("inference_mode", json!(true)),
            ("target_modules", self.target_modules.write()),
            ("feedforward_modules", self.feedforward_modules.write()),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("modules_to_save", Value::Null),
        ])
    }

    /// Tells whether a site's input is scaled, by its name.
    fn feedforward(&self) -> Result<SaysOf<'_>> {
        Ok(match &self.feedforward_modules {
            Targets::Names(names) => Box::new(|name| names.iter().any(|end| name.ends_with(end.as_str()))),
            Targets::Pattern(pattern) => {
                let regex = whole(pattern, "feedforward_modules")?;
                Box::new(move |name| regex.is_match(name))
            }
            Targets::AllLinear => Box::new(|_| true),
        })
    }
}

/// y = l ⊙ (W x + b), or y = W (l ⊙ x) + b at feed-forward sites (section 3.3), with l learned.
///
/// l begins as ones: a new (IA)³ is the identity, to the bit. Parameters are f32 and so is the product, whatever the
/// model computes in, as in PEFT; it is rounded once.
pub struct Ia3 {
    id: AdapterId,
    config: Arc<Ia3Config>,
    parts: Arc<Vec<Part>>,
    /// l of each part: `[outputs, 1]`, or `[1, inputs]` at feed-forward sites.
    scales: Vec<Tensor>,
}

/// One site, or one slice of one.
struct Part {
    place: Place,
    feedforward: bool,
}

impl Ia3 {
    /// A new (IA)³ for a model of these sites.
    ///
    /// # Errors
    /// [`Error::NoSite`] for a name that is nowhere; [`Error::Value`] for a pattern that is none, and for a slice of a
    /// fused site among the feed-forward ones.
    pub fn new(config: Ia3Config, sites: &SiteMap) -> Result<Self> {
        Self::build(config, sites, true)
    }

    /// Opens PEFT's directory: `adapter_config.json` of type `IA3`, `adapter_model.safetensors`.
    ///
    /// # Errors
    /// Those of [`Lora::open`](crate::Lora::open).
    pub fn open(directory: impl AsRef<Path>, sites: &SiteMap) -> Result<Self> {
        let directory = directory.as_ref();
        let opened = Self::build(Ia3Config::read(&fields_of(directory, TYPE)?)?, sites, false)?;
        read_parameters(directory, &opened.parameters())?;
        Ok(opened)
    }

    fn build(config: Ia3Config, sites: &SiteMap, strict: bool) -> Result<Self> {
        let feedforward = config.feedforward()?;
        let part = |place: Place| {
            let feedforward = feedforward(&place.name);
            if feedforward && place.slice.is_some() {
                let expected = "whole sites: slices share their input";
                return Err(Error::value("feedforward_modules", expected, place.name));
            }
            Ok(Part { place, feedforward })
        };
        let places = config.target_modules.resolve(sites, strict)?;
        let parts = places.into_iter().map(part).collect::<Result<Vec<_>>>()?;
        drop(feedforward);
        let scale = |part: &Part| {
            ones(&if part.feedforward { [1, part.place.inputs] } else { [part.place.outputs, 1] })
        };
        let scales = parts.iter().map(scale).collect::<Result<_>>()?;
        Ok(Self { id: AdapterId::unique(), config: Arc::new(config), parts: Arc::new(parts), scales })
    }

    /// What it is.
    pub fn config(&self) -> &Ia3Config {
        &self.config
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            id: self.id,
            config: Arc::clone(&self.config),
            parts: Arc::clone(&self.parts),
            scales: self.scales.iter().map(Tensor::shallow_clone).collect(),
        }
    }

    /// A copy of it on another device, with parameters of its own.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let scales = self.scales.iter().map(|l| leaf(&l.f_to_device(device)?)).collect::<Result<_>>()?;
        Ok(Self { id: AdapterId::unique(), scales, ..self.share() })
    }

    fn part(&self, slot: usize) -> Result<(&Part, &Tensor)> {
        let found = self.parts.get(slot).zip(self.scales.get(slot));
        found.ok_or_else(|| Error::value("an (IA)³'s slot", format!("0 .. {}", self.parts.len()), slot))
    }
}

/// l ⊙ t along the last dimension.
fn scaled(t: &Tensor, l: &Tensor) -> Result<Tensor> {
    let kind = t.f_kind()?;
    let product = t.f_mul(&l.f_view([-1])?)?; // in f32
    Ok(if kind == Kind::Float { product } else { product.f_to_kind(kind)? })
}

impl Control for Ia3 {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for (slot, part) in self.parts.iter().enumerate() {
            let site = part.place.find_in(sites)?;
            if part.feedforward { to.at_input(site, slot) } else { to.at(site, slot) }
        }
        Ok(())
    }

    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        let (_, l) = self.part(at.slot)?;
        let y = x.shallow_clone();
        on_rows(at.pass, self.id, &x, y, |x, _| scaled(x, l))
    }

    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let (part, l) = self.part(at.slot)?;
        on_rows(at.pass, self.id, x, y, |_, y| match part.place.slice {
            None => scaled(&y, l),
            Some((start, len)) => {
                let new = scaled(&y.f_narrow(-1, start, len)?, l)?;
                Ok(y.f_slice_scatter(&new, -1, start, start + len, 1)?)
            }
        })
    }
}

impl Adapter for Ia3 {
    fn id(&self) -> AdapterId {
        self.id
    }

    fn adapter_handle(&self) -> Box<dyn Adapter> {
        Box::new(self.share())
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let name = |part: &Part| format!("base_model.model.{}.ia3_l", part.place.name);
        self.parts.iter().map(name).zip(self.scales.iter().map(Tensor::shallow_clone)).collect()
    }

    /// Writes PEFT's directory.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] for slices of fused sites, which PEFT's format cannot say.
    fn save(&self, directory: &Path) -> Result<()> {
        if let Some(part) = self.parts.iter().find(|part| part.place.slice.is_some()) {
            let what = format!("PEFT's format for `{}`, a slice of a fused site,", part.place.name);
            return Err(Error::unsupported(what, "(IA)³ of the whole site"));
        }
        write(directory, &self.config.write(), &self.parameters())
    }

    /// Which sites are scaled before the product is told by the shapes.
    fn load(&mut self, directory: &Path) -> Result<()> {
        Ia3Config::read(&fields_of(directory, TYPE)?)?;
        read_parameters(directory, &self.parameters())
    }

    /// diag(l) W and l ⊙ b, or W diag(l) at feed-forward sites, in f32.
    fn merged<'a>(&'a self, sites: &SiteMap) -> Result<MergedWeights<'a>> {
        let at = self.parts.iter().map(|part| part.place.find_in(sites)).collect::<Result<Vec<SiteId>>>()?;
        Ok(Box::new(move |site, w| {
            let _no_gradients = tch::no_grad_guard();
            let mut new: Option<Tensor> = None;
            let parts = self.parts.iter().zip(&self.scales).zip(&at).filter(|(_, at)| **at == site);
            for ((part, l), _) in parts.filter(|((part, _), _)| w.dim() == 2 || !part.feedforward) {
                let product = new.take().map_or_else(|| w.f_detach_copy()?.f_to_kind(Kind::Float), Ok)?;
                let l = l.f_to_device(w.device())?;
                let l = if w.dim() == 2 { l } else { l.f_view([-1])? };
                let (start, len) = part.place.slice.unwrap_or((0, product.size()[0]));
                let _ = product.f_narrow(0, start, len)?.f_mul_(&l)?;
                new = Some(product);
            }
            Ok(new)
        }))
    }
}
