//! Pipelines: against diffusers on small random models, what their runs have in common, what they refuse.
#![allow(clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod parity;
mod runs;

use std::path::{Path, PathBuf};

use tch::Tensor;
use tempfile::TempDir;

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipelines").join(name)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() { copy(&entry.path(), &to) } else { drop(std::fs::copy(entry.path(), to)) }
    }
}

/// A pipeline's directory as diffusers wrote it: with the components that it shares with `stable_diffusion`.
fn directory(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixtures(name), folder.path());
    for shared in ["vae", "text_encoder", "tokenizer"] {
        if !folder.path().join(shared).exists() {
            copy(&fixtures("stable_diffusion").join(shared), &folder.path().join(shared));
        }
    }
    folder
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}
