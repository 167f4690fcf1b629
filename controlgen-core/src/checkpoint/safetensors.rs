//! Safetensors files: one, or several with an index.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use tch::Tensor;

use super::header::{self, Header, TensorEntry, cut};
use super::json::{Fault, Scanner};
use super::{TensorInfo, TensorSource, fill};
use crate::sys::Map;
use crate::{Error, Result};

/// The names under which libraries save a model, without endings: transformers' and diffusers'.
///
/// Of a model that is there in half precision alone, that.
const STEMS: [&str; 4] = ["model", "diffusion_pytorch_model", "model.fp16", "diffusion_pytorch_model.fp16"];
/// More files than any checkpoint is cut into.
const MAX_SHARDS: usize = 1000;
/// The usual names and endings of files that hold pickles.
const PICKLE_ENDINGS: [&str; 4] = ["bin", "pt", "pth", "ckpt"];
const PICKLES: [&str; 3] =
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin"];

/// An open checkpoint in the safetensors format.
pub struct Safetensors {
    path: PathBuf,
    shards: Vec<Shard>,
}

struct Shard {
    map: Map,
    header: Header,
}

impl Safetensors {
    /// Opens a checkpoint: a `.safetensors` file, an index (`.safetensors.index.json`) with its shards beside
    /// it, or a directory that holds either under the name `model` or `diffusion_pytorch_model`, or only their variants `.fp16`.
    ///
    /// The headers are checked: that no tensor is there twice, that shapes, element types and offsets agree,
    /// and that the data fill the file exactly.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is missing or cannot be read; [`Error::Format`] for a damaged one, for
    /// an index that names a file elsewhere, and for a shard without a tensor that the index says it has;
    /// [`Error::Unsupported`] for a pickle, and for a directory with pickles only.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::open_file(path);
        }
        for stem in STEMS {
            if let Some(found) = Self::find(path, stem) {
                return Self::open_file(&found);
            }
        }
        Err(Self::nothing_found(path, &STEMS[..2].join(".safetensors, nor ")))
    }

    /// Opens the checkpoint in a directory that is called `stem`.safetensors, or has the index
    /// `stem`.safetensors.index.json. So `model.fp16` opens a variant, `adapter_model` an adapter.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_named(directory: impl AsRef<Path>, stem: &str) -> Result<Self> {
        let directory = directory.as_ref();
        let found = Self::find(directory, stem).ok_or_else(|| Self::nothing_found(directory, stem))?;
        Self::open_file(&found)
    }

    fn find(directory: &Path, stem: &str) -> Option<PathBuf> {
        [format!("{stem}.safetensors"), format!("{stem}.safetensors.index.json")]
            .into_iter()
            .map(|name| directory.join(name))
            .find(|path| path.exists())
    }

    fn nothing_found(directory: &Path, stem: &str) -> Error {
        if let Some(pickle) = PICKLES.iter().map(|name| directory.join(name)).find(|path| path.exists()) {
            return Self::pickle(&pickle);
        }
        let wanted = directory.join(format!("{stem}.safetensors"));
        Error::io(
            wanted,
            std::io::Error::new(std::io::ErrorKind::NotFound, "neither this file nor its index is there"),
        )
    }

    fn pickle(path: &Path) -> Error {
        Error::unsupported(
            format!("{}: a pickle, which could run code,", path.display()),
            "safetensors files",
        )
    }

    fn open_file(path: &Path) -> Result<Self> {
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if ending == "json" {
            return Self::open_index(path);
        }
        if PICKLE_ENDINGS.contains(&ending) && path.exists() {
            return Err(Self::pickle(path));
        }
        Ok(Self { path: path.to_owned(), shards: vec![Shard::open(path)?] })
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index = Map::open(path)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let refuse = |fault: Fault| damaged(path, &fault);
        let mut names = BTreeMap::new();
        each_weight(index.bytes(), |scanner, _, file| {
            if !is_plain_name(&file) {
                return Err(
                    scanner.fault(format!("expected a file beside the index, found `{}`", cut(&file)))
                );
            }
            names.insert(file, 0);
            if names.len() > MAX_SHARDS {
                return Err(scanner.fault(format!("expected at most {MAX_SHARDS} shards")));
            }
            Ok(())
        })
        .map_err(refuse)?;
        let mut shards = Vec::with_capacity(names.len());
        for (name, number) in &mut names {
            *number = shards.len();
            shards.push(Shard::open(&directory.join(name))?);
        }
        each_weight(index.bytes(), |scanner, tensor, file| {
            let shard = names.get(&file).and_then(|&number: &usize| shards.get(number));
            if shard.is_some_and(|shard| shard.header.get(&tensor).is_some()) {
                return Ok(());
            }
            Err(scanner.fault(format!("tensor `{}` is not in its shard `{}`", cut(&tensor), cut(&file))))
        })
        .map_err(refuse)?;
        let checkpoint = Self { path: path.to_owned(), shards };
        let mut all: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name).collect();
        all.sort_unstable();
        match all.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::format(path, format!("tensor `{}` is in two shards", cut(pair[0])))),
            None => Ok(checkpoint),
        }
    }

    fn tensors(&self) -> impl Iterator<Item = TensorEntry<'_>> {
        self.shards.iter().flat_map(|shard| shard.header.tensors())
    }

    fn find_tensor(&self, name: &str) -> Option<(&Shard, TensorEntry<'_>)> {
        self.shards.iter().find_map(|shard| shard.header.get(name).map(|tensor| (shard, tensor)))
    }

    /// The text of a key in the file's `__metadata__`, if it is there; of several shards, in the first that
    /// has it.
    ///
    /// # Errors
    /// [`Error::Format`] if the text is damaged.
    pub fn metadata(&self, key: &str) -> Result<Option<String>> {
        for shard in &self.shards {
            let found = header::metadata(shard.map.bytes(), key)
                .map_err(|fault| damaged(shard.map.path(), &fault))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let map = Map::open(path)?;
        let header = Header::read(map.bytes()).map_err(|fault| damaged(path, &fault))?;
        Ok(Self { map, header })
    }
}

