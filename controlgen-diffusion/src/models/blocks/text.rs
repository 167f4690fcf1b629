//! What a pass knows of the text: keys and values that were computed once.

use controlgen_core::{Error, Mask, Result};
use tch::Tensor;

/// Keys and values of the text for each attention, in the order in which the model comes to them.
pub struct Text<'a> {
    prepared: std::slice::Iter<'a, Tensor>,
    /// Boolean `[B, T]`, false for what is not to be seen.
    keep: Option<&'a Tensor>,
}

impl<'a> Text<'a> {
    /// Of what `prepare` made; `keep` boolean `[B, T]`.
    pub fn new(prepared: &'a [Tensor], keep: Option<&'a Tensor>) -> Self {
        Self { prepared: prepared.iter(), keep }
    }

    /// Keys and values for the next attention, side by side: `[B, T, 2 C]`.
    ///
    /// # Errors
    /// [`Error::ForeignState`] after the last.
    pub fn next(&mut self) -> Result<&'a Tensor> {
        self.prepared.next().ok_or(Error::ForeignState { expected: "conditions that this model prepared" })
    }

    /// What an attention may see whose keys are those of the text, then those of so many places of the image.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn mask(&self, places: i64) -> Result<Mask> {
        let Some(keep) = self.keep else { return Ok(Mask::Full) };
        let keep = if places > 0 { keep.f_constant_pad_nd([0, places])? } else { keep.shallow_clone() };
        let (b, t) = keep.size2()?;
        if places > 0 {
            let _ = keep.f_narrow(1, t - places, places)?.f_fill_(1)?;
        }
        Ok(Mask::Keep(keep.f_view([b, 1, 1, t])?))
    }
}
