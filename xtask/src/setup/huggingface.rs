//! The model once more, as a Hugging Face directory in bf16, written from the GGUF file by our own code.

use std::path::Path;

use super::stamp::Stamp;
use super::{files, model, timed};
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::{GGUF, Repository};

/// The entry of the stamp.
const ENTRY: &str = "hugging-face";
/// Raise it when the directory has to be written anew.
const FORMAT: u32 = 1;
/// What the directory must hold.
const PARTS: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

fn value() -> String {
    format!("{FORMAT} {}", model::SHA256)
}

/// Is the directory there, as it was written?
pub fn is_done(stamp: &Stamp) -> bool {
    stamp.holds(ENTRY, &value())
}

/// Writes the directory. This compiles `controlgen-core`, so LibTorch must be in place.
pub fn ensure(repository: &Repository, stamp: &mut Stamp, temporary: &Path, libtorch: &Path) -> Result<()> {
    if is_done(stamp) {
        return Ok(());
    }
    println!("model {} as a Hugging Face directory", crate::repository::MODEL);
    println!("  compiling the converter; the first time LibTorch's bindings too, some minutes");
    let new = temporary.join("hf");
    let place = repository.model().join("hf");
    timed(|| {
        convert(repository, &new, libtorch)?;
        Ok(((), "compiled and converted".into()))
    })?;
    for part in PARTS {
        if !new.join(part).is_file() {
            let found = files::names(&new).join(", ");
            return Err(Failure::Check(format!("the converter was to write {part}, found: {found}")));
        }
    }
    files::replace(&new, &place, temporary)?;
    stamp.note(ENTRY, &value(), &stamp.files_under(&place, |_| true))?;
    stamp.write(temporary)?;
    println!("  wrote {} ({})", place.display(), process::megabytes(files::size_of(&place)));
    Ok(())
}

fn convert(repository: &Repository, folder: &Path, libtorch: &Path) -> Result<()> {
    let mut command = process::cargo(repository.root());
    command.args(["run", "-p", "benches", "--bin", "gguf-to-hf", "--"]);
    command.arg(repository.model().join(GGUF)).arg(folder);
    process::run(command.env("LIBTORCH", libtorch))
}
