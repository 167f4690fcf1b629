//! LoRA (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models).

use std::path::Path;
use std::sync::Arc;

use controlgen_core::layers::{LowRank, add_low_rank};
use controlgen_core::{
    Adapter, AdapterId, At, Binding, Control, Error, MergedWeights, Part, Result, SiteId, SiteMap,
    copy_parameters, is_recording, part_by_part,
};
use tch::{Device, Kind, Tensor};

use crate::active::on_rows;
use crate::directory::{fields_of, read_parameters, write};
use crate::initial::kaiming;
use crate::lora_config::{LoraConfig, TYPE};
use crate::targets::Place;

/// y = W x + b + s B A x, with A `[r, inputs]`, B `[outputs, r]` and s = α/r (eq. 3; α/√r with `use_rslora`).
///
/// A begins as U(±1/√inputs), B as zeros: a new LoRA is the identity, to the bit. Parameters are f32 and so is the
/// change, whatever the model computes in, as in PEFT; the sum is rounded once.
pub struct Lora {
    id: AdapterId,
    config: Arc<LoraConfig>,
    parts: Arc<Vec<Slot>>,
    /// Of each part.
    factors: Vec<Factors>,
    /// The A of runs of parts with equal inputs, one below the other: parts of one product are multiplied as one. What
    /// is written to an A is written here.
    stacks: Vec<Tensor>,
}

/// One site, or one slice of one.
#[derive(Clone)]
struct Slot {
    place: Place,
    rank: i64,
    scale: f64,
    /// Which stack its A is in, and the first row there.
    stack: usize,
    row: i64,
}

/// The parameters of a part.
struct Factors {
    /// A, `[r, inputs]`: some rows of a stack
    a: Tensor,
    /// B, `[outputs, r]`
    b: Tensor,
    /// s, without dimensions; none for 1
    scale: Option<Tensor>,
}

impl Lora {
    /// A new LoRA for a model of these sites. A of part i, in the model's order, draws from stream i of the seed.
    ///
    /// # Errors
    /// [`Error::Value`] for a rank below 1, an α that is no number, a pattern that is none; [`Error::NoSite`] for a name
    /// that is nowhere.
    pub fn new(config: LoraConfig, sites: &SiteMap, seed: u64) -> Result<Self> {
        let new = Self::build(config, sites, true)?;
        let _no_gradients = tch::no_grad_guard();
        for (number, factors) in new.factors.iter().enumerate() {
            let [r, inputs] = factors.a.size2().map(<[i64; 2]>::from)?;
            factors.a.shallow_clone().f_copy_(&kaiming([r, inputs], seed, number)?)?;
        }
        Ok(new)
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
        let opened = Self::build(config, sites, false)?;
        read_parameters(directory, &opened.parameters())?;
        Ok(opened)
    }

    fn build(config: LoraConfig, sites: &SiteMap, strict: bool) -> Result<Self> {
        config.validate()?;
        let places = config.in_layers(config.target_modules.resolve(sites, strict)?);
        if places.is_empty() {
            let expected = "numbers of layers with target_modules in them";
            let found = format!("{:?}", config.layers_to_transform);
            return Err(Error::value("layers_to_transform", expected, found));
        }
        let ranks = config.ranks()?;
        let (mut parts, mut shapes): (Vec<Slot>, Vec<[i64; 2]>) = (Vec::new(), Vec::new());
        for place in places {
            let (rank, scale) = ranks.of(&place.name);
            if parts.last().is_none_or(|last| last.place.inputs != place.inputs) {
                shapes.push([0, place.inputs]);
            }
            let stack = shapes.len() - 1;
            parts.push(Slot { rank, scale, stack, row: shapes[stack][0], place });
            shapes[stack][0] += rank;
        }
        Self::stacked(config, parts, &shapes, Device::Cpu)
    }

