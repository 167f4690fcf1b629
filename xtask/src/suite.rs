//! `cargo xtask test`: every check and test, one step after the other.

mod metadata;
mod readme;
mod steps;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::arguments::{self, Arguments};
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;
use crate::setup;
use metadata::Workspace;
use steps::{STEPS, Step};

/// What the steps work on.
pub struct Suite {
    repository: Repository,
    workspace: Workspace,
    /// What `LIBTORCH` is for the programs we start.
    libtorch: PathBuf,
}

/// How a step ended that did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// It could not be run, for this reason, and the suite goes on.
    NotRun(String),
}

/// Which steps to run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Selection {
    only: Vec<String>,
    skip: Vec<String>,
    list: bool,
}

/// `cargo xtask test`.
pub fn command(arguments: Arguments) -> Result<()> {
    let selection = Selection::parse(arguments)?;
    if selection.list {
        for step in STEPS {
            println!("{:<12}{}", step.name, step.about);
        }
        return Ok(());
    }
    let chosen = selection.chosen();
    let begin = Instant::now();
    let mut table = Table::default();
    let result = run(&chosen, &selection, &mut table);
    table.print(begin.elapsed());
    result
}

fn run(chosen: &[&Step], selection: &Selection, table: &mut Table) -> Result<()> {
    let repository = Repository::find()?;
    let mut libtorch = setup::Ready::assumed(&repository)?.libtorch;
    let needs_setup = chosen.iter().any(|step| step.needs_setup);
    if needs_setup && !selection.skip.iter().any(|name| name == SETUP) {
        table.step(SETUP, "LibTorch and the model", || {
            libtorch = setup::ensure(&repository, &setup::Options::default())?.libtorch;
            Ok(Outcome::Passed)
        })?;
    }
    let workspace = Workspace::read(&repository)?;
    let suite = Suite { repository, workspace, libtorch };
    for step in chosen {
        table.step(step.name, step.about, || (step.run)(&suite))?;
    }
    Ok(())
}

/// The step before all others that need it.
const SETUP: &str = "setup";

impl Selection {
    fn parse(mut arguments: Arguments) -> Result<Self> {
        let mut selection = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--only" => selection.only.push(step_name(&arguments.value_of("--only")?)?),
                "--skip" => selection.skip.push(step_name(&arguments.value_of("--skip")?)?),
                "--list" => selection.list = true,
                other => {
                    return Err(arguments::unknown("test", other, "--only STEP, --skip STEP, --list"));
                }
            }
        }
        if !selection.list && selection.chosen().is_empty() && selection.only != [SETUP] {
            return Err(Failure::Usage("test: --only and --skip leave no step".into()));
        }
        Ok(selection)
    }

    fn chosen(&self) -> Vec<&'static Step> {
        let only = |step: &Step| self.only.is_empty() || self.only.iter().any(|name| name == step.name);
        let skip = |step: &Step| self.skip.iter().any(|name| name == step.name);
        STEPS.iter().filter(|step| only(step) && !skip(step)).collect()
    }
}

fn step_name(name: &str) -> Result<String> {
    if name == SETUP || STEPS.iter().any(|step| step.name == name) {
        return Ok(name.to_owned());
    }
    let known = STEPS.iter().map(|step| step.name).collect::<Vec<_>>().join(", ");
    Err(Failure::Usage(format!("test: unknown step `{name}`; known: {SETUP}, {known}")))
}

/// How each step ended, and how long it took.
#[derive(Debug, Default)]
struct Table(Vec<(&'static str, String, Duration)>);

impl Table {
    fn step(
        &mut self,
        name: &'static str,
        about: &str,
        work: impl FnOnce() -> Result<Outcome>,
    ) -> Result<()> {
        println!("\n=== {name}: {about}");
        // The programs that the step starts write to the same place.
        io::stdout()
            .flush()
            .map_err(|source| Failure::Io { doing: "writing to standard output".into(), source })?;
        let begin = Instant::now();
        let result = work();
        let took = begin.elapsed();
        let said = match &result {
            Ok(Outcome::Passed) => "passed".to_owned(),
            Ok(Outcome::NotRun(reason)) => format!("NOT RUN: {reason}"),
            Err(_) => "FAILED".to_owned(),
        };
        println!("=== {name}: {said} ({})", process::time(took));
        self.0.push((name, said, took));
        result.map(|_| ()).map_err(|failure| Failure::Step { step: name, source: Box::new(failure) })
    }

    fn print(&self, all: Duration) {
        println!();
        for (name, said, took) in &self.0 {
            println!("{name:<12}{:>14}  {said}", process::time(*took));
        }
        println!("{:<12}{:>14}", "all", process::time(all));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(arguments: &[&str]) -> Vec<&'static str> {
        Selection::parse(Arguments::of(arguments)).unwrap().chosen().iter().map(|step| step.name).collect()
    }

    #[test]
    fn steps_are_chosen_in_their_order() {
        assert_eq!(names(&[]).len(), STEPS.len());
        assert_eq!(names(&["--only", "clippy", "--only", "fmt"]), ["fmt", "clippy"]);
        assert!(!names(&["--skip", "demo"]).contains(&"demo"));
        assert!(names(&["--only", "setup"]).is_empty());
    }

    #[test]
    fn wrong_selections_are_refused() {
        for wrong in [
            &["--only"][..],
            &["--only", "lint"],
            &["--skip", "everything"],
            &["fmt"],
            &["--only", "fmt", "--skip", "fmt"],
        ] {
            let failure = Selection::parse(Arguments::of(wrong)).unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{wrong:?}: {failure}");
        }
    }

    #[test]
    fn names_of_steps_are_different() {
        let mut names = STEPS.iter().map(|step| step.name).chain([SETUP]).collect::<Vec<_>>();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STEPS.len() + 1);
    }

    #[test]
    fn a_failed_step_is_named_and_in_the_table() {
        let mut table = Table::default();
        table.step("fmt", "", || Ok(Outcome::Passed)).unwrap();
        let failure = table.step("clippy", "", || Err(Failure::Check("no".into()))).unwrap_err();
        assert_eq!(failure.to_string(), "step `clippy` failed: no");
        assert_eq!(failure.exit_code(), 1);
        let said = table.0.iter().map(|(name, said, _)| (*name, said.as_str())).collect::<Vec<_>>();
        assert_eq!(said, [("fmt", "passed"), ("clippy", "FAILED")]);
    }
}
