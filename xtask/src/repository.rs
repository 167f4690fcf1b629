//! Where things lie in the checkout.

use std::env;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// The model's name in `.controlgen/models`.
pub const MODEL: &str = "smollm2-135m-instruct";
/// The GGUF file of the model.
pub const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The name of the movie reviews in `.controlgen/data`.
pub const REVIEWS: &str = "movie-reviews";
/// The name of the sentence encoder in `.controlgen/models`.
pub const SENTENCE_MODEL: &str = "all-minilm-l6-v2";

/// A checkout, and the folder in it that set-up fills.
#[derive(Debug, Clone)]
pub struct Repository {
    root: PathBuf,
    data: PathBuf,
}

impl Repository {
    /// The checkout that this program was started for.
    pub fn find() -> Result<Self> {
        // `cargo run` sets the variable; the compiled-in value serves a binary that is started directly.
        let manifest = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().map(Path::to_path_buf).unwrap_or_default();
        if !root.join("xtask/Cargo.toml").is_file() {
            return Err(Failure::Check(format!(
                "{}: expected the checkout of controlgen, found no xtask/Cargo.toml in it",
                root.display()
            )));
        }
        Ok(Self { data: root.join(".controlgen"), root })
    }

    /// The same checkout, with what set-up fetches put into `folder/.controlgen`.
    pub fn with_data_in(self, folder: &Path) -> Self {
        Self { data: folder.join(".controlgen"), ..self }
    }

    /// The root of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder that set-up fills.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The link to LibTorch, which `.cargo/config.toml` names.
    pub fn libtorch(&self) -> PathBuf {
        self.data.join("libtorch")
    }

    /// The packages that LibTorch is installed from.
    pub fn python(&self) -> PathBuf {
        self.data.join("python")
    }

    /// The folder of the model.
    pub fn model(&self) -> PathBuf {
        self.data.join("models").join(MODEL)
    }

    /// The folder of the movie reviews.
    pub fn reviews(&self) -> PathBuf {
        self.data.join("data").join(REVIEWS)
    }

    /// The folder of the sentence encoder.
    pub fn sentence_model(&self) -> PathBuf {
        self.data.join("models").join(SENTENCE_MODEL)
    }

    /// What goes away when a run ends.
    pub fn temporary(&self) -> PathBuf {
        self.data.join("tmp")
    }
}
