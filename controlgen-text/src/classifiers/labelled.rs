//! Labelled texts from files.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use controlgen_core::{Error, Result};
use serde_json::Value;

/// A text and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The text, never blank.
    pub text: String,
    /// An index into [`Labelled::classes`].
    pub label: usize,
    /// What [`Columns::group`] says of it; empty where there is no such column.
    pub group: String,
}

/// Texts with a class each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    classes: Vec<String>,
    examples: Vec<Example>,
}

/// Which columns of a file, or fields of a JSON object, hold what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The text.
    pub text: String,
    /// The label: a word or a number.
    pub label: String,
    /// What else is to be known of a text, such as where it comes from.
    pub group: Option<String>,
    /// The labels there are, in the order of the classes. `None`: those found, sorted.
    pub classes: Option<Vec<String>>,
}

impl Default for Columns {
    fn default() -> Self {
        Self { text: "text".into(), label: "label".into(), group: None, classes: None }
    }
}

/// A row before its label is known to be one.
struct Row {
    line: u64,
    text: String,
    label: String,
    group: String,
}

impl Labelled {
    /// Texts of these classes.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer than two classes, one that is there twice, a label that is no class, a blank text, and
    /// where fewer than two classes have texts.
    pub fn new(classes: Vec<String>, examples: Vec<Example>) -> Result<Self> {
        let different: BTreeSet<&String> = classes.iter().collect();
        if different.len() < 2 || different.len() < classes.len() {
            return Err(Error::value("classes", "two or more, all different", classes.join(", ")));
        }
        for (i, example) in examples.iter().enumerate() {
            if example.label >= classes.len() {
                let what = format!("label of example {i}");
                return Err(Error::value(what, format!("0 .. {}", classes.len()), example.label));
            }
            if example.text.trim().is_empty() {
                return Err(Error::value(
                    format!("text of example {i}"),
                    "one that is not blank",
                    "a blank one",
                ));
            }
        }
        let used: BTreeSet<usize> = examples.iter().map(|example| example.label).collect();
        if used.len() < 2 {
            let found = used.first().map_or("no texts", |&class| &classes[class]);
            return Err(Error::value("classes that texts have", "two or more", found));
        }
        Ok(Self { classes, examples })
    }

    /// Reads a file by its ending.
    ///
    /// * `.csv`: commas, quotes as in RFC 4180, so that a text may go over several lines; the first row names the columns.
    /// * `.tsv`: tabs, no quotes (IANA text/tab-separated-values); the first row names the columns.
    /// * `.jsonl`: a JSON object a line; a label may be a string, a number or a boolean.
    ///
    /// Labels and names of columns are trimmed, texts are left as they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another ending; [`Error::Io`]; [`Error::Format`], naming the line (where a row begins,
    /// from 1), for a row that is not UTF-8, has more or fewer fields than the first, is no JSON object, or lacks a field;
    /// for a blank text, a blank label, and one that is none of `classes`; for a file without one of the columns, without
    /// rows, or with texts of one class alone.
    pub fn open(path: impl AsRef<Path>, columns: &Columns) -> Result<Self> {
        let path = path.as_ref();
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let rows = match ending.to_ascii_lowercase().as_str() {
            "csv" => separated(path, b',', columns)?,
            "tsv" => separated(path, b'\t', columns)?,
            "jsonl" => json_lines(path, columns)?,
            other => {
                return Err(Error::unsupported(
                    format!("labelled texts in `.{other}`"),
                    ".csv, .tsv, .jsonl",
                ));
            }
        };
        if rows.is_empty() {
            return Err(Error::format(path, "expected rows of labelled texts, found none"));
        }
        let found = || rows.iter().map(|row| row.label.clone()).collect::<BTreeSet<_>>();
        let classes = columns.classes.clone().unwrap_or_else(|| found().into_iter().collect());
        let mut examples = Vec::with_capacity(rows.len());
        for Row { line, text, label, group } in rows {
            if text.trim().is_empty() {
                return Err(at(
                    path,
                    line,
                    format!("expected a text in `{}`, found a blank one", columns.text),
                ));
            }
            let index = classes.iter().position(|class| *class == label).ok_or_else(|| {
                let known = classes.join("`, `");
                at(path, line, format!("expected one of `{known}` in `{}`, found `{label}`", columns.label))
            })?;
            examples.push(Example { text, label: index, group });
        }
        Self::new(classes, examples).map_err(|error| Error::format(path, error))
    }

