//! What energies are functions of.

use tch::Tensor;

use crate::denoiser::NoiseLevel;
use crate::{Error, Result, Rows};

/// A batch of x at which a gradient can be taken: the tensor that is free to move, and the same point around another
/// one.
pub trait Point: Sized {
    /// The tensor that is free to move; its first dimension is the row.
    ///
    /// # Errors
    /// [`Error::NotDifferentiable`] where there is none (tokens).
    fn free(&self) -> Result<&Tensor>;

    /// The same point with another free tensor.
    #[must_use]
    fn rebuilt(&self, free: Tensor) -> Self;
}

/// Token sequences, as ids or as distributions over the vocabulary.
pub enum Text {
    /// Token ids.
    Hard {
        /// Int64 `[B, T]`.
        ids: Tensor,
        /// Boolean `[B, T]`, false for padding; all true where `None`.
        keep: Option<Tensor>,
    },
    /// Soft tokens: a distribution at each position.
    Soft {
        /// `[B, T, V]`, each `[V]` summing to 1.
        probs: Tensor,
        /// Boolean `[B, T]`, false for padding; all true where `None`.
        keep: Option<Tensor>,
    },
}

impl Text {
    /// Token ids `[B, T]`, without padding.
    pub fn hard(ids: Tensor) -> Self {
        Self::Hard { ids, keep: None }
    }

    /// Soft tokens `[B, T, V]`, without padding.
    pub fn soft(probs: Tensor) -> Self {
        Self::Soft { probs, keep: None }
    }

    /// Marks padding: boolean `[B, T]`, false where there is none to read.
    #[must_use]
    pub fn keeping(self, mask: Tensor) -> Self {
        match self {
            Self::Hard { ids, .. } => Self::Hard { ids, keep: Some(mask) },
            Self::Soft { probs, .. } => Self::Soft { probs, keep: Some(mask) },
        }
    }

    /// Which positions are no padding, `[B, T]`; `None` for all.
    pub fn keep(&self) -> Option<&Tensor> {
        match self {
            Self::Hard { keep, .. } | Self::Soft { keep, .. } => keep.as_ref(),
        }
    }
}

/// Soft tokens are free; ids are not.
impl Point for Text {
    fn free(&self) -> Result<&Tensor> {
        match self {
            Self::Soft { probs, .. } => Ok(probs),
            Self::Hard { .. } => Err(Error::NotDifferentiable { what: "an energy of token ids".into() }),
        }
    }

    fn rebuilt(&self, free: Tensor) -> Self {
        Self::Soft { probs: free, keep: self.keep().map(Tensor::shallow_clone) }
    }
}

/// Another handle over the same storage.
impl Clone for Text {
    fn clone(&self) -> Self {
        let keep = self.keep().map(Tensor::shallow_clone);
        match self {
            Self::Hard { ids, .. } => Self::Hard { ids: ids.shallow_clone(), keep },
            Self::Soft { probs, .. } => Self::Soft { probs: probs.shallow_clone(), keep },
        }
    }
}

impl Rows for Text {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let (Self::Hard { ids: text, keep } | Self::Soft { probs: text, keep }) = self;
        text.reorder(rows)?;
        keep.as_mut().map_or(Ok(()), |keep| keep.reorder(rows))
    }
}

/// Images or latents without noise, `[B, C, H, W]`; pixels in −1 ..= 1.
pub struct Image(pub Tensor);

impl Point for Image {
    fn free(&self) -> Result<&Tensor> {
        Ok(&self.0)
    }

    fn rebuilt(&self, free: Tensor) -> Self {
        Self(free)
    }
}

/// Another handle over the same storage.
impl Clone for Image {
    fn clone(&self) -> Self {
        Self(self.0.shallow_clone())
    }
}

impl Rows for Image {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder(rows)
    }
}

/// Images or latents on the way: x_t = α x_0 + σ ε.
pub struct Noised {
    /// x_t, `[B, C, H, W]`.
    pub x: Tensor,
    /// α and σ.
    pub level: NoiseLevel,
}

impl Point for Noised {
    fn free(&self) -> Result<&Tensor> {
        Ok(&self.x)
    }

    fn rebuilt(&self, free: Tensor) -> Self {
        Self { x: free, level: self.level }
    }
}

/// Another handle over the same storage.
impl Clone for Noised {
    fn clone(&self) -> Self {
        Self { x: self.x.shallow_clone(), level: self.level }
    }
}

impl Rows for Noised {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.x.reorder(rows)
    }
}
