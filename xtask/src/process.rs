//! Starting programs, and how times and sizes are written.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Failure, Result};

/// Cargo, in the root of the checkout.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root);
    command
}

/// Runs a program, whose output is shown, and demands that it succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let status =
        command.status().map_err(|error| failed(command, format!("could not be started: {error}")))?;
    if status.success() { Ok(()) } else { Err(failed(command, format!("ended with {status}"))) }
}

/// Runs a program that must succeed, and gives what it wrote to its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| failed(command, format!("could not be started: {error}")))?;
    if !output.status.success() {
        print!("{}", String::from_utf8_lossy(&output.stdout));
        return Err(failed(command, format!("ended with {}", output.status)));
    }
    String::from_utf8(output.stdout).map_err(|_| failed(command, "wrote something else than UTF-8"))
}

/// Builds one binary with this `cargo build` command, and says where it lies.
pub fn build_binary(command: &mut Command, name: &str) -> Result<PathBuf> {
    let messages = output(command.arg("--message-format=json-render-diagnostics"))?;
    executable(&messages, name).ok_or_else(|| failed(command, format!("built no binary called `{name}`")))
}

/// The path of binary `name`, from the messages of cargo, one JSON object a line.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let is_it = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
        message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
    })
}

/// A binary of ours as a user starts it: nothing in the environment that says where LibTorch lies.
pub fn started_directly(binary: &Path, root: &Path) -> Command {
    let mut command = Command::new(binary);
    command.current_dir(root);
    for name in ["LD_LIBRARY_PATH", "LIBTORCH", "LIBTORCH_LIB", "LIBTORCH_USE_PYTORCH"] {
        command.env_remove(name);
    }
    command
}

fn failed(command: &Command, outcome: impl Into<String>) -> Failure {
    Failure::Program { command: shown(command), outcome: outcome.into() }
}

/// A command as one would type it.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let quoted = |text: String| {
        if text.is_empty() || text.contains(|c: char| c.is_whitespace() || "\"'$;&|<>()*".contains(c)) {
            format!("'{}'", text.replace('\'', r"'\''"))
        } else {
            text
        }
    };
    let arguments = command.get_args().map(|argument| quoted(argument.to_string_lossy().into_owned()));
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// `12 ms`, `3.4 s`, `2 min 05 s`.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if duration < Duration::from_secs(1) {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 59.95 {
        format!("{seconds:.1} s")
    } else {
        let whole = seconds.round();
        format!("{} min {:02} s", (whole / 60.0).floor(), whole % 60.0)
    }
}

/// `530 MB`.
#[expect(clippy::cast_precision_loss, reason = "shown in whole megabytes")]
pub fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        for (milliseconds, expected) in [
            (0, "0 ms"),
            (12, "12 ms"),
            (1_000, "1.0 s"),
            (3_449, "3.4 s"),
            (59_949, "59.9 s"),
            (59_960, "1 min 00 s"),
            (125_400, "2 min 05 s"),
        ] {
            assert_eq!(time(Duration::from_millis(milliseconds)), expected);
        }
    }

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("/usr/bin/cargo");
        command.args(["test", "--features", "a b", "it's", ""]);
        assert_eq!(shown(&command), r"cargo test --features 'a b' 'it'\''s' ''");
    }

    #[test]
    fn programs_that_fail_are_named() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "`sh -c 'exit 3'` ended with exit status: 3");
        let error = run(&mut Command::new("/no/such/program")).unwrap_err().to_string();
        assert!(error.starts_with("`program` could not be started"), "{error}");
    }

    #[test]
    fn the_binary_is_found_in_the_messages_of_cargo() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"demo"},"executable":null}"#,
            "\nnot JSON\n",
            r#"{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/t/other"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"demo"},"executable":"/t/demo"}"#,
            "\n",
        );
        assert_eq!(executable(messages, "demo"), Some(PathBuf::from("/t/demo")));
        assert_eq!(executable(messages, "absent"), None);
    }
}
