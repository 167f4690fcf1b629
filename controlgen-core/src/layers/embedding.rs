//! Token embeddings.

use tch::Tensor;

use crate::{Error, Pass, Result, SiteId, Tokens, WeightMap};

/// A table of token embeddings that is an embedding site.
pub struct Embedding {
    /// `[V, D]`
    weight: Tensor,
    site: SiteId,
}

impl Embedding {
    /// A table `[V, D]`.
    pub fn new(weight: Tensor, site: SiteId) -> Self {
        Self { weight, site }
    }

    /// Another handle over the same table.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), site: self.site }
    }

    /// The table, `[V, D]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[B, T]` ids or `[B, T, D]` embeddings to `[B, T, D]`, through the controls.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, tokens: Tokens<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        match tokens {
            Tokens::Ids(ids) => {
                let e = Tensor::f_embedding(&self.weight, ids, -1, false, false)?;
                pass.embed(self.site, Some(ids), e)
            }
            Tokens::Embeds(embeds) => pass.embed(self.site, None, embeds.f_to_kind(self.weight.f_kind()?)?),
        }
    }

    /// The layer with the table that `f` answers with, if it does.
    ///
    /// # Errors
    /// [`Error::Shape`] for a table of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        match f(self.site, &self.weight)? {
            None => Ok(self.handle()),
            Some(new) if new.size() == self.weight.size() => {
                Ok(Self { weight: new.f_to_kind(self.weight.f_kind()?)?, site: self.site })
            }
            Some(new) => {
                Err(Error::shape("a mapped embedding", format!("{:?}", self.weight.size()), &new.size()))
            }
        }
    }
}
