//! Measures of a run, as tables of comma-separated values.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::StepReport;
use crate::checkpoint::replace;
use crate::{Error, Result};

/// A table that grows line by line: a line is in the file, though perhaps not on the disk, when [`row`](Self::row)
/// returns. The first column is the step.
struct Table {
    path: PathBuf,
    header: Option<String>,
    file: Option<File>,
}

impl Table {
    /// The table in a file, with the rows of the steps before `step`; a new one if there is no file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that is no such table.
    fn open(path: PathBuf, step: u64) -> Result<Self> {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(path, error)),
        };
        // What a process that was killed wrote last may be a part of a line.
        let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let header = lines.next().filter(|_| step > 0);
        let Some(header) = header else {
            if !text.is_empty() {
                std::fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
            }
            return Ok(Self { path, header: None, file: None });
        };
        if !header.starts_with("step,") {
            return Err(Error::format(path, "line 1: expected a header that begins with `step`"));
        }
        let mut kept = header.to_owned();
        for (line, number) in lines.zip(2..) {
            let of = line.split(',').next().and_then(|cell| cell.parse::<u64>().ok()).ok_or_else(|| {
                Error::format(&path, format!("line {number}: expected a row that begins with a step"))
            })?;
            if of < step {
                kept.push_str(line);
            }
        }
        replace(&path, kept.as_bytes())?;
        let header = Some(header.trim_end().to_owned());
        let mut table = Self { path, header, file: None };
        table.file = Some(table.append()?);
        Ok(table)
    }

    /// Adds a row. The first one decides which columns there are.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Value`] for other columns than before, and for names that no header can hold.
    fn row(&mut self, step: u64, cells: &[(&str, f64)]) -> Result<()> {
        if let Some((name, _)) = cells.iter().find(|(name, _)| name.contains([',', '"', '\n', '\r'])) {
            return Err(Error::value("name of a metric", "one without commas, quotes and line ends", name));
        }
        let names: Vec<&str> = std::iter::once("step").chain(cells.iter().map(|(name, _)| *name)).collect();
        let header = names.join(",");
        let mut text = String::new();
        match &self.header {
            Some(known) if *known != header => {
                return Err(Error::value(format!("columns of {}", self.path.display()), known, header));
            }
            Some(_) => {}
            None => {
                text = format!("{header}\n");
                self.header = Some(header);
            }
        }
        text.push_str(&step.to_string());
        cells.iter().for_each(|(_, value)| text.push_str(&format!(",{value}")));
        text.push('\n');
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.append()?,
        };
        file.write_all(text.as_bytes()).map_err(|error| Error::io(&self.path, error))?;
        self.file = Some(file);
        Ok(())
    }

    fn append(&self) -> Result<File> {
        let opened = OpenOptions::new().create(true).append(true).open(&self.path);
        opened.map_err(|error| Error::io(&self.path, error))
    }
}

/// The two tables of a run.
pub(super) struct Metrics {
    train: Table,
    evaluation: Table,
}

impl Metrics {
    /// Those in a directory, with the rows of the steps before `step`.
    pub(super) fn open(directory: &Path, step: u64) -> Result<Self> {
        Ok(Self {
            train: Table::open(directory.join("train.csv"), step)?,
            evaluation: Table::open(directory.join("evaluation.csv"), step)?,
        })
    }

    /// Adds a step's rows.
    pub(super) fn add(&mut self, report: &StepReport) -> Result<()> {
        let mut cells = vec![
            ("epoch", report.epoch as f64),
            ("loss", report.loss),
            ("gradient_norm", report.gradient_norm),
            ("learning_rate", report.learning_rate),
            ("skipped", f64::from(u8::from(report.skipped))),
        ];
        cells.extend(report.metrics.iter().map(|(name, value)| (name.as_str(), *value)));
        self.train.row(report.step, &cells)?;
        let Some(found) = &report.evaluation else { return Ok(()) };
        let cells: Vec<_> = found.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        self.evaluation.row(report.step, &cells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_opened_again_forgets_what_was_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.csv");
        let mut table = Table::open(path.clone(), 0).unwrap();
        for step in 0..5 {
            table.row(step, &[("loss", step as f64 / 3.0), ("x", f64::NAN)]).unwrap();
        }
        drop(table);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}5,0.2")).unwrap(); // killed here
        let mut table = Table::open(path.clone(), 3).unwrap();
        for step in 3..5 {
            table.row(step, &[("loss", step as f64 / 3.0), ("x", f64::NAN)]).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        assert!(whole.starts_with("step,loss,x\n0,0,NaN\n1,0.3333333333333333,NaN\n"));
        assert!(matches!(table.row(5, &[("loss", 1.0)]), Err(Error::Value { .. })));
        assert!(matches!(table.row(5, &[("lo,ss", 1.0)]), Err(Error::Value { .. })));
        drop(Table::open(path.clone(), 0).unwrap());
        assert!(!path.exists(), "a run from the beginning");
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for (i, text) in ["hello\nworld\n", "step,loss\nx,1\n", "step,loss\n-1,1\n"].into_iter().enumerate() {
            let path = directory.path().join(i.to_string());
            std::fs::write(&path, text).unwrap();
            assert!(matches!(Table::open(path, 3), Err(Error::Format { .. })), "{text}");
        }
    }
}
