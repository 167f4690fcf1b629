//! The file of records: one JSON line a text, appended as it is made.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use controlgen_core::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::sets;

/// What all records of a file were made under: its first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub prompt: String,
    pub max_new_tokens: usize,
    pub model: String,
    pub beams: usize,
    pub seed: u64,
    /// What the texts are made in; files of before it was a setting are of f32.
    #[serde(default = "f32_by_default")]
    pub dtype: String,
}

fn f32_by_default() -> String {
    "f32".to_owned()
}

/// One text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub method: String,
    /// The plain forms of the words wanted.
    pub concepts: Vec<String>,
    pub text: String,
    /// By the judge, after the prompt.
    pub log_prob: f64,
    /// The judge's.
    pub tokens: usize,
    /// Without the judging.
    pub seconds: f64,
}

/// The records of a file, which they are appended to.
pub struct Records {
    path: PathBuf,
    file: File,
    all: HashMap<(String, Vec<String>), Record>,
}

impl Records {
    /// Opens or begins a file. A last line that was not written to its end, by a run that was ended, is cut off.
    pub fn open(path: &Path, settings: &Settings) -> Result<Self> {
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
                let found: Settings = serde_json::from_str(first).map_err(|source| bad(0, &source))?;
                if found != *settings {
                    let expected = format!("the settings of {}: {found:?}", path.display());
                    return Err(Error::value("settings", expected, format!("{settings:?}")));
                }
            }
        }
        for (number, line) in lines {
            let record: Record = serde_json::from_str(line).map_err(|source| bad(number, &source))?;
            records.all.insert((record.method.clone(), record.concepts.clone()), record);
        }
        Ok(records)
    }

    /// The text that a method made of a set, if it has.
    pub fn find(&self, method: &str, set: &[Vec<String>]) -> Option<&Record> {
        self.all.get(&(method.to_owned(), sets::plain(set)))
    }

    /// A text that a method made of any set.
    pub fn any(&self, method: &str) -> Option<&Record> {
        self.all.values().find(|record| record.method == method)
    }

    /// Takes a text, and puts it on the disk.
    pub fn append(&mut self, record: Record) -> Result<()> {
        self.write(&record)?;
        self.all.insert((record.method.clone(), record.concepts.clone()), record);
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
    use super::*;

    fn settings() -> Settings {
        Settings {
            prompt: "p\n".into(),
            max_new_tokens: 3,
            model: "m".into(),
            beams: 2,
            seed: 7,
            dtype: "f32".into(),
        }
    }

    fn record(method: &str, word: &str) -> Record {
        let (method, concepts) = (method.to_owned(), vec![word.to_owned()]);
        Record { method, concepts, text: "a \"b\"\n".into(), log_prob: -1.25, tokens: 2, seconds: 0.5 }
    }

    #[test]
    fn a_run_goes_on_where_one_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let set = |word: &str| vec![vec![word.to_owned(), "other form".to_owned()]];
        let mut records = Records::open(&path, &settings()).unwrap();
        records.append(record("beam", "dog")).unwrap();
        assert!(Records::open(&path, &settings()).is_err(), "another run writes");
        drop(records);
        // The run was ended within a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"method\":\"beam\",\"conc").unwrap();
        drop(file);
        let mut records = Records::open(&path, &settings()).unwrap();
        assert_eq!(records.find("beam", &set("dog")), Some(&record("beam", "dog")));
        assert!(records.find("beam", &set("cat")).is_none() && records.find("smc", &set("dog")).is_none());
        records.append(record("beam", "cat")).unwrap();
        drop(records);
        let records = Records::open(&path, &settings()).unwrap();
        assert!(records.find("beam", &set("cat")).is_some() && records.find("beam", &set("dog")).is_some());
        drop(records);
        let other = Settings { beams: 3, ..settings() };
        assert!(matches!(Records::open(&path, &other), Err(Error::Value { .. })));
        std::fs::write(&path, "{}\n").unwrap();
        assert!(matches!(Records::open(&path, &settings()), Err(Error::Format { .. })));
    }
}
