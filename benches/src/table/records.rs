//! The file of records: one JSON line a text, appended as it is made.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::hash::Hash;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use controlgen_core::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A record, told from others of its file by a key.
pub trait Keyed: Serialize + DeserializeOwned {
    type Key: Eq + Hash;

    fn key(&self) -> Self::Key;
}

/// The records of a file, which they are appended to. Its first line is what all of them were made under.
pub struct Records<R: Keyed> {
    path: PathBuf,
    file: File,
    all: HashMap<R::Key, R>,
}

impl<R: Keyed> Records<R> {
    /// Opens or begins a file of these settings. A last line that was not written to its end, by a run that was ended, is
    /// cut off.
    pub fn open<S: Serialize + DeserializeOwned + PartialEq + Debug>(
        path: &Path,
        settings: &S,
    ) -> Result<Self> {
        let io = |source| Error::io(path, source);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        // Two runs would write the same texts.
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::value("--out", "a file that no other run writes", path.display()))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::Start(whole as u64)).map_err(io)?;
        let text = std::str::from_utf8(&bytes[..whole]).map_err(|source| Error::format(path, source))?;
        let mut records = Self { path: path.to_owned(), file, all: HashMap::new() };
        let mut lines = text.lines().enumerate();
        let bad = |line: usize, problem: &dyn std::fmt::Display| {
            Error::format(path, format!("line {}: {problem}", line + 1))
        };
        match lines.next() {
            None => records.write(settings)?,
            Some((_, first)) => {
                let found: S = serde_json::from_str(first).map_err(|source| bad(0, &source))?;
                if found != *settings {
                    let expected = format!("the settings of {}: {found:?}", path.display());
                    return Err(Error::value("settings", expected, format!("{settings:?}")));
                }
            }
        }
        for (number, line) in lines {
            let record: R = serde_json::from_str(line).map_err(|source| bad(number, &source))?;
            records.all.insert(record.key(), record);
        }
        Ok(records)
    }

    /// The record of a key, if there is one.
    pub fn find(&self, key: &R::Key) -> Option<&R> {
        self.all.get(key)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.all.values()
    }

    /// Takes a text, and puts it on the disk.
    pub fn append(&mut self, record: R) -> Result<()> {
        self.write(&record)?;
        self.all.insert(record.key(), record);
        Ok(())
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(line).map_err(|source| Error::format(&self.path, source))?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|source| Error::io(&self.path, source))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Settings {
        prompt: String,
        seed: u64,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Record {
        method: String,
        text: String,
    }

    impl Keyed for Record {
        type Key = String;

        fn key(&self) -> String {
            self.method.clone()
        }
    }

    fn settings() -> Settings {
        Settings { prompt: "p\n".into(), seed: 7 }
    }

    fn record(method: &str) -> Record {
        Record { method: method.into(), text: "a \"b\"\n".into() }
    }

    #[test]
    fn a_run_goes_on_where_one_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let open = || Records::<Record>::open(&path, &settings());
        let mut records = open().unwrap();
        records.append(record("beam")).unwrap();
        assert!(open().is_err(), "another run writes");
        drop(records);
        // The run was ended within a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"method\":\"smc\",\"te").unwrap();
        drop(file);
        let mut records = open().unwrap();
        assert_eq!(records.find(&"beam".into()), Some(&record("beam")));
        assert!(records.find(&"smc".into()).is_none());
        records.append(record("smc")).unwrap();
        drop(records);
        let records = open().unwrap();
        assert!(records.find(&"smc".into()).is_some() && records.iter().count() == 2);
        drop(records);
        let other = Settings { seed: 3, ..settings() };
        assert!(matches!(Records::<Record>::open(&path, &other), Err(Error::Value { .. })));
        std::fs::write(&path, "{}\n").unwrap();
        assert!(matches!(open(), Err(Error::Format { .. })));
    }
}
