//! Adapters: controls with parameters of their own.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Kind, Tensor};

use crate::{Control, Error, Result, SiteId, SiteMap};

/// The weights that an adapter answers with, as [`LanguageModel::map_weights`](crate::LanguageModel::map_weights)
/// takes them.
pub type MergedWeights<'a> = Box<dyn FnMut(SiteId, &Tensor) -> Result<Option<Tensor>> + 'a>;

/// What tells an adapter, and its handles, from any other of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdapterId(u64);

impl AdapterId {
    /// One that no adapter has yet.
    #[must_use]
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A control with parameters, which can be trained, saved and loaded: LoRA, (IA)³, a prefix, a bottleneck.
///
/// Parameters are f32 leaves, whatever the element type of the model, and are shared by all handles: what is trained
/// or loaded through one acts through all.
pub trait Adapter: Control {
    /// The same for all its handles: how columns of lanes name it.
    fn id(&self) -> AdapterId;

    /// Another handle over the same parameters; like [`Control::handle`], but still known to be an adapter.
    fn adapter_handle(&self) -> Box<dyn Adapter>;

    /// Its parameters by name, in a stable order: handles over the adapter's own storage, in the names of PEFT.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// Writes parameters and configuration to a directory, in the adapter's format.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn save(&self, directory: &Path) -> Result<()>;

    /// Reads parameters of the same configuration from a directory. Nothing changes unless all can be read.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`]; [`Error::Config`] for another configuration; those of [`copy_parameters`].
    fn load(&mut self, directory: &Path) -> Result<()>;

    /// The weights of a model of these sites with this adapter merged into them. `model.map_weights` makes a handle
    /// of them; dropping it unmerges, to the bit.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an adapter that is no change of weights; those of [`Control::bind`].
    fn merged<'a>(&'a self, sites: &SiteMap) -> Result<MergedWeights<'a>> {
        let _ = sites;
        Err(Error::unsupported("merging an adapter that changes no weights", "running it as a control"))
    }
}

/// Copies tensors into an adapter's parameters of the same names, in place: every handle sees it. Nothing is copied
/// unless everything fits.
///
/// # Errors
/// [`Error::Keys`] for names that are missing or not known; [`Error::Shape`]; [`Error::Kind`] for what is no
/// floating-point tensor; [`Error::NotFinite`].
pub fn copy_parameters(what: &str, from: &[(String, Tensor)], to: &[(String, Tensor)]) -> Result<()> {
    let lacks = |names: &[(String, Tensor)], name: &String| names.iter().all(|(other, _)| other != name);
    let names = |of: &[(String, Tensor)], not_in: &[(String, Tensor)]| -> Vec<String> {
        of.iter().filter(|(name, _)| lacks(not_in, name)).map(|(name, _)| name.clone()).collect()
    };
    let (missing, unexpected) = (names(to, from), names(from, to));
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Keys { what: what.to_owned(), missing, unexpected });
    }
    let mut pairs = Vec::with_capacity(to.len());
    for (name, parameter) in to {
        let Some((_, value)) = from.iter().find(|(other, _)| other == name) else { continue };
        if value.size() != parameter.size() {
            return Err(Error::shape(
                format!("{what}: {name}"),
                format!("{:?}", parameter.size()),
                &value.size(),
            ));
        }
        crate::energy::checks::floating(&format!("{what}: {name}"), value)?;
        crate::energy::checks::finite(&format!("{what}: {name}"), &value.f_to_kind(Kind::Float)?)?;
        pairs.push((parameter, value));
    }
    let _no_gradients = tch::no_grad_guard();
    for (parameter, value) in pairs {
        parameter.shallow_clone().f_copy_(value)?;
    }
    Ok(())
}