impl TensorSource for Safetensors {
    fn what(&self) -> String {
        self.path.display().to_string()
    }

    fn finished(&self) {
        crate::sys::give_back();
    }

    fn names(&self) -> Vec<String> {
        self.tensors().map(|tensor| tensor.name.to_owned()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, tensor) = self.find_tensor(name)?;
        Some(TensorInfo { shape: tensor.shape.to_vec(), kind: tensor.kind })
    }

    fn read(&self, name: &str, into: &mut Tensor) -> Result<()> {
        let (shard, tensor) = self
            .find_tensor(name)
            .ok_or_else(|| Error::format(&self.path, format!("no tensor `{}`", cut(name))))?;
        let info = TensorInfo { shape: tensor.shape.to_vec(), kind: tensor.kind };
        fill::check_target(&self.what(), name, &info, into)?;
        fill::plain(&shard.map, tensor.range(), tensor.kind, into)
    }
}

fn damaged(path: &Path, fault: &Fault) -> Error {
    Error::format(path, format!("at byte {}: {}", fault.at, fault.problem))
}

/// Calls `weight` with each tensor's name and file in the `weight_map` of an index.
fn each_weight(
    index: &[u8],
    mut weight: impl FnMut(&Scanner<'_>, String, String) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut scanner = Scanner::new(index);
    let mut seen = false;
    scanner.object(|scanner, key| {
        if !key.is("weight_map") {
            return scanner.skip();
        }
        if std::mem::replace(&mut seen, true) {
            return Err(scanner.fault("`weight_map` is there twice"));
        }
        scanner.object(|scanner, tensor| {
            let file = scanner.string()?.text()?;
            weight(scanner, tensor.text()?, file)
        })
    })?;
    scanner.end()?;
    if seen { Ok(()) } else { Err(scanner.fault("an index without `weight_map`")) }
}

/// Whether a name is that of a file in the same directory, on every system.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        && name.len() <= 255
        && !name.contains(['/', '\\', ':', '\0'])
}
