//! What can go wrong.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

pub type Result<T, E = Failure> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    /// A program could not be started, or ended badly.
    #[error("`{command}` {outcome}")]
    Program { command: String, outcome: String },
    /// No Python that can fetch packages.
    #[error(
        "Python 3 with pip is needed to fetch LibTorch and the model; tried:\n{tried}\n\
         Install it (Debian, Ubuntu: apt install python3-pip; Fedora: dnf install python3-pip; Arch: pacman -S \
         python-pip; elsewhere: python3 -m ensurepip), then run this again."
    )]
    NoPython { tried: String },
    /// Nothing is known about this kind of machine.
    #[error(
        "LibTorch can be fetched for Linux with glibc 2.28 or newer on x86_64 and aarch64, this is {found}. Export \
         LIBTORCH with the folder of a LibTorch 2.11.0 (https://pytorch.org/get-started/locally/), then run this again."
    )]
    Platform { found: String },
    /// A file whose checksum is not the pinned one.
    #[error(
        "{}: expected SHA-256 {expected}, found {found}. The file was damaged on its way, or is not what it claims to \
         be; it has been deleted. Run this again; if it happens again, try `python3 -m pip cache purge`.",
        file.display()
    )]
    Damaged { file: PathBuf, expected: String, found: String },
    /// A check of ours that does not hold.
    #[error("{0}")]
    Check(String),
    /// A step of the test suite.
    #[error("step `{step}` failed: {source}")]
    Step { step: &'static str, source: Box<Failure> },
}

impl Failure {
    /// The operating system refused while we were `doing` something with `path`.
    pub fn io(doing: impl Display, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { doing: format!("{doing} {}", path.as_ref().display()), source }
    }

    /// 2 for a wrong command line, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Usage(_)) { 2 } else { 1 }
    }
}
