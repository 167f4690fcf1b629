//! A Python with pip, which fetches packages and unpacks them. Nothing is installed into it.

use std::path::Path;
use std::process::{Command, Stdio};

use super::wheels::{self, Wheel};
use crate::failure::{Failure, Result};
use crate::process;

/// Where a Python is looked for, in order.
const CANDIDATES: [&str; 3] = ["python3", "python", "/usr/bin/python3"];

/// Prints three lines: the version of Python, that of pip, and the C library.
const PROBE: &str = "\
import os, sys
print('%d.%d' % sys.version_info[:2])
import pip
print(pip.__version__)
try: print(os.confstr('CS_GNU_LIBC_VERSION'))
except (AttributeError, OSError, ValueError): print('another C library than glibc')";

/// The oldest pip that takes several `--platform`s.
const OLDEST_PIP: Version = (20, 3);
/// The oldest glibc that LibTorch runs with (manylinux_2_28).
const OLDEST_GLIBC: Version = (2, 28);

type Version = (u32, u32);

/// A Python that has been asked what it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Python {
    program: String,
    version: Version,
    pip: String,
    /// The C library, as it names itself.
    libc: String,
}

impl Python {
    /// The first Python 3 on this machine that has a pip that will do.
    pub fn find() -> Result<Self> {
        let mut tried = Vec::new();
        for candidate in CANDIDATES {
            match Self::probe(candidate) {
                Ok(python) => return Ok(python),
                Err(reason) => tried.push(format!("  {candidate}: {reason}")),
            }
        }
        Err(Failure::NoPython { tried: tried.join("\n") })
    }

    fn probe(program: &str) -> Result<Self, String> {
        let output = Command::new(program)
            .args(["-c", PROBE])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("could not be started ({error})"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            let reason = text(&output.stderr);
            let last = reason.lines().last().unwrap_or("said nothing");
            return Err(format!("{last} ({})", output.status));
        }
        Self::understand(program, &text(&output.stdout))
    }

    fn understand(program: &str, answer: &str) -> Result<Self, String> {
        let lines = answer.lines().collect::<Vec<_>>();
        let [python, pip, libc] = lines[..] else { return Err(format!("answered {answer:?}")) };
        let version = version(python).ok_or_else(|| format!("is of version {python:?}"))?;
        if version.0 != 3 {
            return Err(format!("expected Python 3, found {python}"));
        }
        if self::version(pip).is_none_or(|found| found < OLDEST_PIP) {
            return Err(format!(
                "expected pip {}.{} or newer, found {pip} ({program} -m pip install --upgrade pip)",
                OLDEST_PIP.0, OLDEST_PIP.1
            ));
        }
        Ok(Self { program: program.to_owned(), version, pip: pip.to_owned(), libc: libc.to_owned() })
    }

    /// `python3 (3.11, pip 23.2.1)`.
    pub fn named(&self) -> String {
        format!("{} ({}.{}, pip {})", self.program, self.version.0, self.version.1, self.pip)
    }

    /// The minor version for which to take LibTorch's package: this Python's own, or the newest where there is none.
    pub fn minor_for_libtorch(&self) -> u32 {
        let known = wheels::python_versions();
        let newest = known.last().copied().unwrap_or(self.version.1);
        if known.contains(&self.version.1) { self.version.1 } else { newest }
    }

    /// Refuses a C library that LibTorch does not run with.
    pub fn demand_glibc(&self) -> Result<()> {
        let found = self.libc.strip_prefix("glibc ").and_then(version);
        if found.is_some_and(|found| found >= OLDEST_GLIBC) {
            Ok(())
        } else {
            Err(Failure::Platform { found: self.libc.clone() })
        }
    }

    /// Fetches these files into `folder`. pip shows its progress.
    ///
    /// `pip download`, since installing is what "externally managed" Pythons refuse, and pip's own folders for
    /// temporary files are at times small.
    pub fn download(&self, wheels: &[Wheel], folder: &Path, temporary: &Path) -> Result<()> {
        process::run(&mut self.download_command(wheels, folder, temporary))
    }

