//! Half and twice the size.

use controlgen_core::layers::Conv2d;
use controlgen_core::{Pass, Result, WeightMap};
use tch::Tensor;

use super::Scope;

/// Means over 2 × 2 places: `[B, C, H, W] → [B, C, H/2, W/2]`.
///
/// # Errors
/// Those of LibTorch.
pub fn average(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None::<i64>)?)
}

/// Every place 2 × 2 times: `[B, C, H, W] → [B, C, 2 H, 2 W]`.
///
/// # Errors
/// Those of LibTorch.
pub fn nearest(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.size4()?;
    Ok(x.f_upsample_nearest2d([2 * h, 2 * w], 2.0, 2.0)?)
}

/// A convolution of stride 2.
pub struct Downsample2d {
    conv: Conv2d,
    /// No padding stands for one row and column of zeros at the end, as autoencoders have it.
    padding: i64,
}

impl Downsample2d {
    /// Loads `conv` of 3 × 3; `padding` 1, or 0 for zeros below and right alone.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(mut scope: Scope<'_, '_>, channels: i64, padding: i64) -> Result<Self> {
        Ok(Self { conv: scope.conv("conv", (channels, channels), 3, (2, padding))?, padding })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { conv: self.conv.handle(), ..*self }
    }

    /// `[B, C, H, W] → [B, C, ⌈H/2⌉, ⌈W/2⌉]`; H and W even where there is no padding.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if self.padding == 0 {
            return self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?, pass);
        }
        self.conv.forward(x, pass)
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { conv: self.conv.map_weights(f)?, ..*self })
    }
}

/// Every place 2 × 2 times, and a convolution.
pub struct Upsample2d {
    conv: Conv2d,
}

impl Upsample2d {
    /// Loads `conv` of 3 × 3.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(mut scope: Scope<'_, '_>, channels: i64) -> Result<Self> {
        Ok(Self { conv: scope.conv("conv", (channels, channels), 3, (1, 1))? })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { conv: self.conv.handle() }
    }

    /// `[B, C, H, W] → [B, C, 2 H, 2 W]`, or to another height and width.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, size: Option<(i64, i64)>, pass: &Pass<'_>) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        match size.filter(|size| *size != (2 * h, 2 * w)) {
            None => self.conv.forward_upsampled(x, pass),
            Some((height, width)) => {
                self.conv.forward(&x.f_upsample_nearest2d([height, width], None, None)?, pass)
            }
        }
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(Self { conv: self.conv.map_weights(f)? })
    }
}
