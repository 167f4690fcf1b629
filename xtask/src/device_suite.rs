//! `cargo xtask device-suite`: the checks of a device, packed to be carried to a machine that has one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::arguments::{self, Arguments};
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;
use crate::setup;

/// The most that what is packed may weigh, in bytes.
const MOST: u64 = 20_000_000;
/// The binary, and the folder that it is packed into.
const NAME: &str = "device-suite";

/// Builds the release binary, puts it and its models into the target folder's `device-suite`, and says how to run it.
pub fn command(mut arguments: Arguments) -> Result<()> {
    if let Some(argument) = arguments.next() {
        return Err(arguments::unknown("device-suite", &argument, "no arguments"));
    }
    let repository = Repository::find()?;
    let ready = setup::ensure(&repository, &setup::Options::default())?;
    let mut build = process::cargo(repository.root());
    build.args([
        "build",
        "--release",
        "-p",
        "benches",
        "--bin",
        NAME,
        "--config",
        "profile.release.strip=true",
    ]);
    let binary = process::build_binary(build.env("LIBTORCH", &ready.libtorch), NAME)?;
    let folder = binary.with_file_name(format!("{NAME}-packed"));
    let size = pack(&binary, &repository.root().join("controlgen-text/tests/fixtures"), &folder)?;
    println!("packed {} in {}", process::megabytes(size), folder.display());
    if size > MOST {
        let most = process::megabytes(MOST);
        return Err(Failure::Check(format!("expected at most {most}, found {}", process::megabytes(size))));
    }
    println!(
        "\nOn the other machine, with the folder carried there and Python's torch 2.11:\n\n  \
         LD_LIBRARY_PATH=$(python -c 'import torch; print(torch.__path__[0])')/lib {NAME}-packed/{NAME}"
    );
    Ok(())
}

/// Copies the binary and the models into `folder`, which is made anew; gives the size in bytes.
fn pack(binary: &Path, fixtures: &Path, folder: &Path) -> Result<u64> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| Failure::io("deleting", folder, error))?;
    }
    let make =
        |folder: &Path| fs::create_dir_all(folder).map_err(|error| Failure::io("making", folder, error));
    let copy =
        |from: &Path, to: PathBuf| fs::copy(from, &to).map_err(|error| Failure::io("copying to", &to, error));
    make(folder)?;
    let mut size = copy(binary, folder.join(NAME))?;
    let reading = |error| Failure::io("reading", fixtures, error);
    for entry in fs::read_dir(fixtures).map_err(reading)? {
        let model = entry.map_err(reading)?.path();
        let files = ["config.json", "model.safetensors"].map(|name| model.join(name));
        let (Some(name), true) = (model.file_name(), files.iter().all(|file| file.is_file())) else {
            continue;
        };
        let to = folder.join("models").join(name);
        make(&to)?;
        for file in files {
            size += copy(&file, to.join(file.file_name().unwrap_or_default()))?;
        }
    }
    Ok(size)
}
