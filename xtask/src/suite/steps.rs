//! The steps.
//!
//! Every step builds in the dev profile, since compiling LibTorch's bindings takes minutes; and those that make
//! programs do so with the features of a plain `cargo test`, which therefore finds everything compiled afterwards.

use std::fs;
use std::process::{Command, Stdio};

use super::{Outcome, Suite, readme};
use crate::demo;
use crate::failure::{Failure, Result};
use crate::process;

/// A step of the suite.
pub struct Step {
    pub name: &'static str,
    pub about: &'static str,
    /// Does it need LibTorch or the model?
    pub needs_setup: bool,
    pub run: fn(&Suite) -> Result<Outcome>,
}

/// All steps, the quick ones first.
pub const STEPS: &[Step] = &[
    Step { name: "fmt", about: "the code is formatted", needs_setup: false, run: fmt },
    Step {
        name: "readme",
        about: "README's code is the downstream crate's",
        needs_setup: false,
        run: readme,
    },
    Step { name: "deny", about: "licences and sources of the dependencies", needs_setup: false, run: deny },
    Step { name: "package", about: "the published crates can be packaged", needs_setup: false, run: package },
    Step { name: "clippy", about: "no warnings", needs_setup: true, run: clippy },
    Step { name: "docs", about: "the documentation, no warnings", needs_setup: true, run: docs },
    Step { name: "tests", about: "unit and integration tests", needs_setup: true, run: tests },
    Step { name: "doctests", about: "the examples in the documentation", needs_setup: true, run: doctests },
    Step { name: "benches", about: "the benchmarks compile", needs_setup: true, run: benches },
    Step {
        name: "features",
        about: "tests of features that are off by default",
        needs_setup: true,
        run: features,
    },
    Step {
        name: "downstream",
        about: "a crate outside the workspace, and its tests",
        needs_setup: true,
        run: downstream,
    },
    Step { name: "demo", about: "text under controls, images of captions", needs_setup: true, run: demo },
    Step { name: "device", about: "the checks of a device, on the CPU", needs_setup: true, run: device },
    Step { name: "docs-rs", about: "the documentation without LibTorch", needs_setup: false, run: docs_rs },
];

/// The manifest of the crate outside the workspace.
const DOWNSTREAM: &str = "benches/downstream/Cargo.toml";

impl Suite {
    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = process::cargo(self.repository.root());
        command.args(arguments).env("LIBTORCH", &self.libtorch);
        command
    }

    /// Cargo over the whole workspace, with every feature that goes with LibTorch.
    fn all_features(&self, subcommand: &str, arguments: &[&str]) -> Command {
        let mut command = self.cargo(&[subcommand, "--workspace", "--features", &self.workspace.features()]);
        command.args(arguments);
        command
    }
}

/// Shows a command and runs it.
fn run(command: &mut Command) -> Result<Outcome> {
    println!("$ {}", process::shown(command));
    process::run(command)?;
    Ok(Outcome::Passed)
}

fn fmt(suite: &Suite) -> Result<Outcome> {
    run(&mut suite.cargo(&["fmt", "--all", "--check"]))?;
    run(&mut suite.cargo(&["fmt", "--manifest-path", DOWNSTREAM, "--check"]))
}

fn readme(suite: &Suite) -> Result<Outcome> {
    readme::check(suite.repository.root())?;
    Ok(Outcome::Passed)
}

