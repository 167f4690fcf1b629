//! Named tensors in files: opened as memory maps, copied tensor by tensor, checked strictly.
//!
//! [`Safetensors`] and, with the feature `gguf`, [`Gguf`](crate::gguf::Gguf) are [`TensorSource`]s. A model
//! takes what it needs from one through [`Weights`], which remembers what was missing and what was left over.
//!
//! Tensors are copied out of the map: a tensor that referred to it could outlive it. Each piece of the map is
//! given back once copied, so that loading needs little more memory than the weights.

pub(crate) mod fill;
mod header;
mod json;
mod replace;
mod report;
mod safetensors;
mod save;
mod weights;

use tch::{Device, Kind, Tensor};

pub(crate) use replace::remove_left;
pub use replace::replace;
pub use report::Report;
pub use safetensors::Safetensors;
pub use save::save;
pub use weights::{Weights, prefixes};

use crate::Result;

/// What a file says about one of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The sizes, slowest dimension first.
    pub shape: Vec<i64>,
    /// The element type as which it is read without conversion; f32 for quantised tensors.
    pub kind: Kind,
}

/// A set of named tensors that can be read one at a time.
pub trait TensorSource: Send {
    /// What this is, for errors: a path.
    fn what(&self) -> String;

    /// The names of the tensors.
    fn names(&self) -> Vec<String>;

    /// The shape and element type of a tensor, or none if there is no tensor of that name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Copies a tensor into `into`, converting to its element type and device.
    ///
    /// `into` must have exactly the tensor's shape; it may be a view of a larger tensor. Floating-point types
    /// convert to each other (rounding), integers to wider ones; nothing else is converted.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::Kind`](crate::Error::Kind) where that does not
    /// hold; [`Error::Format`](crate::Error::Format) if there is no such tensor, or the file has been damaged
    /// since it was opened; [`Error::Torch`](crate::Error::Torch) if LibTorch refuses, as for lack of memory
    /// on a device.
    fn read(&self, name: &str, into: &mut Tensor) -> Result<()>;

    /// A copy of a tensor as it is stored, on the CPU, or none if there is no tensor of that name.
    ///
    /// # Errors
    /// Those of [`read`](Self::read) for a tensor that is there.
    fn load(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(info) = self.info(name) else { return Ok(None) };
        let mut tensor = Tensor::f_empty(&info.shape, (info.kind, Device::Cpu))?;
        self.read(name, &mut tensor)?;
        Ok(Some(tensor))
    }

    /// Called when a model has taken what it needs: the place to give back memory that reading took on the way.
    fn finished(&self) {}

    /// Copies of all tensors as they are stored, on the CPU.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    fn load_all(&self) -> Result<Vec<(String, Tensor)>> {
        let load = |name: String| Ok(self.load(&name)?.map(|tensor| (name, tensor)));
        self.names().into_iter().filter_map(|name| load(name).transpose()).collect()
    }
}
