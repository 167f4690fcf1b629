//! Files mapped for reading.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// A regular file, mapped read-only.
///
/// A map shows the file as it is now, not as it was when opened: a file that another process rewrites in
/// place changes under it, and one that is cut short kills the reading process (`SIGBUS`), as with every
/// memory map. Writers that replace a file by renaming, as [`crate::checkpoint::save`] does, are harmless.
/// Readers here check every offset each time they use it, so that changed bytes can give wrong numbers or an
/// error, not a panic.
pub(crate) struct Map {
    map: Mmap,
    path: PathBuf,
}

impl Map {
    /// Maps the whole of a regular file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(path, error);
        // Asked before opening: opening a named pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let file = File::open(path).map_err(fail)?;
        // SAFETY: the map is read-only and owned, and no reference outlives it. That no other process writes
        // to the file cannot be had from the system; see above.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        Ok(Self { map, path: path.to_owned() })
    }

    /// The bytes of the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Says that a range is about to be read. A hint: whether the system heeds it changes speed alone.
    pub(crate) fn populate(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Some(length) = self.checked_length(range) {
            let _ = self.map.advise_range(memmap2::Advice::PopulateRead, range.start, length);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Says that a range will not be read again soon, so that its pages stop counting as memory of this
    /// process. A hint, too: reading it again is allowed and costs time.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let Some(length) = self.checked_length(range) {
            // SAFETY: dropping the pages of a shared read-only map loses nothing; the next access reads them
            // from the file again.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, length)
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    #[cfg(unix)]
    fn checked_length(&self, range: &Range<usize>) -> Option<usize> {
        let length = range.end.min(self.map.len()).saturating_sub(range.start);
        (length > 0).then_some(length)
    }
}
