//! Adapter directories as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource, replace, save};
use controlgen_core::{Adapter, Error, Result, SiteMap, copy_parameters};
use serde_json::{Map, Value};
use tch::Tensor;

use crate::fields::Fields;
use crate::{Bottleneck, Ia3, Lora, Prefix, bottleneck, ia3, lora_config, prefix};

const CONFIG: &str = "adapter_config.json";
const STEM: &str = "adapter_model";

/// Opens the adapter in a directory, of whatever kind it is, for a model of these sites.
///
/// # Errors
/// [`Error::Unsupported`] for another `peft_type` than `LORA`, `IA3`, `PREFIX_TUNING` and our own `BOTTLENECK`; those of
/// [`Lora::open`], [`Ia3::open`], [`Prefix::open`] and [`Bottleneck::open`].
pub fn open(directory: impl AsRef<Path>, sites: &SiteMap) -> Result<Box<dyn Adapter>> {
    let directory = directory.as_ref();
    let fields = fields(directory)?;
    let found = peft_type(&fields, directory)?;
    Ok(match found.as_str() {
        lora_config::TYPE => Box::new(Lora::open(directory, sites)?),
        ia3::TYPE => Box::new(Ia3::open(directory, sites)?),
        prefix::TYPE => Box::new(Prefix::open(directory, sites)?),
        bottleneck::TYPE => Box::new(Bottleneck::open(directory, sites)?),
        other => {
            let known = [lora_config::TYPE, ia3::TYPE, prefix::TYPE, bottleneck::TYPE].join(", ");
            return Err(Error::unsupported(format!("peft_type `{other}`"), known));
        }
    })
}

fn fields(directory: &Path) -> Result<Fields> {
    Fields::open(&directory.join(CONFIG))
}

fn peft_type(fields: &Fields, directory: &Path) -> Result<String> {
    let file = directory.join(CONFIG).display().to_string();
    fields.text("peft_type")?.ok_or_else(|| Error::config(file, "peft_type", "a kind of adapter", "nothing"))
}

/// The fields of a directory's configuration, which is to be of this type.
pub(crate) fn fields_of(directory: &Path, expected: &str) -> Result<Fields> {
    let fields = fields(directory)?;
    let found = peft_type(&fields, directory)?;
    if found != expected {
        return Err(fields.error("peft_type", expected, &found.into()));
    }
    Ok(fields)
}

/// Copies the tensors of a directory into parameters of the same names.
pub(crate) fn read_parameters(directory: &Path, into: &[(String, Tensor)]) -> Result<()> {
    let file = Safetensors::open_named(directory, STEM)?;
    copy_parameters(&file.what(), &file.load_all()?, into)
}

/// Writes a directory: parameters first, so that a configuration is never without them.
pub(crate) fn write(
    directory: &Path,
    config: &Map<String, Value>,
    parameters: &[(String, Tensor)],
) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(|error| Error::io(directory, error))?;
    save(directory.join(format!("{STEM}.safetensors")), parameters, &[("format", "pt")])?;
    let path = directory.join(CONFIG);
    let mut text = serde_json::to_string_pretty(config).map_err(|error| Error::format(&path, error))?;
    text.push('\n');
    replace(&path, text.as_bytes())
}
