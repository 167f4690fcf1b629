//! Sites: the places inside a model at which controls may act.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// The index of a site in its [`SiteMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(u32);

impl SiteId {
    /// The index as a number, to address tables with one entry per site.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What kind of operation a site is, and hence which method of a [`Control`](crate::Control) it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SiteKind {
    /// A matrix product y = W x + b.
    Linear,
    /// A convolution.
    Conv,
    /// A table of token embeddings.
    Embedding,
    /// An attention, with its queries, keys and values split into heads.
    Attention,
    /// A branch of the residual stream, before it is added; or the states after the last norm.
    Hidden,
}

impl SiteKind {
    /// The kind in words, as errors name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Conv => "convolution",
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Hidden => "hidden-state",
        }
    }
}

/// The dimensions of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dims {
    /// `[.., inputs] → [.., outputs]`.
    Linear {
        /// Width of x.
        inputs: i64,
        /// Width of y.
        outputs: i64,
    },
    /// `[B, inputs, H, W] → [B, outputs, H', W']`.
    Conv {
        /// Channels in.
        inputs: i64,
        /// Channels out.
        outputs: i64,
        /// Height and width of the kernel.
        kernel: [i64; 2],
    },
    /// `[B, T] → [B, T, width]`.
    Embedding {
        /// How many rows the table has.
        rows: i64,
        /// Width of a row.
        width: i64,
    },
    /// Queries `[B, heads, Tq, head_dim]`, keys and values `[B, kv_heads, Tk, head_dim]`.
    Attention {
        /// Heads of the queries.
        heads: i64,
        /// Heads of the keys and values: fewer than `heads` with grouped queries.
        kv_heads: i64,
        /// Width of a head.
        head_dim: i64,
        /// Whether keys and values come from another sequence.
        cross: bool,
    },
    /// `[B, T, width]`; `[B, width, H, W]` in a network of convolutions.
    Hidden {
        /// Width of the stream.
        width: i64,
    },
}

impl Dims {
    /// The kind of site that has such dimensions.
    pub fn kind(self) -> SiteKind {
        match self {
            Self::Linear { .. } => SiteKind::Linear,
            Self::Conv { .. } => SiteKind::Conv,
            Self::Embedding { .. } => SiteKind::Embedding,
            Self::Attention { .. } => SiteKind::Attention,
            Self::Hidden { .. } => SiteKind::Hidden,
        }
    }
}

/// A named range of a linear site's outputs, such as the queries of GPT-2's `c_attn`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// `q`, `k` or `v`.
    pub name: &'static str,
    /// The first output.
    pub start: i64,
    /// How many outputs.
    pub len: i64,
}

/// One place inside a model.
#[derive(Clone, Debug)]
pub struct Site {
    /// The Hugging Face path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Other names for the same place: of diffusers, kohya, older layouts.
    pub aliases: Vec<String>,
    /// Its dimensions.
    pub dims: Dims,
    /// For a projection that the checkpoint stores fused: which outputs are what.
    pub slices: Vec<Slice>,
}

impl Site {
    /// What kind of operation it is.
    pub fn kind(&self) -> SiteKind {
        self.dims.kind()
    }

    /// Whether `selector` is the whole name, the whole of an alias, or their last dotted components.
    pub fn matches(&self, selector: &str) -> bool {
        let ends = |name: &str| {
            name.strip_suffix(selector).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        !selector.is_empty() && (ends(&self.name) || self.aliases.iter().any(|alias| ends(alias)))
    }
}

/// Every site of a model.
///
/// It holds no tensors, hence it is `Send + Sync`: all handles of a model share one through an `Arc`.
#[derive(Debug)]
pub struct SiteMap {
    id: u64,
    sites: Vec<Site>,
}

impl Default for SiteMap {
    fn default() -> Self {
        Self::new()
    }
}

impl SiteMap {
    /// An empty map, with an identity of its own.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), sites: Vec::new() }
    }

