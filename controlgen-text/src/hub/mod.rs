//! Fetching models from a Hugging Face hub into a cache.
//!
//! What a language model needs is fetched and nothing else: configuration, tokenizer, chat templates, and the
//! safetensors weights, of which a sharded model has those that its index names. The cache has the layout of Python's
//! `huggingface_hub`, so that both share what is there.
//!
//! ```no_run
//! let folder = controlgen_text::hub::fetch("HuggingFaceTB/SmolLM2-135M-Instruct", "main", None, None)?;
//! let tokenizer = controlgen_text::tokenizer::Tokenizer::open(folder)?;
//! # Ok::<(), controlgen_core::Error>(())
//! ```

mod explain;
mod session;

use std::path::{Path, PathBuf};

use controlgen_core::{Error, Result};
use hf_hub::{HFClient, HFClientSync};

use explain::explain;
use session::Session;

/// Fetches a model with the settings of [`Hub::new`], changed where given: the hub's address, the cache's folder.
///
/// # Errors
/// Those of [`Hub::fetch`].
pub fn fetch(
    repository: &str,
    revision: &str,
    endpoint: Option<&str>,
    cache: Option<&Path>,
) -> Result<PathBuf> {
    let mut hub = Hub::new();
    if let Some(endpoint) = endpoint {
        hub = hub.endpoint(endpoint);
    }
    if let Some(cache) = cache {
        hub = hub.cache(cache);
    }
    hub.fetch(repository, revision)
}

/// A hub, a cache, and how to ask.
#[derive(Clone)]
pub struct Hub {
    endpoint: Option<String>,
    cache: Option<PathBuf>,
    token: Option<String>,
    offline: bool,
    attempts: usize,
}

impl Default for Hub {
    fn default() -> Self {
        Self::new()
    }
}

impl Hub {
    /// The hub and cache that the environment names, as for Python (`HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`), else
    /// `https://huggingface.co` and `~/.cache/huggingface/hub`; four attempts at each request.
    pub fn new() -> Self {
        Self { endpoint: None, cache: None, token: None, offline: false, attempts: 4 }
    }

    /// The hub's address, `https://…`.
    #[must_use]
    pub fn endpoint(mut self, address: impl Into<String>) -> Self {
        self.endpoint = Some(address.into());
        self
    }

    /// The folder of the cache; made if it is not there.
    #[must_use]
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = Some(folder.into());
        self
    }

    /// The token for private and gated models. Without one, hf-hub sends that of the environment (`HF_TOKEN`, or
    /// the file that a log-in wrote) where there is one, whatever the endpoint.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Whether to look into the cache alone and ask no hub.
    #[must_use]
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// How often each request is made while the hub cannot be reached or is overloaded; at least once.
    #[must_use]
    pub fn attempts(mut self, attempts: usize) -> Self {
        self.attempts = attempts;
        self
    }

    /// Fetches what is not in the cache yet and returns the folder of the model, as [`Tokenizer::open`] and the
    /// models take it.
    ///
    /// `repository` is `owner/name` (or `name`), `revision` a branch, a tag or a commit. What was fetched stays in the
    /// cache if a later file fails; the next call goes on from there, file by file. A file whose length is not the
    /// one that the hub announced is removed. hf-hub sets no limit of time: a hub that accepts a connection and
    /// then says nothing is waited for.
    ///
    /// # Errors
    /// [`Error::Remote`] for what is not there, denied, or fails on the way; [`Error::Value`] for a name that
    /// cannot be one; [`Error::Unsupported`] for a repository without safetensors; [`Error::Format`] for a shard
    /// index that is none; [`Error::Io`] for a cache that cannot be written.
    ///
    /// [`Tokenizer::open`]: crate::tokenizer::Tokenizer::open
    pub fn fetch(&self, repository: &str, revision: &str) -> Result<PathBuf> {
        let (owner, name) = check_repository(repository)?;
        check_revision(revision)?;
        let client = self.client()?;
        let session = Session {
            what: format!("{}/{repository}@{revision}", client.endpoint()),
            cache: client.cache_dir().to_owned(),
            repository: format!("models--{}", repository.replace('/', "--")),
            model: HFClientSync::from_inner(client).map_err(|e| explain(repository, e))?.model(owner, name),
        };
        if self.offline { session.cached(revision) } else { session.fetch(revision) }
    }

    fn client(&self) -> Result<HFClient> {
        let mut builder = HFClient::builder().retry_max_attempts(self.attempts.saturating_sub(1));
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        if let Some(token) = &self.token {
            builder = builder.token(token);
        }
        builder.build().map_err(|error| explain(self.endpoint.as_deref().unwrap_or("hub"), error))
    }
}

/// Names become folders of the cache.
fn check_repository(repository: &str) -> Result<(&str, &str)> {
    let (owner, name) = repository.split_once('/').unwrap_or(("", repository));
    let plain = |part: &str| {
        let characters = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        !part.is_empty() && !part.starts_with('.') && characters && !part.contains("--")
    };
    if plain(name) && (plain(owner) || !repository.contains('/')) {
        Ok((owner, name))
    } else {
        let expected = "owner/name, of letters, digits, `-`, `_` and `.`";
        Err(Error::value("repository", expected, format!("{repository:?}")))
    }
}

fn check_revision(revision: &str) -> Result<()> {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', ':', '\0']);
    if revision.split('/').all(plain) {
        Ok(())
    } else {
        Err(Error::value("revision", "a branch, a tag or a commit", format!("{revision:?}")))
    }
}
