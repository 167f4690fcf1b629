//! Normalisation.

use tch::Tensor;

use super::Activation;
use crate::{Error, Result};

/// Root-mean-square norm (Zhang & Sennrich 2019): x / √(mean(x²) + ε) · g, over the last dimension.
///
/// The mean is taken in f32 whatever the element type.
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// With gain `[D]` and ε.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// Another handle over the same gain.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), eps: self.eps }
    }

    /// `[.., D] → [.., D]`
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (y, _) = x.f_internal_fused_rms_norm(self.weight.size(), Some(&self.weight), self.eps)?;
        Ok(y)
    }
}

/// Layer norm (Ba et al. 2016): (x − mean) / √(var + ε) · g + b, over the last dimension.
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl LayerNorm {
    /// With gain `[D]`, bias `[D]` and ε.
    pub fn new(weight: Tensor, bias: Option<Tensor>, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            eps: self.eps,
        }
    }

    /// `[.., D] → [.., D]`
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let shape = self.weight.size();
        Ok(x.f_layer_norm(shape, Some(&self.weight), self.bias.as_ref(), self.eps, false)?)
    }
}

/// Group norm (Wu & He 2018): (x − mean) / √(var + ε) · g + b, the moments taken over a group of channels and all places.
pub struct GroupNorm {
    groups: i64,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    /// With gain `[C]`, bias `[C]` and ε; so many groups of channels.
    ///
    /// # Errors
    /// [`Error::Shape`] for a gain and a bias of other shapes; [`Error::Value`] where the groups do not divide C.
    pub fn new(groups: i64, weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        let &[channels] = weight.size().as_slice() else {
            return Err(Error::shape("gain of a group norm", "[C]", &weight.size()));
        };
        if bias.size() != [channels] {
            return Err(Error::shape("bias of a group norm", format!("[{channels}]"), &bias.size()));
        }
        if groups < 1 || channels % groups != 0 {
            return Err(Error::value(
                "groups of a norm",
                format!("a divisor of {channels} channels"),
                groups,
            ));
        }
        Ok(Self { groups, weight, bias, eps })
    }

    /// Another handle over the same parameters.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), bias: self.bias.shallow_clone(), ..*self }
    }

    /// `[B, C, ..] → [B, C, ..]`
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, false)?)
    }

    /// The norm and an activation after it: `[B, C, ..] → [B, C, ..]`
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn activated(&self, x: &Tensor, act: Activation) -> Result<Tensor> {
        act.consume(self.forward(x)?)
    }
}
