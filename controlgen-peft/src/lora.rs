//! LoRA (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::{
    Adapter, AdapterId, At, Binding, Control, Error, MergedWeights, Result, SiteId, SiteMap,
};
use tch::{Device, Kind, Tensor};

use crate::active::on_rows;
use crate::directory::{fields_of, read_parameters, write};
use crate::initial::{kaiming, leaf, zeros};
use crate::lora_config::{LoraConfig, TYPE};
use crate::targets::Place;

/// y = W x + b + s B A x, with A `[r, inputs]`, B `[outputs, r]` and s = α/r (eq. 3; α/√r with `use_rslora`).
///
/// A begins as U(±1/√inputs), B as zeros: a new LoRA is the identity, to the bit. Parameters are f32 and so is the
/// change, whatever the model computes in, as in PEFT; the sum is rounded once.
pub struct Lora {
    id: AdapterId,
    config: Arc<LoraConfig>,
    parts: Arc<Vec<Part>>,
    /// A and B of each part.
    factors: Vec<(Tensor, Tensor)>,
}

/// One site, or one slice of one.
struct Part {
    place: Place,
    rank: i64,
    scale: f64,
}

impl Lora {
    /// A new LoRA for a model of these sites. A of part i, in the model's order, draws from stream i of the seed.
    ///
    /// # Errors
    /// [`Error::Value`] for a rank below 1, an α that is no number, a pattern that is none; [`Error::NoSite`] for a name
    /// that is nowhere.
    pub fn new(config: LoraConfig, sites: &SiteMap, seed: u64) -> Result<Self> {
        Self::build(config, sites, true, |part, number| {
            let a = kaiming([part.rank, part.place.inputs], seed, number)?;
            Ok((a, zeros(&[part.place.outputs, part.rank])?))
        })
    }

    /// Opens PEFT's directory: `adapter_config.json` of type `LORA`, `adapter_model.safetensors`. Names in
    /// `target_modules` that the model lacks are passed over if any is there, as PEFT does; the file's tensors must be
    /// those of the sites found.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`], [`Error::Config`]; [`Error::Unsupported`] for what changes the result and is
    /// not done here (DoRA, biases, modules saved whole, …); [`Error::NoSite`], [`Error::Keys`], [`Error::Shape`] for an
    /// adapter of another model; [`Error::NotFinite`].
    pub fn open(directory: impl AsRef<Path>, sites: &SiteMap) -> Result<Self> {
        let directory = directory.as_ref();
        let config = LoraConfig::read(&fields_of(directory, TYPE)?)?;
        let opened = Self::build(config, sites, false, |part, _| {
            Ok((zeros(&[part.rank, part.place.inputs])?, zeros(&[part.place.outputs, part.rank])?))
        })?;
        read_parameters(directory, &opened.parameters())?;
        Ok(opened)
    }

    fn build(
        config: LoraConfig,
        sites: &SiteMap,
        strict: bool,
        mut factors: impl FnMut(&Part, usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<Self> {
        config.validate()?;
        let places = config.in_layers(config.target_modules.resolve(sites, strict)?);
        if places.is_empty() {
            let expected = "numbers of layers with target_modules in them";
            return Err(Error::value(
                "layers_to_transform",
                expected,
                format!("{:?}", config.layers_to_transform),
            ));
        }
        let ranks = config.ranks()?;
        let part = |place: Place| {
            let (rank, scale) = ranks.of(&place.name);
            Part { place, rank, scale }
        };
        let parts: Vec<Part> = places.into_iter().map(part).collect();
        let factors =
            parts.iter().enumerate().map(|(number, part)| factors(part, number)).collect::<Result<_>>()?;
        Ok(Self { id: AdapterId::unique(), config: Arc::new(config), parts: Arc::new(parts), factors })
    }

    /// What it is.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            id: self.id,
            config: Arc::clone(&self.config),
            parts: Arc::clone(&self.parts),
            factors: self.factors.iter().map(|(a, b)| (a.shallow_clone(), b.shallow_clone())).collect(),
        }
    }

