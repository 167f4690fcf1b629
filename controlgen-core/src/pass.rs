//! What one forward pass carries beside its input.

use std::cell::RefCell;

use tch::Tensor;

use crate::{Controls, Lanes, SiteId};

/// What one forward pass carries beside its input: the controls at its sites, what its rows are, where taps write.
///
/// `Pass::default()` is the plain pass: no controls, one anonymous lane a row.
#[derive(Clone, Copy, Default)]
pub struct Pass<'a> {
    /// The controls at sites.
    pub controls: Option<&'a Controls>,
    /// What each row is.
    pub lanes: Option<&'a Lanes>,
    /// Where controls that observe leave what they saw.
    pub taps: Option<&'a Taps>,
    /// Which step of a run this is, from 0.
    pub step: usize,
}

impl<'a> Pass<'a> {
    /// A pass under these controls.
    pub fn with_controls(controls: &'a Controls) -> Self {
        Self { controls: Some(controls), ..Self::default() }
    }
}

/// What controls saw during a pass. The tensors keep their graph.
#[derive(Default)]
pub struct Taps {
    seen: RefCell<Vec<(SiteId, Tensor)>>,
}

impl Taps {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves a tensor. It has no effect while the taps are being read, which no pass does.
    pub fn push(&self, site: SiteId, tensor: Tensor) {
        if let Ok(mut seen) = self.seen.try_borrow_mut() {
            seen.push((site, tensor));
        }
    }

    /// Takes what was seen, in the order of the pass.
    pub fn take(&self) -> Vec<(SiteId, Tensor)> {
        self.seen.take()
    }
}
