//! One fetch: what the repository has, what of it is needed, and what the cache has of that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use controlgen_core::{Error, RemoteError, Result};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFRepositorySync, RepoTypeModel};

use super::explain::explain;

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

/// One repository at one hub.
pub(super) struct Session {
    /// Hub, repository and revision, for errors.
    pub what: String,
    pub cache: PathBuf,
    /// The repository's folder in the cache.
    pub repository: String,
    pub model: HFRepositorySync<RepoTypeModel>,
}

impl Session {
    pub fn fetch(&self, revision: &str) -> Result<PathBuf> {
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
    pub fn cached(&self, revision: &str) -> Result<PathBuf> {
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
