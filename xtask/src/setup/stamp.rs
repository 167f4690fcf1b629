//! What earlier runs have completed: `.controlgen/setup.stamp`.
//!
//! A line a thing, `NAME<tab>VALUE`, then a line for each file it consists of, `<tab>PATH<tab>BYTES<tab>MODIFIED`
//! (seconds since 1970; no finer, so that archives of the folder keep it). A thing is done when it has the value that
//! is wanted and its files are as they were.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files;
use crate::failure::{Failure, Result};

const NAME: &str = "setup.stamp";
const HEADER: &str = "# Written by `cargo xtask setup`: what it has completed.";

/// The stamp of one `.controlgen`.
#[derive(Debug, Default)]
pub struct Stamp {
    folder: PathBuf,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    value: String,
    files: Vec<Fact>,
}

/// A file as it was when noted. The path is relative to `.controlgen`.
#[derive(Debug, PartialEq, Eq)]
struct Fact {
    path: String,
    bytes: u64,
    modified: i64,
}

impl Stamp {
    /// Reads the stamp of a folder. Where there is none, or it makes no sense, nothing is done yet.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Failure::io("reading", path, error)),
        };
        Ok(Self { folder: folder.to_owned(), entries: parse(&text).unwrap_or_default() })
    }

    /// The value noted for a thing, whatever became of its files.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.entries.get(name).map(|entry| entry.value.as_str())
    }

    /// Is the thing done, with this value and with its files as they were?
    pub fn holds(&self, name: &str, value: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| {
            entry.value == value
                && entry.files.iter().all(|fact| Fact::of(&self.folder, &fact.path).as_ref() == Some(fact))
        })
    }

    /// Notes that a thing is done. The files are paths relative to the folder, and must be there.
    pub fn note(&mut self, name: &str, value: &str, files: &[String]) -> Result<()> {
        let fact = |path: &String| {
            Fact::of(&self.folder, path).ok_or_else(|| {
                Failure::Check(format!("{}: expected a file, found none", self.folder.join(path).display()))
            })
        };
        let files = files.iter().map(fact).collect::<Result<_>>()?;
        self.entries.insert(name.to_owned(), Entry { value: value.to_owned(), files });
        Ok(())
    }

    /// Writes the stamp, all of it or nothing.
    pub fn write(&self, temporary: &Path) -> Result<()> {
        let new = temporary.join(NAME);
        fs::write(&new, self.render()).map_err(|error| Failure::io("writing", &new, error))?;
        let place = self.folder.join(NAME);
        fs::rename(&new, &place).map_err(|error| Failure::io("putting into place", &place, error))
    }

    /// The files under a path of the folder for which `wanted` holds, as [`note`](Self::note) takes them.
    pub fn files_under(&self, path: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let inside = files::walk(path).into_iter().filter_map(|file| {
            file.strip_prefix(&self.folder).ok().and_then(Path::to_str).map(str::to_owned)
        });
        inside.filter(|file| wanted(file) && !file.contains(['\t', '\n'])).collect()
    }

    fn render(&self) -> String {
        let mut text = format!("{HEADER}\n");
        for (name, Entry { value, files }) in &self.entries {
            text += &format!("{name}\t{value}\n");
            for Fact { path, bytes, modified } in files {
                text += &format!("\t{path}\t{bytes}\t{modified}\n");
            }
        }
        text
    }
}

impl Fact {
    fn of(folder: &Path, path: &str) -> Option<Self> {
        let found = fs::metadata(folder.join(path)).ok()?;
        Some(Self { path: path.to_owned(), bytes: found.len(), modified: found.mtime() })
    }
}

fn parse(text: &str) -> Option<BTreeMap<String, Entry>> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(fact) = line.strip_prefix('\t') {
            let mut fields = fact.split('\t');
            let path = fields.next()?.to_owned();
            let bytes = fields.next()?.parse().ok()?;
            let modified = fields.next()?.parse().ok()?;
            entries.get_mut(&last)?.files.push(Fact { path, bytes, modified });
        } else {
            let (name, value) = line.split_once('\t')?;
            name.clone_into(&mut last);
            entries.insert(last.clone(), Entry { value: value.to_owned(), files: Vec::new() });
        }
    }
    Some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(folder: &Path) -> Stamp {
        fs::write(folder.join("a.gguf"), b"1234").unwrap();
        fs::create_dir(folder.join("hf")).unwrap();
        fs::write(folder.join("hf/config.json"), b"{}").unwrap();
        let mut stamp = Stamp::read(folder).unwrap();
        stamp.note("model", "sum", &["a.gguf".into()]).unwrap();
        stamp.note("hf", "sum 1", &stamp.files_under(&folder.join("hf"), |_| true)).unwrap();
        stamp.note("choice", "cpu", &[]).unwrap();
        stamp.write(folder).unwrap();
        Stamp::read(folder).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let home = tempfile::tempdir().unwrap();
        let stamp = noted(home.path());
        assert!(stamp.holds("model", "sum") && stamp.holds("hf", "sum 1") && stamp.holds("choice", "cpu"));
        assert!(!stamp.holds("model", "another sum") && !stamp.holds("libtorch", "sum"));
        assert_eq!(stamp.value("choice"), Some("cpu"));
        assert_eq!(stamp.entries["hf"].files.len(), 1);
        let mut stamp = stamp;
        let failure = stamp.note("model", "sum", &["absent".into()]).unwrap_err().to_string();
        assert!(failure.contains("absent: expected a file, found none"), "{failure}");
    }

    #[test]
    fn a_file_that_changed_or_went_is_noticed() {
        let home = tempfile::tempdir().unwrap();
        let stamp = noted(home.path());
        fs::write(home.path().join("a.gguf"), b"12345").unwrap();
        assert!(!stamp.holds("model", "sum"), "another length");
        fs::write(home.path().join("a.gguf"), b"1234").unwrap();
        assert!(stamp.holds("model", "sum"));
        let file = fs::File::options().write(true).open(home.path().join("a.gguf")).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(!stamp.holds("model", "sum"), "another time");
        fs::remove_file(home.path().join("hf/config.json")).unwrap();
        assert!(!stamp.holds("hf", "sum 1"), "no file");
    }

    #[test]
    fn nonsense_means_that_nothing_is_done() {
        let home = tempfile::tempdir().unwrap();
        for text in ["\tno name\t1\t2\n", "name without value\n", "a\tb\n\tfile\tmany\t2\n", "\u{0}\u{1}"] {
            fs::write(home.path().join(NAME), text).unwrap();
            assert!(Stamp::read(home.path()).unwrap().entries.is_empty(), "{text:?}");
        }
        fs::write(home.path().join(NAME), [0xff, 0xfe, b'\t', b'x']).unwrap();
        assert!(!Stamp::read(home.path()).unwrap().holds("model", "x"));
        assert!(Stamp::read(&home.path().join("absent")).unwrap().entries.is_empty());
    }
}
