//! Runs that are killed at every phase, by the system, and resumed in a new process: to the bit those that are not.
#![cfg(unix)]

use std::path::Path;
use std::process::{Command, Output};

use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::train::{Checkpoint, StepReport};
use controlgen_core::{Error, checkpoint::Safetensors};

use crate::toy::{STEPS, Toy, config, trainer};

const DIRECTORY: &str = "CONTROLGEN_TRAIN_DIRECTORY";
const KIND: &str = "CONTROLGEN_TRAIN_OPTIMIZER";
const DIE: &str = "CONTROLGEN_TRAIN_DIE";

/// The process that is killed: it resumes what there is and runs on, until the phase at which it shall die.
#[test]
#[ignore = "the other tests here start it as a process of its own"]
fn child() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let (directory, kind, die) = (variable(DIRECTORY), variable(KIND), variable(DIE));
    let (phase, at) = die.split_once(' ').unwrap_or((&die, "0"));
    let at: u64 = at.parse().unwrap();
    let mut toy = Toy::new();
    match phase {
        "accumulation" => {
            toy.before_loss = Box::new(move |step, before| {
                if step == at && before == 2 {
                    std::process::abort();
                }
            });
        }
        "evaluation" => {
            let mut left = at;
            toy.before_evaluation = Box::new(move || {
                left -= 1;
                if left == 0 {
                    std::process::abort();
                }
            });
        }
        _ => {}
    }
    let mut config = config(Path::new(&directory));
    if phase == "last" {
        // The first checkpoint that it writes is then the last, and not the best.
        config.best = None;
    }
    let mut trainer = trainer(&toy, &kind, config);
    trainer.resume(&toy).unwrap();
    let mut watch = |report: &StepReport| {
        if phase == "step" && report.step == at {
            std::process::abort();
        }
        Flow::Continue
    };
    match trainer.run(&mut toy, &mut watch, &CancelToken::new()) {
        Ok(summary) => assert!(summary.finished),
        Err(Error::Io { path, .. }) => println!("refused: {}", path.display()),
        Err(error) => panic!("{error}"),
    }
}

/// Runs the child. `shell` comes before it in the shell that becomes it.
fn run(directory: &Path, kind: &str, die: &str, shell: &str) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("{shell} exec \"$0\" --ignored --exact interrupted::child --nocapture"))
        .arg(std::env::current_exe().unwrap())
        .env(DIRECTORY, directory)
        .env(KIND, kind)
        .env(DIE, die)
        .output()
        .unwrap()
}

/// The files of a run, which must be those of another: parameters, optimizer, averages, counts, tables.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

fn same(a: &Path, b: &Path, what: &str) {
    let (a, b) = (files(a), files(b));
    let names = |of: &[(String, Vec<u8>)]| of.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), ["best.safetensors", "evaluation.csv", "last.safetensors", "train.csv"], "{what}");
    assert_eq!(names(&a), names(&b), "{what}");
    for ((name, a), (_, b)) in a.iter().zip(&b) {
        assert!(a == b, "{what}: {name} differs");
    }
}

fn killed(output: &Output) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&output.status)
}

const ABORTED: Option<i32> = Some(6);
const FILE_TOO_LARGE: Option<i32> = Some(25);

fn interrupted_at_every_phase(kind: &str) {
    let whole = tempfile::tempdir().unwrap();
    let output = run(whole.path(), kind, "never", "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(Checkpoint::open(whole.path().join("last.safetensors")).unwrap().step(), STEPS);

    // Each in one run of its own: before the first checkpoint, after one, right after one.
    let parts = tempfile::tempdir().unwrap();
    for die in ["step 2", "accumulation 8", "evaluation 2", "step 14", "accumulation 15", "step 23"] {
        let output = run(parts.path(), kind, die, "");
        assert_eq!(killed(&output), ABORTED, "{kind}, {die}: {}", String::from_utf8_lossy(&output.stdout));
    }
    assert!(run(parts.path(), kind, "never", "").status.success());
    same(whole.path(), parts.path(), kind);

    // While a checkpoint is being written: the system kills whoever writes a file of more than 4 or 8 kB.
    for name in ["best", "last"] {
        let parts = tempfile::tempdir().unwrap();
        assert_eq!(killed(&run(parts.path(), kind, "step 11", "")), ABORTED);
        let before = std::fs::read(parts.path().join("last.safetensors")).unwrap();
        assert!(before.len() > 20_000);
        let output = run(parts.path(), kind, name, "ulimit -c 0 && ulimit -f 8 &&");
        assert_eq!(killed(&output), FILE_TOO_LARGE, "{kind}: {}", String::from_utf8_lossy(&output.stdout));
        let left = |(found, bytes): &(String, Vec<u8>)| {
            found.starts_with(&format!(".{name}.safetensors.")) && !bytes.is_empty()
        };
        assert!(files(parts.path()).iter().any(left), "it was killed while it wrote");
        assert_eq!(std::fs::read(parts.path().join("last.safetensors")).unwrap(), before);
        assert!(run(parts.path(), kind, "never", "").status.success());
        same(whole.path(), parts.path(), kind);
    }
}

#[test]
fn adamw_is_resumed_to_the_bit() {
    interrupted_at_every_phase("AdamW");
}

#[test]
fn sgd_is_resumed_to_the_bit() {
    interrupted_at_every_phase("SGD");
}

#[test]
fn adafactor_is_resumed_to_the_bit() {
    interrupted_at_every_phase("Adafactor");
}

/// A limit on the size of files, with its signal ignored, refuses a write as a full disk does: after some of it.
#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(run(whole.path(), "AdamW", "never", "").status.success());
    assert_eq!(killed(&run(parts.path(), "AdamW", "step 11", "")), ABORTED);
    let path = parts.path().join("last.safetensors");
    let before = std::fs::read(&path).unwrap();
    let output = run(parts.path(), "AdamW", "last", "trap '' XFSZ; ulimit -f 8 &&");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("refused: ") && said.contains("last.safetensors"),
        "{said}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(Safetensors::open(&path).is_ok());
    assert!(files(parts.path()).iter().all(|(name, _)| !name.ends_with(".tmp")), "it tidies up");
    assert!(run(parts.path(), "AdamW", "never", "").status.success());
    same(whole.path(), parts.path(), "a full disk");
}
