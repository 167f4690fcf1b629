//! Tensors in: the arguments of a Hugging Face forward call.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Error, Placement, Result, Tokens};
use tch::{Kind, Tensor};

/// A file of tensors, by the names of arguments.
pub struct Inputs {
    file: Safetensors,
    placement: Placement,
}

impl Inputs {
    /// Opens a file, all of whose tensors must be `known`.
    pub fn open(path: &Path, placement: Placement, known: &[&str]) -> Result<Self> {
        let file = Safetensors::open(path)?;
        if let Some(name) = file.names().iter().find(|name| !known.contains(&name.as_str())) {
            return Err(Error::value("input tensor", format!("one of {}", known.join(", ")), name));
        }
        Ok(Self { file, placement })
    }

    fn read(&self, name: &str) -> Result<Option<Tensor>> {
        self.file.load(name)?.map(|tensor| Ok(tensor.f_to_device(self.placement.device)?)).transpose()
    }

    /// A tensor as it is.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        self.read(name)
    }

    /// A tensor of integers, as int64.
    pub fn integers(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(tensor) = self.read(name)? else { return Ok(None) };
        match tensor.f_kind()? {
            Kind::Int64 => Ok(Some(tensor)),
            Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8 => Ok(Some(tensor.f_to_kind(Kind::Int64)?)),
            found => Err(Error::Kind {
                what: name.to_owned(),
                expected: "an integer type".into(),
                found: format!("{found:?}"),
            }),
        }
    }

    /// A mask of any type: not 0 is true.
    pub fn mask(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.read(name)?.map(|mask| mask.f_ne(0)).transpose()?)
    }

    /// Ids of one name, or embeddings of another.
    pub fn tokens(&self, ids: &str, embeds: &str) -> Result<Given> {
        match (self.integers(ids)?, self.read(embeds)?) {
            (Some(ids), None) => Ok(Given::Ids(ids)),
            // Rounded to the type of the run, as the model's own embeddings are.
            (None, Some(given)) if given.is_floating_point() => {
                Ok(Given::Embeds(given.f_to_kind(self.placement.kind)?))
            }
            (None, Some(given)) => Err(Error::Kind {
                what: embeds.to_owned(),
                expected: "a floating type".into(),
                found: format!("{:?}", given.f_kind()?),
            }),
            (ids_given, _) => {
                let found = if ids_given.is_some() { "both" } else { "neither" };
                Err(Error::value("inputs", format!("{ids} or {embeds}"), found))
            }
        }
    }
}

/// Tokens that were given.
pub enum Given {
    Ids(Tensor),
    Embeds(Tensor),
}

impl Given {
    pub fn tokens(&self) -> Tokens<'_> {
        match self {
            Self::Ids(ids) => Tokens::Ids(ids),
            Self::Embeds(embeds) => Tokens::Embeds(embeds),
        }
    }

    /// B and T, if there are as many dimensions.
    pub fn shape(&self) -> (i64, i64) {
        let (Self::Ids(tensor) | Self::Embeds(tensor)) = self;
        let size = tensor.size();
        (size.first().copied().unwrap_or(0), size.get(1).copied().unwrap_or(0))
    }
}
