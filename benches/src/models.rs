//! What the suites measure: a small fixture always, SmolLM2 where set-up has put it.

use std::path::{Path, PathBuf};

use controlgen_core::{LanguageModel, Placement, Result, kind};
use controlgen_text::models;
use tch::Device;

/// The small random Llama of controlgen-text's tests, as a Hugging Face directory.
pub fn fixture() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../controlgen-text/tests/fixtures/llama_rope_llama3"))
}

/// The folder of SmolLM2-135M-Instruct, if `cargo xtask setup` has put it there: a GGUF file, and `hf`, a Hugging Face
/// directory in bf16.
pub fn smollm2() -> Option<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../.controlgen/models/smollm2-135m-instruct");
    Some(PathBuf::from(folder)).filter(|folder| folder.join("hf/model.safetensors").exists())
}

/// The GGUF file in the folder of [`smollm2`].
pub const SMOLLM2_GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Whether Criterion measures (`cargo bench`), or only sees whether its benchmarks run (`cargo test --benches`): then the
/// fixture will do.
pub fn measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// A model on the CPU, by the element type's name.
///
/// # Errors
/// What is wrong with its files.
pub fn open(directory: &Path, dtype: &str) -> Result<Box<dyn LanguageModel>> {
    models::open(directory, Placement::new(Device::Cpu, kind(dtype)?))
}

/// The models to measure, with a name that says the element type.
///
/// # Errors
/// What is wrong with their files.
pub fn all() -> Result<Vec<(String, Box<dyn LanguageModel>)>> {
    let mut found = vec![("fixture-f32".to_owned(), open(&fixture(), "f32")?)];
    if let Some(folder) = smollm2().filter(|_| measuring()) {
        for dtype in ["f32", "bf16"] {
            found.push((format!("smollm2-{dtype}"), open(&folder.join("hf"), dtype)?));
        }
    }
    Ok(found)
}
