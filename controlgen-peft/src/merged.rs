//! A model with adapters merged into its weights.

use std::collections::HashSet;
use std::ops::Deref;

use controlgen_core::{Adapter, Controls, Error, LanguageModel, Pass, Result, SiteKind};
use tch::Kind;

/// A model with adapters merged into its weights, which keeps the model without them.
///
/// The pristine weights are never written to, so that [`Merged::unmerge`] gives them back to the bit, however often.
/// A merge computes in f32 and rounds once to what the model holds, all adapters together. It holds a second copy of the
/// weights that change, and no other.
pub struct Merged {
    merged: Box<dyn LanguageModel>,
    pristine: Box<dyn LanguageModel>,
}

impl Merged {
    /// Merges adapters, which act in this order when they run as a stack of controls.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an adapter that is no change of weights (a prefix, a bottleneck), and for one that acts
    /// at a weight that the model does not let be mapped; those of binding the adapters to the model.
    pub fn new(pristine: Box<dyn LanguageModel>, adapters: &[&dyn Adapter]) -> Result<Self> {
        let sites = pristine.sites();
        let bound = adapters.iter().map(|it| Controls::bind(sites, vec![it.handle()]));
        let bound = bound.collect::<Result<Vec<_>>>()?;
        let passes: Vec<Pass<'_>> = bound.iter().map(Pass::with_controls).collect();
        let mut weights = adapters.iter().map(|it| it.merged(sites)).collect::<Result<Vec<_>>>()?;
        let mut asked = HashSet::new();
        let merged = pristine.map_weights(&mut |site, weight| {
            asked.insert(site);
            // W x changes before l ⊙ x does: what acts on the input acts on all of the product.
            let (before, after): (Vec<usize>, Vec<usize>) =
                (0..passes.len()).partition(|&i| passes[i].acts_before(site));
            let mut new = None;
            for i in after.into_iter().chain(before) {
                let old = new.as_ref().unwrap_or(weight);
                if let Some(weight) = weights[i](site, old)? {
                    new = Some(weight);
                }
            }
            Ok(match new {
                Some(new) => Some(new.f_to_kind(weight.f_kind().unwrap_or(Kind::Float))?),
                None => None,
            })
        })?;
        drop(weights);
        for (site, it) in sites.of_kind(SiteKind::Linear) {
            if !asked.contains(&site) && passes.iter().any(|pass| pass.acts_at(site)) {
                return Err(Error::unsupported(format!("merging into {}", it.name), "running as a control"));
            }
        }
        drop(passes);
        Ok(Self { merged, pristine })
    }

    /// The model with the adapters in its weights.
    pub fn model(&self) -> &dyn LanguageModel {
        &*self.merged
    }

    /// The model without them.
    pub fn pristine(&self) -> &dyn LanguageModel {
        &*self.pristine
    }

    /// Gives the model without them back.
    #[must_use]
    pub fn unmerge(self) -> Box<dyn LanguageModel> {
        self.pristine
    }
}

impl Deref for Merged {
    type Target = dyn LanguageModel;

    fn deref(&self) -> &Self::Target {
        &*self.merged
    }
}
