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

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use controlgen_core::{Error, RemoteError, Result};
use hf_hub::repository::{HFRepositorySync, RepoTreeEntry, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync, HFError};

/// Files that are fetched where the repository has them.
const SMALL: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// A folder of further templates, `*.jinja`.
const TEMPLATES: &str = "additional_chat_templates";

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

/// One repository at one hub.
struct Session {
    /// Hub, repository and revision, for errors.
    what: String,
    cache: PathBuf,
    /// The repository's folder in the cache.
    repository: String,
    model: HFRepositorySync<RepoTypeModel>,
}

impl Session {
    fn fetch(&self, revision: &str) -> Result<PathBuf> {
        let commit = self.commit(revision)?;
        let mut sizes = self.list(&commit, None)?;
        if sizes.remove(TEMPLATES).is_some() {
            let more = self.list(&commit, Some(TEMPLATES))?;
            sizes.extend(more.into_iter().filter(|(path, _)| path.ends_with(".jinja")));
        }
        if !sizes.contains_key("config.json") {
            return Err(self.missing("config.json"));
        }
        let mut wanted: BTreeSet<&str> = SMALL.into_iter().filter(|name| sizes.contains_key(*name)).collect();
        let prefix = format!("{TEMPLATES}/");
        wanted.extend(sizes.keys().map(String::as_str).filter(|path| path.starts_with(&prefix)));
        for name in wanted {
            self.file(&commit, name, &sizes)?;
        }
        for name in self.weights(&commit, &sizes)? {
            self.file(&commit, &name, &sizes)?;
        }
        self.remember(revision, &commit)?;
        Ok(self.snapshot(&commit))
    }

    /// The commit that a revision stands for.
    fn commit(&self, revision: &str) -> Result<String> {
        if is_commit(revision) {
            return Ok(revision.to_owned());
        }
        let info =
            self.model.info().revision(revision.to_owned()).send().map_err(|e| explain(&self.what, e))?;
        let hf_hub::repository::RepoInfo::Model(info) = info else {
            return Err(self.protocol("a repository that is not a model's"));
        };
        match info.sha {
            Some(commit) if is_commit(&commit) => Ok(commit),
            found => {
                Err(self.protocol(&format!("expected a commit of 40 hexadecimal digits, found {found:?}")))
            }
        }
    }

    /// The files of a folder with their sizes; folders have none.
    fn list(&self, commit: &str, folder: Option<&str>) -> Result<BTreeMap<String, u64>> {
        let request = self.model.list_tree().revision(commit.to_owned());
        let entries = match folder {
            Some(folder) => request.path_in_repo(folder.to_owned()).send(),
            None => request.send(),
        };
        let entries = entries.map_err(|error| explain(&self.what, error))?;
        let sized = entries.into_iter().map(|entry| match entry {
            RepoTreeEntry::File { path, size, .. } => (path, size),
            RepoTreeEntry::Directory { path, .. } => (path, 0),
        });
        Ok(sized.filter(|(path, _)| is_plain(path, folder)).collect())
    }

    /// The names of the files that hold the weights.
    fn weights(&self, commit: &str, sizes: &BTreeMap<String, u64>) -> Result<BTreeSet<String>> {
        if sizes.contains_key(INDEX) {
            let shards = shards(&self.file(commit, INDEX, sizes)?)?;
            return match shards.iter().find(|name| !sizes.contains_key(*name)) {
                Some(absent) => Err(self.missing(absent)),
                None => Ok(shards),
            };
        }
        if sizes.contains_key(WEIGHTS) {
            return Ok(BTreeSet::from([WEIGHTS.to_owned()]));
        }
        let what = format!("{}, which has no {WEIGHTS},", self.what);
        Err(Error::unsupported(what, "safetensors"))
    }

    /// Fetches a file unless it is there, and checks its length.
    fn file(&self, commit: &str, name: &str, sizes: &BTreeMap<String, u64>) -> Result<PathBuf> {
        let expected = sizes.get(name).copied().unwrap_or(0);
        let path = self.snapshot(commit).join(name);
        if length(&path) == Some(expected) {
            return Ok(path);
        }
        remove(&path)?;
        tracing::info!(file = name, bytes = expected, "fetching");
        let what = format!("{}: {name}", self.what);
        let request = self.model.download_file().filename(name.to_owned()).revision(commit.to_owned());
        let path = request.send().map_err(|error| explain(&what, error))?;
        match length(&path) {
            Some(found) if found == expected => Ok(path),
            found => {
                remove(&path)?;
                let found = found.unwrap_or(0);
                Err(Error::Remote { what, reason: RemoteError::Truncated { expected, found } })
            }
        }
    }

