//! Checkpoints of a run: one file each, complete or absent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::Parameters;
use crate::checkpoint::{Safetensors, TensorSource, save};
use crate::{Error, Result, copy_parameters};

/// The key of the file's metadata under which the [`Record`] lies.
const KEY: &str = "controlgen.training";
const VERSION: u32 = 1;

/// A checkpoint of a run, read.
///
/// It is one safetensors file: tensors `parameter.*`, `optimizer.*`, `ema.*`, `trainer.*`, and a JSON text in the
/// metadata. It is written beside its place and renamed, so that there is always a whole one, however the
/// process ends.
pub struct Checkpoint {
    path: PathBuf,
    pub(super) record: Record,
    tensors: Vec<(String, Tensor)>,
}

/// What a checkpoint says beside its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) version: u32,
    /// Steps done, which is also the place in the data and in the streams of random numbers.
    pub(super) step: u64,
    pub(super) skipped: u64,
    /// Steps done when the best evaluation was made.
    pub(super) best: Option<u64>,
    pub(super) configuration: Value,
}

impl Record {
    pub(super) fn new(step: u64, skipped: u64, best: Option<u64>, configuration: Value) -> Self {
        Self { version: VERSION, step, skipped, best, configuration }
    }
}

impl Checkpoint {
    /// Reads a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for what is no checkpoint of a run, or a damaged one; [`Error::Unsupported`] for
    /// one of another version.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Safetensors::open(path)?;
        let record = file.metadata(KEY)?.ok_or_else(|| {
            Error::format(path, format!("expected the checkpoint of a run, with `{KEY}` in its metadata"))
        })?;
        let wrong =
            |error: serde_json::Error| Error::format(path, format!("`{KEY}` in the metadata: {error}"));
        let value: Value = serde_json::from_str(&record).map_err(wrong)?;
        if value.get("version").is_some_and(|version| *version != VERSION) {
            let what = format!("{}: version {} of checkpoints", path.display(), value["version"]);
            return Err(Error::unsupported(what, VERSION.to_string()));
        }
        let record = serde_json::from_value(value).map_err(wrong)?;
        Ok(Self { path: path.to_owned(), record, tensors: file.load_all()? })
    }

    /// Writes a checkpoint of the tensors of several parts.
    pub(super) fn write(
        path: &Path,
        record: &Record,
        parts: [(&str, Vec<(String, Tensor)>); 4],
    ) -> Result<()> {
        let record = serde_json::to_string(record)
            .map_err(|error| Error::format(path, format!("a record that is no JSON: {error}")))?;
        let tensors: Vec<(String, Tensor)> = parts
            .into_iter()
            .flat_map(|(part, tensors)| {
                tensors.into_iter().map(move |(name, tensor)| (format!("{part}.{name}"), tensor))
            })
            .collect();
        save(path, &tensors, &[(KEY, &record)])
    }

    /// How many steps were done.
    pub fn step(&self) -> u64 {
        self.record.step
    }

    /// The parameters by name.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.part("parameter")
    }

    /// The averages by name; none if the run kept none.
    pub fn averages(&self) -> Vec<(String, Tensor)> {
        self.part("ema.average")
    }

    /// Copies into parameters what is to be used: the averages where the run kept them, else its parameters.
    ///
    /// # Errors
    /// [`Error::Keys`], [`Error::Shape`], [`Error::NotFinite`]; then nothing has changed.
    pub fn load_into(&self, parameters: &Parameters) -> Result<()> {
        let averages = self.averages();
        let mut values = self.parameters();
        for (name, value) in &mut values {
            if let Some((_, average)) = averages.iter().find(|(other, _)| other == name) {
                *value = average.shallow_clone();
            }
        }
        copy_parameters(&self.what(), &values, &parameters.named())
    }

    /// Its path, for errors.
    pub(super) fn what(&self) -> String {
        self.path.display().to_string()
    }

    /// Refuses parameters of other names or shapes than its own.
    pub(super) fn same_parameters(&self, parameters: &Parameters) -> Result<()> {
        let mut own: BTreeMap<String, Tensor> = self.parameters().into_iter().collect();
        let mut missing = Vec::new();
        for parameter in parameters.iter() {
            match own.remove(&parameter.name) {
                Some(value) if value.size() == parameter.value.size() => {}
                Some(value) => {
                    let what = format!("{}: {}", self.what(), parameter.name);
                    return Err(Error::shape(what, format!("{:?}", parameter.value.size()), &value.size()));
                }
                None => missing.push(parameter.name.clone()),
            }
        }
        if missing.is_empty() && own.is_empty() {
            return Ok(());
        }
        Err(Error::Keys { what: self.what(), missing, unexpected: own.into_keys().collect() })
    }

    /// The tensors whose names begin so, without that beginning.
    pub(super) fn part(&self, part: &str) -> Vec<(String, Tensor)> {
        let name = |name: &str| Some(name.strip_prefix(part)?.strip_prefix('.')?.to_owned());
        self.tensors.iter().filter_map(|(full, t)| Some((name(full)?, t.shallow_clone()))).collect()
    }

    /// A list of numbers.
    pub(super) fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let found = self.tensors.iter().find(|(other, _)| other == name);
        let (_, found) = found.ok_or_else(|| Error::format(&self.path, format!("no tensor `{name}`")))?;
        if found.f_kind()? != tch::Kind::Double || found.dim() != 1 {
            return Err(Error::format(&self.path, format!("`{name}`: expected a list of F64")));
        }
        Ok(Vec::try_from(found)?)
    }

    /// Refuses another configuration than its own, naming the differences.
    pub(super) fn same_configuration(&self, now: &Value) -> Result<()> {
        // Through text and back, as the checkpoint's own, so that numbers are rounded alike.
        let wrong = |error: serde_json::Error| Error::format(&self.path, error);
        let now: Value = serde_json::from_str(&now.to_string()).map_err(wrong)?;
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        flatten("", &self.record.configuration, &mut before);
        flatten("", &now, &mut after);
        let fields: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        let differing: Vec<&String> =
            fields.into_iter().filter(|field| before.get(*field) != after.get(*field)).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let text = |of: &BTreeMap<String, String>| -> String {
            let value = |field: &&String| of.get(*field).map_or("nothing", String::as_str).to_owned();
            differing.iter().take(8).map(value).collect::<Vec<_>>().join(", ")
        };
        let names = differing.iter().take(8).map(|name| name.as_str()).collect::<Vec<_>>().join("`, `");
        let more =
            if differing.len() > 8 { format!("` and {} more", differing.len() - 8) } else { String::new() };
        Err(Error::config(self.what(), names + &more, text(&before), text(&after)))
    }
}

/// The leaves of a JSON value, by their paths.
fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(members) if !members.is_empty() => {
            members.iter().for_each(|(name, value)| flatten(&below(name), value, into));
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().enumerate().for_each(|(i, value)| flatten(&below(&i.to_string()), value, into));
        }
        other => drop(into.insert(path.to_owned(), other.to_string())),
    }
}
