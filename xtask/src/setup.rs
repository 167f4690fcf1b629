//! `cargo xtask setup`: LibTorch and the model, fetched once.
//!
//! Everything lands in `.controlgen`: it is fetched into `tmp`, checked, and renamed into place, then noted in a
//! stamp. A run that is cut off at any point leaves `tmp` behind, or a piece without its note; the next run removes
//! the one and redoes the other. A lock keeps two runs apart.

mod digest;
mod driver;
mod files;
mod huggingface;
mod libtorch;
mod lock;
mod model;
mod package;
mod python;
mod reviews;
mod sentence_model;
mod stamp;
mod wheels;

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::arguments::{self, Arguments};
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;
use libtorch::Source;
use stamp::Stamp;
use wheels::Compute;

/// What set-up is asked for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Options {
    compute: Option<Compute>,
    fetch_only: bool,
    /// The models that no test needs, too.
    models: bool,
    /// The data that classifiers are trained on, too.
    data: bool,
    /// Where `.controlgen` is to lie, if not in the checkout. Not in the help: for trying set-up itself out.
    root: Option<PathBuf>,
}

/// A set-up that is complete.
#[derive(Debug)]
pub struct Ready {
    /// What `LIBTORCH` is to be for the programs we start.
    pub libtorch: PathBuf,
}

impl Ready {
    /// Takes it that the set-up is complete, without looking.
    pub fn assumed(repository: &Repository) -> Result<Self> {
        let exported = libtorch::Exported::from_environment(repository)?;
        Ok(Self { libtorch: exported.for_programs(repository) })
    }
}

/// `cargo xtask setup`.
pub fn command(arguments: Arguments) -> Result<()> {
    let options = Options::parse(arguments)?;
    let repository = Repository::find()?;
    let repository = match &options.root {
        Some(folder) => repository.with_data_in(&files::absolute(folder)?),
        None => repository,
    };
    ensure(&repository, &options).map(|_| ())
}

