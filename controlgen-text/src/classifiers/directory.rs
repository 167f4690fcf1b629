//! Directories of classifiers: config.json, model.safetensors, README.md.

use std::fmt::Write;
use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource, replace, save};
use controlgen_core::{Error, LmSpec, Result, copy_parameters};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::Pooling;
use crate::models::Config;

const CONFIG: &str = "config.json";
const STEM: &str = "model";
const CARD: &str = "README.md";
/// More hidden units, channels or buckets than any classifier here has.
pub(super) const MOST: i64 = 1 << 24;

/// What is to be known of a classifier by whoever finds its directory: its README.md.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelCard {
    /// What it is.
    pub title: String,
    /// The data it was trained on, and what of it.
    pub data: String,
    /// How well it does, and on what.
    pub accuracy: String,
    /// The command that made it.
    pub command: String,
    /// The licence of what it was made of.
    pub licence: String,
}

impl ModelCard {
    fn markdown(&self) -> String {
        let mut out = format!("# {}\n", self.title);
        let parts =
            [("Data", &self.data), ("Accuracy", &self.accuracy), ("Licence", &self.licence)].into_iter();
        for (name, text) in parts.filter(|(_, text)| !text.is_empty()) {
            let _ = write!(out, "\n## {name}\n\n{text}\n");
        }
        if !self.command.is_empty() {
            let _ = write!(out, "\n## Made by\n\n```sh\n{}\n```\n", self.command);
        }
        out
    }
}

/// What config.json says.
pub(super) struct Settings(Map<String, Value>);

impl Settings {
    pub(super) fn new(kind: &str, classes: &[String]) -> Self {
        let mut map = Map::new();
        map.insert("classifier_type".into(), kind.into());
        map.insert("classes".into(), classes.into());
        Self(map)
    }

    /// What tells the model that it was trained on from others.
    pub(super) fn base(mut self, spec: &LmSpec) -> Self {
        self.0.insert("base_model_type".into(), spec.architecture.clone().into());
        self.0.insert("base_hidden_size".into(), spec.width.into());
        self.0.insert("base_vocab_size".into(), spec.vocab.into());
        self
    }

    pub(super) fn text(mut self, field: &str, value: &str) -> Self {
        self.0.insert(field.into(), value.into());
        self
    }

    pub(super) fn texts(mut self, field: &str, values: &[String]) -> Self {
        self.0.insert(field.into(), values.into());
        self
    }

    pub(super) fn number(mut self, field: &str, value: i64) -> Self {
        self.0.insert(field.into(), value.into());
        self
    }

    pub(super) fn hidden(mut self, hidden: Option<i64>) -> Self {
        self.0.insert("hidden_units".into(), hidden.map_or(Value::Null, Value::from));
        self
    }

    /// Writes a directory: parameters first, so that a configuration is never without them. Matrices are written as f16,
    /// which is far finer than what they were trained to.
    pub(super) fn write(
        &self,
        directory: &Path,
        parameters: &[(String, Tensor)],
        card: &ModelCard,
    ) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        std::fs::create_dir_all(directory).map_err(|error| Error::io(directory, error))?;
        let halves = parameters.iter().map(|(name, value)| {
            let kind = if value.dim() > 1 { Kind::Half } else { Kind::Float };
            Ok((name.clone(), value.f_detach()?.f_to_kind(kind)?))
        });
        let file = directory.join(format!("{STEM}.safetensors"));
        save(file, &halves.collect::<Result<Vec<_>>>()?, &[("format", "pt")])?;
        replace(directory.join(CARD), card.markdown().as_bytes())?;
        let path = directory.join(CONFIG);
        let mut text = serde_json::to_string_pretty(&self.0).map_err(|error| Error::format(&path, error))?;
        text.push('\n');
        replace(&path, text.as_bytes())
    }
}

/// A directory being read.
pub(super) struct Directory {
    config: Config,
    file: Safetensors,
}

impl Directory {
    /// One of a classifier of this kind.
    pub(super) fn open(directory: &Path, kind: &str) -> Result<Self> {
        let config = Config::open(&directory.join(CONFIG))?;
        let found = config.str("classifier_type")?.unwrap_or("nothing").to_owned();
        if found != kind {
            return Err(config.error("classifier_type", kind, found));
        }
        let file = Safetensors::open_named(directory, STEM)?;
        Ok(Self { config, file })
    }

    /// Refuses another model than the one that the classifier was trained on.
    pub(super) fn expect_base(&self, spec: &LmSpec) -> Result<()> {
        let found = self.config.str("base_model_type")?.unwrap_or("nothing");
        if found != spec.architecture {
            let expected = format!("the model's `{}`", spec.architecture);
            return Err(self.config.error("base_model_type", expected, found));
        }
        for (field, here) in [("base_hidden_size", spec.width), ("base_vocab_size", spec.vocab)] {
            let found = self.config.int(field, 1, MOST)?;
            if found != here {
                return Err(self.config.error(field, format!("the model's {here}"), found));
            }
        }
        Ok(())
    }

    pub(super) fn texts(&self, field: &str) -> Result<Vec<String>> {
        let list = self.config.get(field).and_then(Value::as_array);
        let texts = list.and_then(|list| list.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| {
            let found = self.config.get(field).map_or_else(|| "nothing".to_owned(), Value::to_string);
            self.config.error(field, "a list of strings", found.chars().take(100).collect::<String>())
        })
    }

    pub(super) fn number(&self, field: &str) -> Result<i64> {
        self.config.int(field, 1, MOST)
    }

    pub(super) fn hidden(&self) -> Result<Option<i64>> {
        self.config.int_if("hidden_units", 1, MOST)
    }

    pub(super) fn pooling(&self) -> Result<Pooling> {
        let found = self.config.str("pooling")?.unwrap_or("nothing");
        let expected = "mean, last or mean_and_last";
        Pooling::from_name(found).ok_or_else(|| self.config.error("pooling", expected, found))
    }

    /// Copies the file's tensors into parameters of the same names. Nothing is copied unless all fit.
    pub(super) fn read(&self, into: &[(String, Tensor)]) -> Result<()> {
        copy_parameters(&self.file.what(), &self.file.load_all()?, into)
    }
}
