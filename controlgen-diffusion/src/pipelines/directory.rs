//! diffusers' model_index.json.

use std::path::{Path, PathBuf};

use controlgen_core::{Autoencoder, Config, Denoiser, Error, Placement, Result};
use serde_json::Value;

use crate::{Predicts, Scheduler, models};

/// A pipeline's directory: its class, and a folder for each component.
pub(super) struct Directory {
    path: PathBuf,
    index: Config,
    class: String,
}

impl Directory {
    /// Opens the directory of a pipeline of one of these classes.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`]; [`Error::Unsupported`] for another class, naming those known.
    pub(super) fn open(path: &Path, known: &[&str]) -> Result<Self> {
        let index = Config::open(&path.join("model_index.json"))?;
        let class = index.str("_class_name")?.unwrap_or("nothing").to_owned();
        if !known.contains(&class.as_str()) {
            return Err(Error::unsupported(format!("pipeline `{class}`"), known.join(", ")));
        }
        Ok(Self { path: path.to_owned(), index, class })
    }

    /// `_class_name`.
    pub(super) fn class(&self) -> &str {
        &self.class
    }

    /// What errors and parameters call it: the last part of its path.
    pub(super) fn name(&self) -> String {
        let name = self.path.canonicalize().ok();
        let name = name.as_deref().unwrap_or(&self.path).file_name();
        name.map_or_else(|| self.path.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// The fields of model_index.json itself.
    pub(super) fn index(&self) -> &Config {
        &self.index
    }

    /// The folder of a component; or the directory itself where there is none, as old ones of one model have it.
    pub(super) fn folder(&self, component: &str) -> PathBuf {
        let folder = self.path.join(component);
        if folder.is_dir() { folder } else { self.path.clone() }
    }

    /// Whether the index names a class for this component, and its files are there.
    pub(super) fn has(&self, component: &str) -> bool {
        let named = self.pair(component).is_some_and(|pair| pair.iter().all(|part| !part.is_null()));
        let file = if component.ends_with("scheduler") { "scheduler_config.json" } else { "config.json" };
        named && (self.path.join(component).is_dir() || self.path.join(file).exists())
    }

    /// Whether the index says that there is no such component: `[null, null]`.
    pub(super) fn does_without(&self, component: &str) -> bool {
        self.pair(component).is_some_and(|pair| pair.iter().all(Value::is_null))
    }

    /// The library and the class that the index names for a component.
    fn pair(&self, component: &str) -> Option<&Vec<Value>> {
        self.index.get(component).and_then(Value::as_array)
    }

    /// Refuses a directory in which one of these is missing.
    ///
    /// # Errors
    /// [`Error::Keys`], naming all that are missing.
    pub(super) fn require(&self, components: &[&str]) -> Result<()> {
        let missing = components.iter().filter(|component| !self.has(component));
        let missing: Vec<String> = missing.map(|component| (*component).to_owned()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let what = format!("components of {} in {}", self.class, self.path.display());
        Err(Error::Keys { what, missing, unexpected: Vec::new() })
    }

    /// A component's config.json.
    pub(super) fn config(&self, component: &str) -> Result<Config> {
        Config::open(&self.folder(component).join("config.json"))
    }

    /// The component `scheduler`.
    pub(super) fn scheduler(&self) -> Result<Scheduler> {
        Scheduler::open(self.folder("scheduler").join("scheduler_config.json"))
    }

    /// A denoiser that predicts what the scheduler says, and takes a sample.
    pub(super) fn denoiser(
        &self,
        component: &str,
        scheduler: &Scheduler,
        placement: Placement,
    ) -> Result<Box<dyn Denoiser>> {
        self.denoiser_of(1, component, scheduler, placement)
    }

    /// A denoiser that takes `parts` times a sample's channels: images beside it. Where it puts out twice a sample's, half
    /// of them are a variance, whether the scheduler uses it or not.
    pub(super) fn denoiser_of(
        &self,
        parts: i64,
        component: &str,
        scheduler: &Scheduler,
        placement: Placement,
    ) -> Result<Box<dyn Denoiser>> {
        let config = self.config(component)?;
        let taken = config.int_if("in_channels", 1, i64::MAX)?;
        let given = config.int_if("out_channels", 1, i64::MAX)?;
        let twice = taken
            .zip(given)
            .is_some_and(|(taken, given)| given.checked_mul(parts) == taken.checked_mul(2) && given % 2 == 0);
        let predicts = Predicts {
            parameterisation: scheduler.parameterisation(),
            learned_variance: scheduler.learned_variance() || twice,
        };
        models::open_denoiser(&self.folder(component), predicts, placement)
    }

    /// The component `vae`.
    pub(super) fn autoencoder(&self, placement: Placement) -> Result<Box<dyn Autoencoder>> {
        models::open_autoencoder(&self.folder("vae"), placement)
    }
}