impl Options {
    fn parse(mut arguments: Arguments) -> Result<Self> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--cpu" | "--cuda" if options.compute.is_some() => {
                    return Err(Failure::Usage("setup: expected one of --cpu and --cuda, found two".into()));
                }
                "--cpu" => options.compute = Some(Compute::Cpu),
                "--cuda" => options.compute = Some(Compute::Cuda),
                "--fetch-only" => options.fetch_only = true,
                "--models" => options.models = true,
                "--data" => options.data = true,
                "--root" => options.root = Some(arguments.value_of("--root")?.into()),
                other => {
                    return Err(arguments::unknown(
                        "setup",
                        other,
                        "--cpu, --cuda, --fetch-only, --models, --data",
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// Completes the set-up, or finds that it is complete, which takes milliseconds.
pub fn ensure(repository: &Repository, options: &Options) -> Result<Ready> {
    let begin = Instant::now();
    let exported = libtorch::Exported::from_environment(repository)?;
    if let Some(warning) = exported.warning() {
        eprintln!("warning: {warning}");
    }
    let stamp = Stamp::read(repository.data())?;
    let source = libtorch::source(repository, &exported, options.compute, &stamp);
    if is_complete(repository, options, &source, &stamp) {
        println!(
            "set-up is complete: {}, {}; nothing to do ({})",
            source.named(),
            crate::repository::MODEL,
            process::time(begin.elapsed())
        );
        return Ok(Ready { libtorch: exported.for_programs(repository) });
    }

    println!("set-up of {}", repository.data().display());
    files::create_folder(repository.data())?;
    let _lock = lock::take(&repository.data().join("setup.lock"))?;
    // Another run may have finished while this one waited.
    let mut stamp = Stamp::read(repository.data())?;
    let source = libtorch::source(repository, &exported, options.compute, &stamp);
    let temporary = Temporary::fresh(repository)?;

    if let Some(compute) = options.compute {
        stamp.note(CHOICE, compute.name(), &[])?;
        stamp.write(&temporary.0)?;
    }
    libtorch::ensure(repository, &source, &mut stamp, &temporary.0)?;
    // Only now, since what is exported may lead to what was just put into place.
    let ready = Ready { libtorch: exported.for_programs(repository) };
    model::ensure(repository, &mut stamp, &temporary.0)?;
    if options.models {
        sentence_model::package().ensure(&repository.sentence_model(), &mut stamp, &temporary.0)?;
    }
    if options.data {
        reviews::package().ensure(&repository.reviews(), &mut stamp, &temporary.0)?;
    }
    if !options.fetch_only {
        huggingface::ensure(repository, &mut stamp, &temporary.0, &ready.libtorch)?;
    }
    temporary.clean()?;
    println!("set-up done in {}", process::time(begin.elapsed()));
    Ok(ready)
}

/// The entry of the stamp that remembers `--cpu` or `--cuda`.
const CHOICE: &str = "choice";

fn is_complete(repository: &Repository, options: &Options, source: &Source, stamp: &Stamp) -> bool {
    options.compute.is_none_or(|compute| stamp.value(CHOICE) == Some(compute.name()))
        && libtorch::is_done(source, stamp)
        && model::is_done(stamp)
        && (!options.models || sentence_model::package().is_done(stamp))
        && (!options.data || reviews::package().is_done(stamp))
        && (options.fetch_only || huggingface::is_done(stamp))
        && !repository.temporary().exists()
}

/// A folder of this run alone, which goes away with it.
struct Temporary(PathBuf);

impl Temporary {
    /// Removes what earlier runs left, then makes the folder. Call it under the lock.
    fn fresh(repository: &Repository) -> Result<Self> {
        let all = repository.temporary();
        if all.exists() {
            println!("an interrupted run left something behind");
            clear(&all)?;
        }
        // The process id: a pip that outlived an interrupted run cannot write into this one's folder.
        let own = all.join(std::process::id().to_string());
        files::create_folder(&own)?;
        Ok(Self(own))
    }

    /// Empties the folder of what takes time, which is what was replaced, and says so.
    fn clean(&self) -> Result<()> {
        if files::size_of(&self.0) > 1_000_000 { clear(&self.0) } else { Ok(()) }
    }
}

/// Removes a folder, and says how long it took.
fn clear(folder: &Path) -> Result<()> {
    timed(|| {
        let bytes = files::size_of(folder);
        files::remove(folder)?;
        Ok(((), format!("removed {} that are not needed any more", process::megabytes(bytes))))
    })
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let all = self.0.parent().map_or(self.0.as_path(), |all| all);
        if let Err(failure) = files::remove(all) {
            eprintln!("warning: {failure}");
        }
    }
}

/// Does one thing and says how long it took; `work` returns what it did.
fn timed<T>(work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
    let begin = Instant::now();
    let (value, done) = work()?;
    println!("  {done} in {}", process::time(begin.elapsed()));
    Ok(value)
}

/// Fetches wheels with pip into `folder`, and refuses those whose checksum is not the pinned one.
fn fetch(
    python: &python::Python,
    wheels: &[wheels::Wheel],
    folder: &Path,
    temporary: &Path,
) -> Result<Vec<PathBuf>> {
    files::create_folder(folder)?;
    timed(|| {
        python.download(wheels, folder, temporary)?;
        Ok(((), format!("fetched {}", process::megabytes(files::size_of(folder)))))
    })?;
    timed(|| {
        let paths = wheels
            .iter()
            .map(|wheel| {
                let path = folder.join(&wheel.file);
                if !path.is_file() {
                    return Err(Failure::Check(format!(
                        "pip was to fetch {}, found in {}: {}",
                        wheel.file,
                        folder.display(),
                        files::names(folder).join(", ")
                    )));
                }
                digest::demand(&path, &wheel.sha256)?;
                Ok(path)
            })
            .collect::<Result<Vec<_>>>()?;
        let count = paths.len();
        Ok((paths, format!("checked the SHA-256 of {count} {}", if count == 1 { "file" } else { "files" })))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_refused() {
        let options =
            Options::parse(Arguments::of(&["--cpu", "--models", "--data", "--fetch-only", "--root", "/x"]))
                .unwrap();
        let expected = Options {
            compute: Some(Compute::Cpu),
            fetch_only: true,
            models: true,
            data: true,
            root: Some(PathBuf::from("/x")),
        };
        assert_eq!(options, expected);
        for wrong in [&["--cpu", "--cuda"][..], &["--root"], &["--gpu"], &["cpu"]] {
            let failure = Options::parse(Arguments::of(wrong)).unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{wrong:?}: {failure}");
        }
    }

    #[test]
    fn leftovers_go_away_and_so_does_the_folder() {
        let home = tempfile::tempdir().unwrap();
        let repository = Repository::find().unwrap().with_data_in(home.path());
        let left = repository.temporary().join("1");
        std::fs::create_dir_all(&left).unwrap();
        std::fs::write(left.join("torch.whl.part"), b"half").unwrap();
        let temporary = Temporary::fresh(&repository).unwrap();
        assert!(!left.exists() && temporary.0.is_dir());
        drop(temporary);
        assert!(!repository.temporary().exists());
    }
}