    /// Adds a site.
    pub fn add(&mut self, name: impl Into<String>, dims: Dims) -> SiteId {
        self.add_site(Site { name: name.into(), aliases: Vec::new(), dims, slices: Vec::new() })
    }

    /// Adds a site with aliases or slices.
    pub fn add_site(&mut self, site: Site) -> SiteId {
        let id = SiteId(u32::try_from(self.sites.len()).unwrap_or(u32::MAX));
        self.sites.push(site);
        id
    }

    /// What tells this map from any other of the process.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The site of an id that this map gave out; `None` for a stranger's.
    pub fn get(&self, id: SiteId) -> Option<&Site> {
        self.sites.get(id.index())
    }

    /// How many sites there are.
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }

    /// All sites, in the order in which the model runs through them.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, &Site)> {
        (0u32..).map(SiteId).zip(&self.sites)
    }

    /// The sites of one kind, in the model's order.
    pub fn of_kind(&self, kind: SiteKind) -> impl Iterator<Item = (SiteId, &Site)> {
        self.iter().filter(move |(_, site)| site.kind() == kind)
    }

    /// The sites of one kind whose name ends with the dotted components of `selector`, as PEFT's
    /// `target_modules` reads a list: `q_proj`, `self_attn.q_proj`, or a full name.
    ///
    /// # Errors
    /// [`Error::NoSite`] where nothing matches, naming what is near.
    pub fn select(&self, kind: SiteKind, selector: &str) -> Result<Vec<SiteId>> {
        let hits: Vec<SiteId> =
            self.of_kind(kind).filter(|(_, site)| site.matches(selector)).map(|(id, _)| id).collect();
        if hits.is_empty() {
            return Err(Error::NoSite {
                selector: selector.to_owned(),
                kind: kind.name(),
                near: self.near(kind, selector),
            });
        }
        Ok(hits)
    }

    /// The three names nearest to `selector`: cut to as many components as it has.
    fn near(&self, kind: SiteKind, selector: &str) -> Vec<String> {
        let components = selector.split('.').count();
        let mut names: Vec<String> = self
            .of_kind(kind)
            .map(|(_, site)| {
                let parts: Vec<&str> = site.name.split('.').collect();
                parts[parts.len().saturating_sub(components)..].join(".")
            })
            .collect();
        names.sort();
        names.dedup();
        names.sort_by_key(|name| crate::edit_distance(name, selector));
        names.truncate(3);
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> SiteMap {
        let mut map = SiteMap::new();
        for i in 0..2 {
            for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                map.add(format!("model.layers.{i}.self_attn.{name}"), Dims::Linear { inputs: 4, outputs: 4 });
            }
            map.add(format!("model.layers.{i}.self_attn"), Dims::Hidden { width: 4 });
        }
        map
    }

    #[test]
    fn selects_by_dotted_suffix_and_kind() {
        let map = map();
        assert_eq!(map.select(SiteKind::Linear, "q_proj").unwrap().len(), 2);
        assert_eq!(map.select(SiteKind::Linear, "layers.1.self_attn.v_proj").unwrap().len(), 1);
        assert_eq!(map.select(SiteKind::Hidden, "self_attn").unwrap().len(), 2);
        assert!(map.select(SiteKind::Linear, "proj").is_err(), "half a component is no match");
        assert!(map.select(SiteKind::Linear, "").is_err());
    }

    #[test]
    fn a_selector_without_match_names_what_is_near() {
        let error = map().select(SiteKind::Linear, "q_porj").unwrap_err();
        let Error::NoSite { near, .. } = &error else { panic!("{error}") };
        assert_eq!(near[0], "q_proj");
        assert!(error.to_string().contains("q_porj"));
    }

    #[test]
    fn aliases_match() {
        let mut map = SiteMap::new();
        map.add_site(Site {
            name: "a.to_q".into(),
            aliases: vec!["lora_unet_a_to_q".into()],
            dims: Dims::Linear { inputs: 1, outputs: 1 },
            slices: vec![],
        });
        assert_eq!(map.select(SiteKind::Linear, "lora_unet_a_to_q").unwrap().len(), 1);
    }
}
