//! Set-up and developer commands: `cargo xtask help`.

mod arguments;
mod demo;
mod device_suite;
mod failure;
mod process;
mod repository;
mod setup;
mod suite;

use std::process::ExitCode;

use arguments::Arguments;
use failure::{Failure, Result};

const HELP: &str = "\
Set-up and developer commands of controlgen.

cargo xtask setup [--cpu | --cuda] [--fetch-only] [--models] [--data]
    Gets LibTorch 2.11.0 and the model SmolLM2-135M-Instruct into the git-ignored folder .controlgen, and writes the
    model as a Hugging Face directory. Where LIBTORCH is exported and names LibTorch 2.11.0, that one is used. Does
    nothing the second time.
    --cpu         LibTorch without the CUDA libraries, even where there is an NVIDIA driver (remembered)
    --cuda        LibTorch with the CUDA libraries, even where there is none (remembered)
    --fetch-only  compile nothing: leave the Hugging Face directory out
    --models      the sentence encoder all-MiniLM-L6-v2 too (83 MB), which sentence-parity runs
    --data        33,530 movie reviews with labels too (13 MB), which the command `sentiment` trains classifiers on

cargo xtask demo [ARGUMENTS]
    Set-up, then text from the model under several controls, and a sheet of images of captions,
    .controlgen/demo.png. Arguments are passed on to the first part.

cargo xtask test [--only STEP]... [--skip STEP]... [--list]
    Set-up, then every check and test, stopping at the first that fails. --list names the steps.

cargo xtask device-suite
    Builds the checks of a device (parity, distributions, times) and packs them, so that they can be carried to a machine
    that has the device and Python's torch 2.11, but no cargo.

cargo xtask help
    This text.
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = Arguments::from_environment()?;
    let Some(command) = arguments.next() else {
        return Err(Failure::Usage(format!("expected a command\n\n{HELP}")));
    };
    match command.as_str() {
        "setup" => setup::command(arguments),
        "demo" => demo::command(arguments),
        "test" => suite::command(arguments),
        "device-suite" => device_suite::command(arguments),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            Ok(())
        }
        other => Err(Failure::Usage(format!("unknown command `{other}`\n\n{HELP}"))),
    }
}