    fn download_command(&self, wheels: &[Wheel], folder: &Path, temporary: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]);
        let mut platforms: Vec<_> = wheels.iter().flat_map(Wheel::platforms).collect();
        platforms.sort_unstable();
        platforms.dedup();
        if !platforms.is_empty() {
            let minor = self.minor_for_libtorch();
            command.arg(format!("--python-version=3.{minor}"));
            command.args(["--implementation=cp".to_owned(), format!("--abi=cp3{minor}")]);
            command.args(platforms.iter().map(|platform| format!("--platform={platform}")));
        }
        command.arg("--dest").arg(folder);
        command.args(wheels.iter().map(Wheel::requirement));
        command
            .env("TMPDIR", temporary)
            .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
            .env("PIP_NO_INPUT", "1")
            .env("PIP_REQUIRE_VIRTUALENV", "0");
        command
    }

    /// Unpacks a wheel, which is a zip file, into `folder`.
    pub fn unpack(&self, wheel: &Path, folder: &Path) -> Result<()> {
        let mut command = Command::new(&self.program);
        process::run(command.args(["-m", "zipfile", "-e"]).arg(wheel).arg(folder))
    }
}

/// The first two numbers of a version.
fn version(text: &str) -> Option<Version> {
    let mut numbers = text.trim().split('.').map(|part| {
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..digits].parse().ok()
    });
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python(minor: u32, libc: &str) -> Python {
        Python::understand("python3", &format!("3.{minor}\n23.2.1\n{libc}\n")).unwrap()
    }

    #[test]
    fn answers_are_understood() {
        let found = python(11, "glibc 2.36");
        assert_eq!(found.named(), "python3 (3.11, pip 23.2.1)");
        for (answer, reason) in [
            ("2.7\n20.3.4\nglibc 2.36\n", "expected Python 3, found 2.7"),
            ("3.8\n20.0.2\nglibc 2.31\n", "expected pip 20.3 or newer, found 20.0.2"),
            ("3.8\n", "answered"),
            ("", "answered"),
            ("three\n23.0\nglibc 2.36\n", "is of version"),
        ] {
            let found = Python::understand("python3", answer).unwrap_err();
            assert!(found.contains(reason), "{answer:?}: {found}");
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("26.0.dev1"), Some((26, 0)));
        assert_eq!(version("20.3rc1"), Some((20, 3)));
        assert_eq!(version("9"), None);
        assert!(version("20.10") > version("20.3"));
    }

    #[test]
    fn another_python_takes_the_newest_package() {
        assert_eq!(python(12, "glibc 2.36").minor_for_libtorch(), 12);
        assert_eq!(python(9, "glibc 2.36").minor_for_libtorch(), 14);
        assert_eq!(python(15, "glibc 2.36").minor_for_libtorch(), 14);
    }

    #[test]
    fn an_old_or_another_c_library_is_refused() {
        assert!(python(12, "glibc 2.28").demand_glibc().is_ok());
        for libc in ["glibc 2.17", "another C library than glibc"] {
            let failure = python(12, libc).demand_glibc().unwrap_err().to_string();
            assert!(failure.contains(libc) && failure.contains("LIBTORCH"), "{failure}");
        }
    }

    #[test]
    fn a_program_that_is_no_python_is_told_apart() {
        let reason = Python::probe("/no/such/python").unwrap_err();
        assert!(reason.contains("could not be started"), "{reason}");
        let reason = Python::probe("false").unwrap_err();
        assert!(reason.contains("said nothing (exit status: 1)"), "{reason}");
    }

    #[test]
    fn the_platforms_are_those_of_the_files() {
        let python = python(12, "glibc 2.36");
        let shown = |wheels: &[Wheel]| {
            process::shown(&python.download_command(wheels, Path::new("/into"), Path::new("/tmp")))
        };
        let libtorch = wheels::libtorch(wheels::Compute::Cpu, 12, "x86_64").unwrap();
        let text = shown(&libtorch);
        for part in [
            "--no-deps",
            "--python-version=3.12",
            "--abi=cp312",
            "--platform=manylinux_2_28_x86_64",
            "--platform=manylinux2014_x86_64",
            "--dest /into",
            "torch==2.11.0",
            "nvidia-cuda-runtime==13.0.96",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!shown(&wheels::model()).contains("--platform"));
    }
}