fn deny(suite: &Suite) -> Result<Outcome> {
    let installed = suite
        .cargo(&["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !installed {
        return Ok(Outcome::NotRun("cargo-deny is not installed (cargo install --locked cargo-deny)".into()));
    }
    // Which crates are there twice is known (deny.toml); the list of them is long.
    run(&mut suite.cargo(&["deny", "--log-level", "error", "check", "bans", "licenses", "sources"]))
}

fn package(suite: &Suite) -> Result<Outcome> {
    // What the registry accepts, in bytes.
    const LARGEST: u64 = 10 * 1024 * 1024;
    let folder = suite.workspace.target.join("package");
    let mut command = suite.cargo(&["package", "--workspace", "--no-verify", "--allow-dirty"]);
    for name in suite.workspace.unpublished() {
        command.args(["--exclude", name]);
    }
    run(&mut command)?;
    for name in suite.workspace.published() {
        let path = folder.join(format!("{name}-{}.crate", env!("CARGO_PKG_VERSION")));
        let bytes = fs::metadata(&path).map_err(|error| Failure::io("reading", &path, error))?.len();
        if bytes > LARGEST {
            return Err(Failure::Check(format!(
                "{}: expected at most {LARGEST} bytes, found {bytes}",
                path.display()
            )));
        }
    }
    Ok(Outcome::Passed)
}

fn clippy(suite: &Suite) -> Result<Outcome> {
    run(&mut suite.all_features("clippy", &["--all-targets", "--", "-D", "warnings"]))
}

fn docs(suite: &Suite) -> Result<Outcome> {
    // The variable replaces `build.rustdocflags` of .cargo/config.toml, which is for doctests: nothing is linked here.
    run(suite.all_features("doc", &["--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn tests(suite: &Suite) -> Result<Outcome> {
    run(&mut suite.cargo(&["test", "--workspace", "--lib", "--bins", "--tests", "--examples"]))
}

fn doctests(suite: &Suite) -> Result<Outcome> {
    // With the variable set, doctests would lose the path to LibTorch that .cargo/config.toml gives them.
    run(suite.cargo(&["test", "--workspace", "--doc"]).env_remove("RUSTDOCFLAGS"))
}

fn benches(suite: &Suite) -> Result<Outcome> {
    run(&mut suite.cargo(&["test", "--workspace", "--benches", "--no-run"]))
}

fn features(suite: &Suite) -> Result<Outcome> {
    let (features, crates) = suite.workspace.features_left_out();
    if crates.is_empty() {
        return Ok(Outcome::NotRun("the tests turn on every feature".into()));
    }
    let mut command = suite.cargo(&["test", "--features", &features]);
    for name in crates {
        command.args(["--package", name]);
    }
    run(command.env_remove("RUSTDOCFLAGS"))
}

/// The crate is built as a stranger's would be, but with the workspace's versions and folder, so that LibTorch's
/// bindings are not compiled again.
fn downstream(suite: &Suite) -> Result<Outcome> {
    let root = suite.repository.root();
    let (from, to) = (root.join("Cargo.lock"), root.join(DOWNSTREAM).with_file_name("Cargo.lock"));
    fs::copy(&from, &to).map_err(|error| Failure::io("copying Cargo.lock to", &to, error))?;
    let mut command = suite.cargo(&["build", "--manifest-path", DOWNSTREAM]);
    command.env("CARGO_TARGET_DIR", &suite.workspace.target);
    println!("$ {}", process::shown(&command));
    let binary = process::build_binary(&mut command, "downstream")?;
    run(&mut process::started_directly(&binary, root))?;
    let mut command = suite.cargo(&["test", "--manifest-path", DOWNSTREAM, "--tests"]);
    run(command.env("CARGO_TARGET_DIR", &suite.workspace.target))
}

fn demo(suite: &Suite) -> Result<Outcome> {
    let mut command = suite.cargo(&["build", "-p", "benches", "--bin", "demo"]);
    println!("$ {}", process::shown(&command));
    let binary = process::build_binary(&mut command, "demo")?;
    demo::check(&suite.repository, &binary)?;
    let mut command = suite.cargo(&["build", "-p", "benches", "--bin", "shapes"]);
    println!("$ {}", process::shown(&command));
    demo::check_images(&suite.repository, &process::build_binary(&mut command, "shapes")?)?;
    Ok(Outcome::Passed)
}

fn device(suite: &Suite) -> Result<Outcome> {
    let mut command = suite.cargo(&["build", "-p", "benches", "--bin", "device-suite"]);
    println!("$ {}", process::shown(&command));
    let binary = process::build_binary(&mut command, "device-suite")?;
    run(process::started_directly(&binary, suite.repository.root()).args(["--device", "cpu"]))
}

/// As docs.rs does it, and with a LibTorch that is not there, to show that none is needed. Cargo keeps what it compiles
/// with the feature apart, so the bindings that the other steps use stay; all else is what clippy has checked.
fn docs_rs(suite: &Suite) -> Result<Outcome> {
    let features = suite.workspace.docs_rs_features();
    let mut command = suite.cargo(&["doc", "--no-deps", "--features", &features]);
    for name in suite.workspace.published() {
        command.args(["--package", name]);
    }
    command.env("RUSTDOCFLAGS", "-D warnings").env("LIBTORCH", suite.workspace.target.join("no-libtorch"));
    run(&mut command)
}
