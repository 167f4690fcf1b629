//! Files and folders, with errors that say which.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// Makes a folder and those above it.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Failure::io("making the folder", path, error))
}

/// Removes a file, a link or a folder with all in it; does nothing where there is nothing.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::io("removing", path, error)),
        _ => Ok(()),
    }
}

/// Puts `new` where `place` is. What was there is moved to `temporary` first, since a folder cannot be renamed over
/// another, and stays there: removing a large one takes long.
pub fn replace(new: &Path, place: &Path, temporary: &Path) -> Result<()> {
    if let Some(parent) = place.parent() {
        create_folder(parent)?;
    }
    if fs::symlink_metadata(place).is_ok() {
        let old = (0..)
            .map(|number| temporary.join(format!("replaced-{number}")))
            .find(|free| fs::symlink_metadata(free).is_err())
            .unwrap_or_else(|| temporary.join("replaced"));
        fs::rename(place, &old).map_err(|error| Failure::io("moving away", place, error))?;
    }
    fs::rename(new, place).map_err(|error| Failure::io("putting into place", place, error))
}

/// Makes `place` a link to `target`, whatever it was.
pub fn link(target: &Path, place: &Path, temporary: &Path) -> Result<()> {
    let new = temporary.join("link");
    remove(&new)?;
    symlink(target, &new).map_err(|error| Failure::io("making the link", &new, error))?;
    replace(&new, place, temporary)
}

/// The path from the root of the file system; links are left as they are.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Failure::io("resolving", path, error))
}

/// The bytes in a file, or in all files of a folder; what cannot be read counts nothing.
pub fn size_of(path: &Path) -> u64 {
    walk(path).iter().filter_map(|file| fs::symlink_metadata(file).ok()).map(|found| found.len()).sum()
}

/// All files under a path, in order; links are not followed, and what cannot be read is left out.
pub fn walk(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![path.to_path_buf()];
    while let Some(next) = open.pop() {
        if fs::symlink_metadata(&next).is_ok_and(|found| found.is_dir()) {
            open.extend(fs::read_dir(&next).into_iter().flatten().flatten().map(|entry| entry.path()));
        } else {
            found.push(next);
        }
    }
    found.sort();
    found
}

/// The names in a folder, in order.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_replaces_a_folder_a_file_and_a_link() {
        let home = tempfile::tempdir().unwrap();
        let (place, temporary) = (home.path().join("libtorch"), home.path().join("tmp"));
        fs::create_dir_all(place.join("lib")).unwrap();
        fs::create_dir(&temporary).unwrap();
        for target in ["python/torch", "/opt/libtorch"] {
            link(Path::new(target), &place, &temporary).unwrap();
            assert_eq!(fs::read_link(&place).unwrap(), Path::new(target));
        }
        fs::remove_file(&place).unwrap();
        fs::write(&place, b"a file").unwrap();
        link(Path::new("python/torch"), &place, &temporary).unwrap();
        assert_eq!(fs::read_link(&place).unwrap(), Path::new("python/torch"));
    }

    #[test]
    fn removing_does_not_follow_links() {
        let home = tempfile::tempdir().unwrap();
        let (kept, link) = (home.path().join("kept"), home.path().join("link"));
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), b"1234").unwrap();
        symlink(&kept, &link).unwrap();
        assert_eq!(size_of(&kept), 4);
        remove(&link).unwrap();
        remove(&home.path().join("absent")).unwrap();
        assert!(kept.join("file").exists() && !link.exists());
    }
}