    /// A copy of it on another device, with parameters of its own.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let moved =
            |(a, b): &(Tensor, Tensor)| Ok((leaf(&a.f_to_device(device)?)?, leaf(&b.f_to_device(device)?)?));
        let factors = self.factors.iter().map(moved).collect::<Result<_>>()?;
        Ok(Self { id: AdapterId::unique(), factors, ..self.share() })
    }

    fn part(&self, slot: usize) -> Result<(&Part, &(Tensor, Tensor))> {
        let found = self.parts.get(slot).zip(self.factors.get(slot));
        found.ok_or_else(|| Error::value("a LoRA's slot", format!("0 .. {}", self.parts.len()), slot))
    }
}

/// y + s B A x.
fn add(x: &Tensor, y: &Tensor, (a, b): &(Tensor, Tensor), scale: f64) -> Result<Tensor> {
    let low = x.f_to_kind(Kind::Float)?.f_linear(a, None::<&Tensor>)?; // (.., r)
    let low = if scale == 1.0 { low } else { low.f_mul_scalar(scale)? };
    let change = low.f_linear(b, None::<&Tensor>)?; // (.., outputs)
    let kind = y.f_kind()?;
    let sum = y.f_add(&change)?; // in f32
    Ok(if kind == Kind::Float { sum } else { sum.f_to_kind(kind)? })
}

impl Control for Lora {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for (slot, part) in self.parts.iter().enumerate() {
            to.at(part.place.find_in(sites)?, slot);
        }
        Ok(())
    }

    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let (part, factors) = self.part(at.slot)?;
        on_rows(at.pass, self.id, x, y, |x, y| match part.place.slice {
            None => add(x, &y, factors, part.scale),
            Some((start, len)) => {
                let new = add(x, &y.f_narrow(-1, start, len)?, factors, part.scale)?;
                Ok(y.f_slice_scatter(&new, -1, start, start + len, 1)?)
            }
        })
    }
}

impl Adapter for Lora {
    fn id(&self) -> AdapterId {
        self.id
    }

    fn adapter_handle(&self) -> Box<dyn Adapter> {
        Box::new(self.share())
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let named = |(part, (a, b)): (&Part, &(Tensor, Tensor))| {
            let name = format!("base_model.model.{}", part.place.name);
            [
                (format!("{name}.lora_A.weight"), a.shallow_clone()),
                (format!("{name}.lora_B.weight"), b.shallow_clone()),
            ]
        };
        self.parts.iter().zip(&self.factors).flat_map(named).collect()
    }

    /// Writes PEFT's directory.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Unsupported`] for slices of fused sites, which PEFT's format cannot say.
    fn save(&self, directory: &Path) -> Result<()> {
        if let Some(part) = self.parts.iter().find(|part| part.place.slice.is_some()) {
            let what = format!("PEFT's format for `{}`, a slice of a fused site,", part.place.name);
            return Err(Error::unsupported(what, "LoRA of the whole site"));
        }
        write(directory, self.config.write(), &self.parameters())
    }

    fn load(&mut self, directory: &Path) -> Result<()> {
        let fields = fields_of(directory, TYPE)?;
        let config = LoraConfig::read(&fields)?;
        let ranks = config.ranks()?;
        for part in self.parts.iter() {
            let (rank, scale) = ranks.of(&part.place.name);
            if (rank, scale) != (part.rank, part.scale) {
                let expected = format!("rank {} and scale {} at {}", part.rank, part.scale, part.place.name);
                return Err(fields.error("r", expected, &format!("rank {rank} and scale {scale}").into()));
            }
        }
        read_parameters(directory, &self.parameters())
    }

    /// W + s B A, in f32.
    fn merged<'a>(&'a self, sites: &SiteMap) -> Result<MergedWeights<'a>> {
        let at = self.parts.iter().map(|part| part.place.find_in(sites)).collect::<Result<Vec<SiteId>>>()?;
        Ok(Box::new(move |site, w| {
            let _no_gradients = tch::no_grad_guard();
            let mut new: Option<Tensor> = None;
            let parts = self.parts.iter().zip(&self.factors).zip(&at).filter(|(_, at)| **at == site);
            for ((part, (a, b)), _) in parts.filter(|_| w.dim() == 2) {
                let sum = new.take().map_or_else(|| w.f_detach_copy()?.f_to_kind(Kind::Float), Ok)?;
                let change = b.f_matmul(a)?.f_mul_scalar(part.scale)?.f_to_device(w.device())?;
                let (start, len) = part.place.slice.unwrap_or((0, part.place.outputs));
                let _ = sum.f_narrow(0, start, len)?.f_add_(&change)?;
                new = Some(sum);
            }
            Ok(new)
        }))
    }
}