    /// What the cache has, complete or not at all.
    fn cached(&self, revision: &str) -> Result<PathBuf> {
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            let path = self.reference(revision);
            std::fs::read_to_string(path)
                .map_err(|_| self.missing("the revision, in the cache"))?
                .trim()
                .to_owned()
        };
        let folder = self.snapshot(&commit);
        let has = |name: &str| match length(&folder.join(name)) {
            Some(_) => Ok(()),
            None => Err(self.missing(&format!("{name}, in the cache"))),
        };
        has("config.json")?;
        if length(&folder.join(INDEX)).is_none() {
            has(WEIGHTS)?;
        } else {
            shards(&folder.join(INDEX))?.iter().try_for_each(|name| has(name))?;
        }
        Ok(folder)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.join(&self.repository).join("snapshots").join(commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.cache.join(&self.repository).join("refs").join(revision)
    }

    /// Notes in the cache which commit the revision was, once all of it is there.
    fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.reference(revision);
        let write = || {
            std::fs::create_dir_all(path.parent().unwrap_or(&self.cache))?;
            std::fs::write(&path, commit)
        };
        write().map_err(|source| Error::io(&path, source))
    }

    fn missing(&self, name: &str) -> Error {
        Error::Remote { what: self.what.clone(), reason: RemoteError::NotFound(name.to_owned()) }
    }

    fn protocol(&self, problem: &str) -> Error {
        Error::Remote { what: self.what.clone(), reason: RemoteError::Protocol(problem.to_owned()) }
    }
}

/// The files that a shard index names.
fn shards(path: &Path) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|source| Error::format(path, format!("not a shard index: {source}")))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    match names.iter().find(|name| !(is_plain(name, None) && name.ends_with(".safetensors"))) {
        Some(name) => {
            Err(Error::format(path, format!("expected names of safetensors files, found {name:?}")))
        }
        None if names.is_empty() => Err(Error::format(path, "expected at least one file, found none")),
        None => Ok(names),
    }
}

/// Whether a path names a file right in `folder`, and nothing outside it.
fn is_plain(path: &str, folder: Option<&str>) -> bool {
    let name = match folder {
        Some(folder) => path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')),
        None => Some(path),
    };
    name.is_some_and(|name| {
        !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
    })
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
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

fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map(|data| data.len())
}

/// Removes a file of a snapshot and, if it is a link, what it points to.
fn remove(path: &Path) -> Result<()> {
    let target = std::fs::canonicalize(path).ok();
    for path in [target.as_deref(), Some(path)].into_iter().flatten() {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(path, source));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Our error for one of hf-hub's.
fn explain(what: &str, error: HFError) -> Error {
    let with_sources = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let inner_text = inner.to_string();
            if !text.contains(&inner_text) {
                text = format!("{text}: {inner_text}");
            }
            source = inner.source();
        }
        text
    };
    // The type of the context has no public name.
    macro_rules! said {
        ($context:expr) => {{
            let message = $context.server_message.clone().unwrap_or_default();
            ($context.status.as_u16(), if message.is_empty() { $context.url.clone() } else { message })
        }};
    }
    let reason = match error {
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => {
            RemoteError::NotFound(context.map_or_else(String::new, |context| said!(context).1))
        }
        HFError::AuthRequired { context } | HFError::Forbidden { context } => {
            let (status, message) = said!(context);
            RemoteError::Denied { status, message }
        }
        HFError::Http { context } | HFError::RateLimited { context, .. } | HFError::Conflict { context } => {
            match said!(context) {
                (404, message) => RemoteError::NotFound(message),
                (status, message) => RemoteError::Status { status, message },
            }
        }
        HFError::Io(source) => return Error::Io { path: PathBuf::from(what), source },
        HFError::Url(source) => {
            return Error::value("endpoint", "an address such as https://huggingface.co", source);
        }
        HFError::InvalidParameter(problem) => return Error::value(what, "a valid request", problem),
        HFError::Request { ref source, .. } => RemoteError::Network(with_sources(source)),
        other => RemoteError::Protocol(with_sources(&other)),
    };
    Error::Remote { what: what.to_owned(), reason }
}
