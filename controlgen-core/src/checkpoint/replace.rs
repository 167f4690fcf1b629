//! Files that appear complete or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Puts a file of these bytes in place: it is written beside its place under a temporary name, and then renamed. What
/// was there is replaced.
///
/// # Errors
/// [`Error::Value`] for a path that names no file; [`Error::Io`] if writing fails, in which case what was there is as
/// before.
pub fn replace(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    replace_with(path, |out| out.write_all(bytes).map_err(|error| Error::io(path, error)))
}

/// [`replace`] with what `write` writes.
pub(super) fn replace_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let (file, temporary) = Temporary::beside(path)?;
    let mut out = BufWriter::new(file);
    write(&mut out)?;
    let fail = |error| Error::io(path, error);
    let file = out.into_inner().map_err(|error| fail(error.into_error()))?;
    file.sync_all().map_err(fail)?;
    drop(file);
    temporary.rename(path)
}

/// Removes what processes that were killed while they wrote a file have left beside it. Nobody else may be writing it.
pub(crate) fn remove_left(path: &Path) -> Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let begin = format!(".{}.", name.to_string_lossy());
    let fail = |error| Error::io(directory, error);
    for entry in fs::read_dir(directory).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let found = entry.file_name();
        let found = found.to_string_lossy();
        if found.starts_with(&begin) && found.ends_with(".tmp") {
            fs::remove_file(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
        }
    }
    Ok(())
}

/// A file that is removed unless it is renamed.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// Creates a new file in the directory of `path`, as a file is renamed within one file system only.
    fn beside(path: &Path) -> Result<(File, Self)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = path
            .file_name()
            .ok_or_else(|| Error::value("path to save to", "that of a file", path.display()))?;
        loop {
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            let temporary = path.with_file_name(hidden);
            match OpenOptions::new().write(true).create_new(true).open(&temporary) {
                Ok(file) => return Ok((file, Self(Some(temporary)))),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(temporary, error)),
            }
        }
    }

    fn rename(mut self, path: &Path) -> Result<()> {
        if let Some(temporary) = &self.0 {
            fs::rename(temporary, path).map_err(|error| Error::io(path, error))?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(temporary) = &self.0 {
            let _ = fs::remove_file(temporary);
        }
    }
}
