//! Runs the checks of `benches::device_suite` on a device, and prints a table.
//!
//! `device-suite [--device cpu|cuda|cuda:N|best] [--models FOLDER]`
//!
//! Without `--device`: the first CUDA device where there is one, else the CPU. Without `--models`: the folder `models`
//! beside this program, where `cargo xtask device-suite` puts them, or that of controlgen-text's tests. The code is 1
//! where a check fails. On a machine without a checkout, `LD_LIBRARY_PATH` says where LibTorch 2.11 lies: the folder
//! `torch/lib` of a Python environment.

use std::path::PathBuf;
use std::process::ExitCode;

use benches::{device_suite, models};
use controlgen_core::{Error, Result, device};

fn models_folder() -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join("models")));
    let fixtures = models::fixture().parent().map(PathBuf::from);
    beside.into_iter().chain(fixtures).find(|folder| folder.is_dir()).ok_or_else(|| {
        Error::value("--models", "a folder of models, as there is none beside this program", "nothing")
    })
}

fn run() -> Result<()> {
    let (mut name, mut folder) = ("best".to_owned(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next();
        let value = || value.ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"));
        match argument.as_str() {
            "--device" => name = value()?,
            "--models" => folder = Some(PathBuf::from(value()?)),
            other => return Err(Error::value("argument", "--device NAME or --models FOLDER", other)),
        }
    }
    let device = device(&name)?;
    let folder = folder.map_or_else(models_folder, Ok)?;
    println!("Device: {device:?}; {} threads on the host\n", tch::get_num_threads());
    println!("| check | type | figure | asked for | |\n|---|---|---|---|---|");
    let rows = device_suite::run(device, &folder, &mut |row| println!("{row}"))?;
    let failed = rows.iter().filter(|row| !row.holds()).count();
    println!("\n{} checks, {failed} failed", rows.iter().filter(|row| row.bound.is_some()).count());
    if failed > 0 {
        return Err(Error::value("failed checks", 0, failed));
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
