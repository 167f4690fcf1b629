//! Tensors in types that are `Clone`.

use std::ops::Deref;

use tch::Tensor;

use crate::{Result, Rows};

/// A tensor that is `Clone`, by sharing its storage: what closures, controls over the next token and columns of lanes
/// hold.
#[derive(Debug)]
pub struct SharedTensor(Tensor);

impl From<Tensor> for SharedTensor {
    fn from(tensor: Tensor) -> Self {
        Self(tensor)
    }
}

impl Clone for SharedTensor {
    fn clone(&self) -> Self {
        Self(self.0.shallow_clone())
    }
}

impl Deref for SharedTensor {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.0
    }
}

/// The first dimension is the row.
impl Rows for SharedTensor {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder(rows)
    }
}
