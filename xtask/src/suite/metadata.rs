//! What cargo says of the workspace.

use std::path::PathBuf;

use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;

/// Features that are not for building with a LibTorch that is there: `doc-only` leaves LibTorch out, and
/// `download-libtorch` fetches another.
const WITHOUT_LIBTORCH: [&str; 2] = ["doc-only", "download-libtorch"];

/// The workspace.
#[derive(Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Where cargo builds.
    pub target: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    published: bool,
    features: Vec<String>,
    /// The features that docs.rs is to build with.
    docs_rs: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    pub fn read(repository: &Repository) -> Result<Self> {
        let mut command = process::cargo(repository.root());
        let text = process::output(command.args(["metadata", "--format-version=1", "--no-deps"]))?;
        Self::parse(&text)
            .ok_or_else(|| Failure::Check("`cargo metadata` wrote something else than expected".into()))
    }

    fn parse(text: &str) -> Option<Self> {
        let all: Value = serde_json::from_str(text).ok()?;
        let strings = |list: &Value| -> Vec<String> {
            list.as_array()
                .into_iter()
                .flatten()
                .filter_map(|item| item.as_str().map(str::to_owned))
                .collect()
        };
        let package = |package: &Value| {
            Some(Package {
                name: package["name"].as_str()?.to_owned(),
                // An empty list of registries is what `publish = false` becomes.
                published: package["publish"].as_array().is_none_or(|registries| !registries.is_empty()),
                features: package["features"].as_object()?.keys().cloned().collect(),
                docs_rs: strings(&package["metadata"]["docs"]["rs"]["features"]),
            })
        };
        Some(Self {
            target: all["target_directory"].as_str()?.into(),
            packages: all["packages"].as_array()?.iter().map(package).collect::<Option<_>>()?,
        })
    }

    /// The crates that are published.
    pub fn published(&self) -> impl Iterator<Item = &str> {
        self.packages.iter().filter(|package| package.published).map(|package| package.name.as_str())
    }

    /// The crates that are not.
    pub fn unpublished(&self) -> impl Iterator<Item = &str> {
        self.packages.iter().filter(|package| !package.published).map(|package| package.name.as_str())
    }

    /// Every feature that can be built with the LibTorch that is there, as `--features` takes them.
    pub fn features(&self) -> String {
        let all = self.packages.iter().flat_map(|package| {
            let wanted = package
                .features
                .iter()
                .filter(|name| *name != "default" && !WITHOUT_LIBTORCH.contains(&name.as_str()));
            wanted.map(|name| format!("{}/{name}", package.name))
        });
        all.collect::<Vec<_>>().join(",")
    }

    /// The features that docs.rs builds the published crates with.
    pub fn docs_rs_features(&self) -> String {
        let published = self.packages.iter().filter(|package| package.published);
        let all = published
            .flat_map(|package| package.docs_rs.iter().map(|name| format!("{}/{name}", package.name)));
        all.collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_all_but_those_without_libtorch() {
        let text = r#"{"target_directory": "/t", "packages": [
            {"name": "a", "publish": null, "metadata": {"docs": {"rs": {"features": ["doc-only", "x"]}}},
             "features": {"default": ["x"], "x": [], "y": [], "doc-only": [], "download-libtorch": []}},
            {"name": "b", "publish": [], "metadata": null, "features": {"z": []}}]}"#;
        let workspace = Workspace::parse(text).unwrap();
        assert_eq!(workspace.target, PathBuf::from("/t"));
        assert_eq!(workspace.features(), "a/x,a/y,b/z");
        assert_eq!(workspace.docs_rs_features(), "a/doc-only,a/x");
        assert_eq!(workspace.published().collect::<Vec<_>>(), ["a"]);
        assert_eq!(workspace.unpublished().collect::<Vec<_>>(), ["b"]);
        assert_eq!(Workspace::parse("{}"), None);
        assert_eq!(Workspace::parse("no JSON"), None);
    }

    #[test]
    fn this_workspace_is_understood() {
        let workspace = Workspace::read(&Repository::find().unwrap()).unwrap();
        let published = workspace.published().collect::<Vec<_>>();
        assert!(published.contains(&"controlgen-core") && !published.contains(&"xtask"), "{published:?}");
        let features = workspace.features();
        assert!(features.contains("controlgen-core/gguf"), "{features}");
        assert!(!features.contains("doc-only") && !features.contains("download-libtorch"), "{features}");
        assert!(workspace.docs_rs_features().contains("controlgen-core/doc-only"));
    }
}