    /// With parameters of zeros.
    fn stacked(config: LoraConfig, parts: Vec<Slot>, shapes: &[[i64; 2]], device: Device) -> Result<Self> {
        let zeros = |shape: &[i64; 2]| Tensor::f_zeros(shape, (Kind::Float, device));
        let stacks = shapes.iter().map(zeros).collect::<Result<Vec<_>, _>>()?;
        let factors =
            parts.iter().map(|part| Factors::new(part, &stacks[part.stack])).collect::<Result<_>>()?;
        let (id, config, parts) = (AdapterId::unique(), Arc::new(config), Arc::new(parts));
        Ok(Self { id, config, parts, factors, stacks })
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
            factors: self.factors.iter().map(Factors::share).collect(),
            stacks: self.stacks.iter().map(Tensor::shallow_clone).collect(),
        }
    }

    /// A copy of it on another device, with parameters of its own.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let shapes = self.stacks.iter().map(|stack| Ok(<[i64; 2]>::from(stack.size2()?)));
        let shapes = shapes.collect::<Result<Vec<_>>>()?;
        let moved = Self::stacked((*self.config).clone(), self.parts.to_vec(), &shapes, device)?;
        copy_parameters("LoRA", &self.parameters(), &moved.parameters())?;
        Ok(moved)
    }

    /// Whether several parts can be done together: without gradients, all of the product, and whole sites whose A's are
    /// below each other.
    fn together(&self, parts: &[Part<'_>], y: &Tensor) -> Result<bool> {
        if is_recording() {
            return Ok(false);
        }
        let stack = self.part(parts[0].at.slot)?.0.stack;
        let mut end = 0;
        for (part, number) in parts.iter().zip(parts[0].at.slot..) {
            let (slot, _) = self.part(part.at.slot)?;
            let next = (part.at.slot, part.start, slot.stack) == (number, end, stack);
            if !next || slot.place.slice.is_some() {
                return Ok(false);
            }
            end += part.len;
        }
        Ok(y.size().last() == Some(&end))
    }

    /// The A's of parts that can be done together, one below the other: of their stack, unless one was given storage of
    /// its own (`set_data`).
    fn stacked_a(&self, parts: &[Part<'_>]) -> Result<Tensor> {
        let Slot { stack, row, .. } = self.part(parts[0].at.slot)?.0;
        let (mut rows, mut in_place, mut all) = (0, true, Vec::with_capacity(parts.len()));
        for part in parts {
            let (slot, Factors { a, .. }) = self.part(part.at.slot)?;
            let place = self.stacks[*stack].f_narrow(0, slot.row, slot.rank)?;
            in_place &= a.data_ptr() == place.data_ptr();
            rows += slot.rank;
            all.push(a);
        }
        Ok(if in_place { self.stacks[*stack].f_narrow(0, *row, rows)? } else { Tensor::f_cat(&all, 0)? })
    }

    fn part(&self, slot: usize) -> Result<(&Slot, &Factors)> {
        let found = self.parts.get(slot).zip(self.factors.get(slot));
        found.ok_or_else(|| Error::value("a LoRA's slot", format!("0 .. {}", self.parts.len()), slot))
    }
}

impl Factors {
    /// A in its place of `stack`, and B of zeros. B lies in memory as its transpose, which multiplies faster.
    fn new(part: &Slot, stack: &Tensor) -> Result<Self> {
        let (outputs, rank) = (part.place.outputs, part.rank);
        let options = (Kind::Float, stack.device());
        let mut b = Tensor::f_empty_strided([outputs, rank], [1, outputs], options)?;
        let _ = b.f_zero_()?;
        let a = stack.f_narrow(0, part.row, rank)?.f_detach()?;
        let scale = match part.scale {
            1.0 => None,
            scale => Some(Tensor::f_scalar_tensor(scale, options)?),
        };
        Ok(Self { a: a.f_set_requires_grad(true)?, b: b.f_set_requires_grad(true)?, scale })
    }

    fn share(&self) -> Self {
        let scale = self.scale.as_ref().map(Tensor::shallow_clone);
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), scale }
    }

    fn low_rank(&self, part: &Slot) -> LowRank<'_> {
        LowRank { a: &self.a, b: &self.b, scale: part.scale }
    }

    /// s B l, for l = A x `[.., r]`.
    fn up(&self, low: &Tensor) -> Result<Tensor> {
        match &self.scale {
            None => times(low, &self.b),
            Some(scale) => times(&low.f_mul(scale)?, &self.b),
        }
    }
}

/// t `[.., width]` as `[width]` if it is one row, else `[N, width]`.
fn flat(t: &Tensor) -> Result<Tensor> {
    let width = t.size().last().copied().unwrap_or(0);
    Ok(if i64::try_from(t.numel()) == Ok(width) { t.f_reshape([-1])? } else { t.f_reshape([-1, width])? })
}

/// W x, for x `[inputs]` or `[N, inputs]`.
fn times(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    Ok(if x.dim() == 1 { w.f_mv(x)? } else { x.f_mm(&w.f_tr()?)? })
}

/// y `[.., width]` plus a change `[width]` or `[N, width]` in f32, rounded once.
fn plus(y: &Tensor, change: &Tensor) -> Result<Tensor> {
    let kind = y.f_kind()?;
    let sum = if change.dim() == 1 { y.f_add(change)? } else { y.f_add(&change.f_view(&y.size()[..])?)? };
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
        on_rows(at.pass, self.id, x, y, |x, y| {
            if part.place.slice.is_none()
                && let Some(sum) = add_low_rank(x, &y, &[factors.low_rank(part)])?
            {
                return Ok(sum);
            }
            let low = times(&flat(x)?.f_to_kind(Kind::Float)?, &factors.a)?; // (.., r)
            let change = factors.up(&low)?; // (.., outputs)
            match part.place.slice {
                None => plus(&y, &change),
                Some((start, len)) => {
                    let new = plus(&y.f_narrow(-1, start, len)?, &change)?;
                    Ok(y.f_slice_scatter(&new, -1, start, start + len, 1)?)
                }
            }
        })
    }

    fn linear_parts(&self, parts: &[Part<'_>], x: &Tensor, y: Tensor) -> Result<Tensor> {
        if !self.together(parts, &y)? {
            return part_by_part(self, parts, x, y);
        }
        on_rows(parts[0].at.pass, self.id, x, y, |x, y| {
            let of_part = |part: &Part<'_>| {
                let (slot, factors) = self.part(part.at.slot)?;
                Ok(factors.low_rank(slot))
            };
            let low_rank = parts.iter().map(of_part).collect::<Result<Vec<_>>>()?;
            if let Some(sum) = add_low_rank(x, &y, &low_rank)? {
                return Ok(sum);
            }
            let low = times(&flat(x)?.f_to_kind(Kind::Float)?, &self.stacked_a(parts)?)?; // (.., Σ r)
            let mut row = 0;
            let mut changes = Vec::with_capacity(parts.len());
            for part in parts {
                let (Slot { rank, .. }, factors) = self.part(part.at.slot)?;
                changes.push(factors.up(&low.f_narrow(-1, row, *rank)?)?);
                row += rank;
            }
            plus(&y, &Tensor::f_cat(&changes, -1)?)
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
        let named = |(part, Factors { a, b, .. }): (&Slot, &Factors)| {
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
        write(directory, &self.config.write(), &self.parameters())
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
            for ((part, Factors { a, b, .. }), _) in parts.filter(|_| w.dim() == 2) {
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
