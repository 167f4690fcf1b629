//! `cargo xtask demo`, and what the test suite demands of its output.

use std::path::Path;

use serde_json::Value;

use crate::arguments::Arguments;
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;
use crate::setup;

/// `cargo xtask demo`.
pub fn command(arguments: Arguments) -> Result<()> {
    let repository = Repository::find()?;
    let ready = setup::ensure(&repository, &setup::Options::default())?;
    let mut command = process::cargo(repository.root());
    command.args(["run", "-p", "benches", "--bin", "demo", "--"]).args(arguments.rest());
    process::run(command.env("LIBTORCH", &ready.libtorch))?;
    let mut images = process::cargo(repository.root());
    images.args(["run", "-p", "benches", "--bin", "shapes", "--", "demo", "--out", SHEET]);
    process::run(images.env("LIBTORCH", &ready.libtorch))
}

/// The images of the demo, below the repository's root; git ignores its folder.
const SHEET: &str = ".controlgen/demo.png";

/// Makes the demo's images as a user would, which fails where they do not show what was asked for.
pub fn check_images(repository: &Repository, binary: &Path) -> Result<()> {
    let sheet = repository.root().join(SHEET);
    let _ = std::fs::remove_file(&sheet);
    let mut command = process::started_directly(binary, repository.root());
    print!("{}", process::output(command.args(["demo", "--out", SHEET]))?);
    if sheet.is_file() { Ok(()) } else { Err(Failure::Check(format!("no {SHEET}"))) }
}

/// Runs the demo as a user would start it, and checks what it says.
pub fn check(repository: &Repository, binary: &Path) -> Result<()> {
    let mut command = process::started_directly(binary, repository.root());
    println!("$ {} --json", binary.display());
    let output = process::output(command.arg("--json"))?;
    print!("{output}");
    let problems = problems(&output);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Failure::Check(format!("the output of the demo:\n  {}", problems.join("\n  "))))
    }
}

/// The least number of different controls that the demo is to show.
const CONTROLS: usize = 3;

/// What is wrong with the output of `demo --json`: one JSON object a line for each control,
///
/// ```json
/// {"control": "banned words", "prompt": "…", "uncontrolled": "…", "controlled": "…",
///  "tokens": 48, "tokens_per_second": 31.5, "checks": [{"what": "no banned word occurs", "holds": true}]}
/// ```
///
/// `tokens` and `tokens_per_second` are those of the controlled text; `checks` says what the control promises, and
/// whether the controlled text keeps to it.
fn problems(output: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut names = Vec::new();
    for (index, line) in output.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = format!("line {}", index + 1);
        match serde_json::from_str::<Value>(line) {
            Ok(record) => {
                let name = record["control"].as_str().unwrap_or_default().to_owned();
                problems
                    .extend(problems_of(&record).into_iter().map(|what| format!("{at} ({name}): {what}")));
                names.push(name);
            }
            Err(error) => problems.push(format!("{at}: expected a JSON object, found {line:?} ({error})")),
        }
    }
    names.sort();
    names.dedup();
    if names.len() < CONTROLS {
        problems.push(format!("expected at least {CONTROLS} controls, found {}", names.len()));
    }
    problems
}

fn problems_of(record: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    // Without a control the model may end at once; that can be what a control is there for.
    for (field, may_be_empty) in
        [("control", false), ("prompt", false), ("uncontrolled", true), ("controlled", false)]
    {
        if record[field].as_str().is_none_or(|text| text.trim().is_empty() && !may_be_empty) {
            problems.push(format!("`{field}`: expected a text, found {}", record[field]));
        }
    }
    if record["controlled"] == record["uncontrolled"] {
        problems.push("the controlled text is the uncontrolled one".into());
    }
    for field in ["tokens", "tokens_per_second"] {
        if record[field].as_f64().is_none_or(|number| number <= 0.0) {
            problems.push(format!("`{field}`: expected a number above 0, found {}", record[field]));
        }
    }
    match record["checks"].as_array() {
        Some(checks) if !checks.is_empty() => {
            problems.extend(checks.iter().filter(|check| check["holds"] != true).map(|check| {
                let text = &record["controlled"];
                format!("does not hold: {}; the controlled text is {text}", check["what"])
            }));
        }
        _ => problems.push(format!("`checks`: expected one or more, found {}", record["checks"])),
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(name: &str) -> Value {
        json!({
            "control": name, "prompt": "Say it.", "uncontrolled": "It is so.", "controlled": "So it is.",
            "tokens": 4, "tokens_per_second": 30.5, "checks": [{"what": "it is short", "holds": true}],
        })
    }

    fn output(records: &[Value]) -> String {
        records.iter().map(|record| format!("{record}\n")).collect()
    }

    #[test]
    fn a_good_output_has_no_problems() {
        assert_eq!(problems(&output(&["a", "b", "c"].map(record))), Vec::<String>::new());
    }

    #[test]
    fn every_fault_is_noticed() {
        let faults = [
            ("uncontrolled", json!("So it is."), "the controlled text is the uncontrolled one"),
            ("controlled", json!(" "), "`controlled`: expected a text"),
            ("prompt", json!(null), "`prompt`: expected a text"),
            ("uncontrolled", json!(null), "`uncontrolled`: expected a text"),
            ("tokens", json!(0), "`tokens`: expected a number above 0"),
            ("tokens_per_second", json!(null), "`tokens_per_second`"),
            ("checks", json!([]), "`checks`: expected one or more"),
            ("checks", json!([{"what": "it is short", "holds": false}]), "does not hold: \"it is short\""),
            ("checks", json!([{"what": "it is short"}]), "does not hold"),
        ];
        for (field, value, expected) in faults {
            let mut records = ["a", "b", "c"].map(record);
            records[1][field] = value;
            let found = problems(&output(&records));
            assert!(matches!(&found[..], [one] if one.contains(expected)), "{field}: {found:?}");
            assert!(found[0].starts_with("line 2 (b)"), "{found:?}");
        }
    }

    #[test]
    fn too_few_controls_and_other_output_are_noticed() {
        let found = problems(&output(&["a", "b", "b"].map(record)));
        assert_eq!(found, ["expected at least 3 controls, found 2"]);
        assert_eq!(problems("").len(), 1);
        let found = problems(&format!("{}loading\n", output(&["a", "b", "c"].map(record))));
        assert!(found[0].starts_with("line 4: expected a JSON object"), "{found:?}");
    }
}
