//! What cargo says of the workspace.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Features, and what each turns on: `feature`, `dep:crate` or `crate/feature`.
    features: BTreeMap<String, Vec<String>>,
    /// Crates that it depends on, with the features it asks for.
    dependencies: Vec<(String, Vec<String>)>,
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
        let dependency = |dependency: &Value| {
            let mut features = strings(&dependency["features"]);
            if dependency["uses_default_features"] == true {
                features.push("default".into());
            }
            Some((dependency["name"].as_str()?.to_owned(), features))
        };
        let package = |package: &Value| {
            let features = package["features"].as_object()?.iter();
            Some(Package {
                name: package["name"].as_str()?.to_owned(),
                // An empty list of registries is what `publish = false` becomes.
                published: package["publish"].as_array().is_none_or(|registries| !registries.is_empty()),
                features: features.map(|(name, on)| (name.clone(), strings(on))).collect(),
                dependencies: package["dependencies"]
                    .as_array()?
                    .iter()
                    .map(dependency)
                    .collect::<Option<_>>()?,
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
        joined(&self.all_features())
    }

    /// Those of [`features`](Self::features) that a plain `cargo test` does not turn on, and their crates.
    pub fn features_left_out(&self) -> (String, Vec<&str>) {
        let on = self.features_turned_on();
        let left: Vec<_> = self.all_features().into_iter().filter(|feature| !on.contains(feature)).collect();
        let mut crates: Vec<_> = left.iter().map(|&(name, _)| name).collect();
        crates.dedup();
        (joined(&left), crates)
    }

    fn all_features(&self) -> Vec<(&str, &str)> {
        let all = self.packages.iter().flat_map(|package| {
            package.features.keys().map(|feature| (package.name.as_str(), feature.as_str()))
        });
        all.filter(|(_, feature)| *feature != "default" && !WITHOUT_LIBTORCH.contains(feature)).collect()
    }

    /// The features that building the whole workspace turns on: the default ones, what its crates ask of each other,
    /// and what these turn on in turn.
    fn features_turned_on(&self) -> BTreeSet<(&str, &str)> {
        let mut open: Vec<(&str, &str)> =
            self.packages.iter().map(|package| (package.name.as_str(), "default")).collect();
        for (name, features) in self.packages.iter().flat_map(|package| &package.dependencies) {
            open.extend(features.iter().map(|feature| (name.as_str(), feature.as_str())));
        }
        let mut on = BTreeSet::new();
        while let Some((name, feature)) = open.pop() {
            let Some(package) = self.packages.iter().find(|package| package.name == name) else { continue };
            if on.insert((name, feature)) {
                let more = package.features.get(feature).into_iter().flatten();
                open.extend(more.map(|other| match other.split_once('/') {
                    Some((other, feature)) => (other.trim_end_matches('?'), feature),
                    None => (name, other.as_str()),
                }));
            }
        }
        on
    }

    /// The features that docs.rs builds the published crates with.
    pub fn docs_rs_features(&self) -> String {
        let published = self.packages.iter().filter(|package| package.published);
        let all = published.flat_map(|package| {
            package.docs_rs.iter().map(|feature| (package.name.as_str(), feature.as_str()))
        });
        joined(&all.collect::<Vec<_>>())
    }
}

/// `crate/feature,crate/feature`.
fn joined(features: &[(&str, &str)]) -> String {
    features.iter().map(|(name, feature)| format!("{name}/{feature}")).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_all_but_those_without_libtorch() {
        let text = r#"{"target_directory": "/t", "packages": [
            {"name": "a", "publish": null, "metadata": {"docs": {"rs": {"features": ["doc-only", "x"]}}},
             "features": {"default": ["x"], "x": [], "y": [], "doc-only": [], "download-libtorch": []},
             "dependencies": []},
            {"name": "b", "publish": [], "metadata": null, "features": {"z": []}, "dependencies": []}]}"#;
        let workspace = Workspace::parse(text).unwrap();
        assert_eq!(workspace.target, PathBuf::from("/t"));
        assert_eq!(workspace.features(), "a/x,a/y,b/z");
        assert_eq!(workspace.docs_rs_features(), "a/doc-only,a/x");
        assert_eq!(workspace.published().collect::<Vec<_>>(), ["a"]);
        assert_eq!(workspace.unpublished().collect::<Vec<_>>(), ["b"]);
        assert_eq!(workspace.features_left_out(), ("a/y,b/z".into(), vec!["a", "b"]));
        assert_eq!(Workspace::parse("{}"), None);
        assert_eq!(Workspace::parse("no JSON"), None);
    }

    #[test]
    fn features_are_followed_through_features_and_dependencies() {
        let text = r#"{"target_directory": "/t", "packages": [
            {"name": "a", "publish": null, "metadata": null, "dependencies": [
                {"name": "other", "features": ["x"], "uses_default_features": true}],
             "features": {"asked": ["within"], "within": ["dep:other"], "across": [], "weak": [], "left": []}},
            {"name": "b", "publish": null, "metadata": null,
             "features": {"default": ["b1"], "b1": ["a/across", "a?/weak"], "b2": ["a/left"]},
             "dependencies": [{"name": "a", "features": ["asked"], "uses_default_features": true}]}]}"#;
        let workspace = Workspace::parse(text).unwrap();
        assert_eq!(workspace.features_left_out(), ("a/left,b/b2".into(), vec!["a", "b"]));
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