    /// The names of the classes, in order.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The texts.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The same classes, with other texts of these.
    ///
    /// # Errors
    /// Those of [`Labelled::new`].
    pub fn with(&self, examples: Vec<Example>) -> Result<Self> {
        Self::new(self.classes.clone(), examples)
    }
}

/// A problem of a line.
fn at(path: &Path, line: u64, problem: impl Display) -> Error {
    Error::format(path, format!("line {line}: {problem}"))
}

fn separated(path: &Path, delimiter: u8, columns: &Columns) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter == b',')
        .trim(csv::Trim::Headers)
        .from_reader(BufReader::new(file));
    let header = reader.headers().map_err(|error| wrong(path, error))?.clone();
    let column = |name: &str| -> Result<usize> {
        header.iter().position(|found| found == name).ok_or_else(|| {
            let found = header.iter().collect::<Vec<_>>().join("`, `");
            at(path, 1, format!("expected a column `{name}`, found `{found}`"))
        })
    };
    let (text, label) = (column(&columns.text)?, column(&columns.label)?);
    let group = columns.group.as_deref().map(column).transpose()?;
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| wrong(path, error))?;
        let line = record.position().map_or(0, csv::Position::line);
        let field = |column: usize| record.get(column).unwrap_or_default();
        let label = field(label).trim().to_owned();
        if label.is_empty() {
            return Err(at(path, line, format!("expected a label in `{}`, found nothing", columns.label)));
        }
        let group = group.map_or_else(String::new, |group| field(group).to_owned());
        rows.push(Row { line, text: field(text).to_owned(), label, group });
    }
    Ok(rows)
}

/// What the parser found wrong.
fn wrong(path: &Path, error: csv::Error) -> Error {
    let line = error.position().map_or(1, csv::Position::line);
    match error.into_kind() {
        csv::ErrorKind::Io(source) => Error::io(path, source),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            at(path, line, format!("expected {expected_len} fields, found {len}"))
        }
        csv::ErrorKind::Utf8 { err, .. } => at(path, line, format!("expected UTF-8: {err}")),
        other => at(path, line, format!("{other:?}")),
    }
}

fn json_lines(path: &Path, columns: &Columns) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut rows = Vec::new();
    for (number, line) in (1u64..).zip(BufReader::new(file).lines()) {
        let line = line.map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => at(path, number, "expected UTF-8"),
            _ => Error::io(path, error),
        })?;
        let row: Value = serde_json::from_str(&line).map_err(|error| at(path, number, error))?;
        let Value::Object(row) = row else { return Err(at(path, number, "expected a JSON object")) };
        let field = |name: &str| -> Result<String> {
            match row.get(name) {
                Some(Value::String(text)) => Ok(text.clone()),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
                Some(_) => Err(at(path, number, format!("expected a string or a number in `{name}`"))),
                None => Err(at(path, number, format!("expected a field `{name}`, found none"))),
            }
        };
        let text = field(&columns.text)?;
        let label = field(&columns.label)?.trim().to_owned();
        if label.is_empty() {
            return Err(at(path, number, format!("expected a label in `{}`, found nothing", columns.label)));
        }
        let group = columns.group.as_deref().map(field).transpose()?.unwrap_or_default();
        rows.push(Row { line: number, text, label, group });
    }
    Ok(rows)
}
