//! Errors: what was expected, what was found.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// The result of everything fallible in the controlgen crates.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with enough to act on.
///
/// Shapes are written as `[2, 3]`; ranges as `0 ..= 1` or `> 0`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// LibTorch refused an operation. The C++ stack trace that it appends is cut off.
    #[error("LibTorch: {message}")]
    Torch {
        /// The first lines of LibTorch's message.
        message: String,
    },
    /// A tensor of the wrong shape.
    #[error("{what}: expected shape {expected}, found {found}")]
    Shape {
        /// Which tensor.
        what: String,
        /// The shape it should have.
        expected: String,
        /// The shape it has.
        found: String,
    },
    /// A tensor of the wrong element type.
    #[error("{what}: expected element type {expected}, found {found}")]
    Kind {
        /// Which tensor.
        what: String,
        /// The element type, or types, that it may have.
        expected: String,
        /// The element type it has.
        found: String,
    },
    /// An argument outside its range.
    #[error("{what}: expected {expected}, found {found}")]
    Value {
        /// Which argument.
        what: String,
        /// The values it may take.
        expected: String,
        /// The value it had.
        found: String,
    },
    /// A field of a configuration file that is missing or makes no sense.
    #[error("{file}: field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The file, or what stands for it.
        file: String,
        /// The field, with its path if nested.
        field: String,
        /// The values it may take.
        expected: String,
        /// The value it had.
        found: String,
    },
    /// The operating system refused to read or write a file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not what its format demands.
    #[error("{path}: {problem}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and found, and where.
        problem: String,
    },
    /// A checkpoint whose tensors are not those of the model.
    #[error("{what}: {}", list_keys(missing, unexpected))]
    Keys {
        /// The checkpoint.
        what: String,
        /// Names that the model needs and the checkpoint lacks.
        missing: Vec<String>,
        /// Names that the checkpoint has and the model does not know.
        unexpected: Vec<String>,
    },
    /// A control that names a site which the model does not have.
    #[error("no {kind} site matches `{selector}`{}", list_near(near))]
    NoSite {
        /// What was asked for.
        selector: String,
        /// The kind of site asked for.
        kind: &'static str,
        /// Names that the model has and that look alike, nearest first.
        near: Vec<String>,
    },
    /// Controls that were bound to another model.
    #[error("these controls were bound to another model: bind them to the sites of the model they run with")]
    ForeignSites,
    /// A state that was made by something else than what it is given to.
    #[error("a state of another kind was given: expected {expected}")]
    ForeignState {
        /// The state that was expected.
        expected: &'static str,
    },
    /// A gradient was asked for, of a value that does not depend on the input.
    #[error("{what} does not depend on the point its gradient was asked at")]
    NotDifferentiable {
        /// What was to be differentiated.
        what: String,
    },
    /// A NaN or an infinity where a number is needed.
    #[error("{what}: {found} at {at}")]
    NotFinite {
        /// Which tensor.
        what: String,
        /// Where: a row, a step, a position.
        at: String,
        /// `NaN` or `infinity`; of a gradient also its norm.
        found: String,
    },
    /// More positions than the model has.
    #[error("the model's context holds {limit} positions, {needed} are needed")]
    Context {
        /// How many positions there are.
        limit: i64,
        /// How many were asked for.
        needed: i64,
    },
    /// Controls left no token that may follow.
    #[error("row {row}, step {step}: every token is banned; the controls contradict each other")]
    AllBanned {
        /// The batch row.
        row: usize,
        /// The step, counted in new tokens from 0.
        step: usize,
    },
    /// Weighted samples that all have weight 0, so that nothing can be drawn of them.
    #[error(
        "prompt {prompt}: each of the {particles} particles has weight 0 at step {step}; \
         use more of them, or weaker constraints or energies"
    )]
    NoParticles {
        /// Index of the prompt.
        prompt: usize,
        /// How many there were.
        particles: usize,
        /// The step, counted in new tokens from 0.
        step: usize,
    },
    /// A text that is not whole.
    #[error("{what} is not whole: {reason}; so far it is {text:?}")]
    Incomplete {
        /// What it should be.
        what: String,
        /// What cut it off.
        reason: String,
        /// The text that there is.
        text: String,
    },
    /// A device that is not there.
    #[error("device `{wanted}` is not available: {reason}")]
    Device {
        /// The device asked for.
        wanted: String,
        /// Why it cannot be had.
        reason: String,
    },
    /// A chat template that does not compile, fails while it renders, or refuses the messages.
    #[error("chat template `{template}`{}: {problem}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Template {
        /// The template's name.
        template: String,
        /// The line of the template, counted from 1, where it is known.
        line: Option<usize>,
        /// What was expected and found, or the template's own message.
        problem: String,
    },
    /// A hub that did not give what was asked of it.
    #[error("{what}: {reason}")]
    Remote {
        /// What was asked for: a repository, a revision, a file, with the hub's address.
        what: String,
        /// Why it was not had.
        reason: RemoteError,
    },
    /// Something that this implementation does not do.
    #[error("{what} is not supported; supported: {supported}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What can be had instead.
        supported: String,
    },
}

/// Why a hub did not give what was asked of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// There is no such repository, revision or file (HTTP 404).
    #[error("not found (HTTP 404): {0}")]
    NotFound(String),
    /// The hub wants a token, or the token given may not read this (HTTP 401 or 403).
    #[error("access denied (HTTP {status}): {message}")]
    Denied {
        /// The HTTP status.
        status: u16,
        /// The hub's words.
        message: String,
    },
    /// Any other HTTP status that is not a success.
    #[error("HTTP status {status}: {message}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// The hub's words.
        message: String,
    },
    /// No connection, a connection that broke off, or too slow an answer.
    #[error("network: {0}")]
    Network(String),
    /// A file whose length is not the one announced.
    #[error("{found} bytes received where {expected} were announced")]
    Truncated {
        /// The length announced, in bytes.
        expected: u64,
        /// The length received, in bytes.
        found: u64,
    },
    /// An answer that does not follow the hub's protocol.
    #[error("an answer that does not follow the protocol: {0}")]
    Protocol(String),
}

impl Error {
    /// A tensor of the wrong shape.
    pub fn shape(what: impl Into<String>, expected: impl Display, found: &[i64]) -> Self {
        Self::Shape { what: what.into(), expected: expected.to_string(), found: format!("{found:?}") }
    }

    /// An argument outside its range.
    pub fn value(what: impl Into<String>, expected: impl Display, found: impl Display) -> Self {
        Self::Value { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// A configuration field that is missing or makes no sense.
    pub fn config(
        file: impl Into<String>,
        field: impl Into<String>,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self::Config {
            file: file.into(),
            field: field.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// A file that is not what its format demands.
    pub fn format(path: impl AsRef<Path>, problem: impl Display) -> Self {
        Self::Format { path: path.as_ref().to_owned(), problem: problem.to_string() }
    }

    /// A file that the operating system refused.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// Something that this implementation does not do.
    pub fn unsupported(what: impl Into<String>, supported: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), supported: supported.into() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        // LibTorch appends its C++ stack, thousands of characters of it.
        let text = match error {
            tch::TchError::Torch(text) => text,
            other => other.to_string(),
        };
        let end = text.find("\nException raised from").unwrap_or(text.len());
        Self::Torch { message: text[..end].trim().to_owned() }
    }
}

fn list_keys(missing: &[String], unexpected: &[String]) -> String {
    let list = |name: &str, keys: &[String]| {
        let shown = keys.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = keys.len().saturating_sub(8);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{} {name}: {shown}{rest}", keys.len())
    };
    match (missing.is_empty(), unexpected.is_empty()) {
        (false, true) => list("missing", missing),
        (true, _) => list("unexpected", unexpected),
        (false, false) => format!("{}; {}", list("missing", missing), list("unexpected", unexpected)),
    }
}

fn list_near(near: &[String]) -> String {
    if near.is_empty() { String::new() } else { format!("; near it are {}", near.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torch_errors_lose_their_stack() {
        let a = tch::Tensor::zeros([2], tch::kind::FLOAT_CPU);
        let b = tch::Tensor::zeros([3], tch::kind::FLOAT_CPU);
        let error: Error = a.f_add(&b).unwrap_err().into();
        let text = error.to_string();
        assert!(text.contains("must match the size"), "{text}");
        assert!(text.len() < 300, "{} characters", text.len());
    }

    #[test]
    fn keys_are_listed_and_cut() {
        let missing = (0..20).map(|i| format!("w{i}")).collect();
        let text =
            Error::Keys { what: "x.safetensors".into(), missing, unexpected: vec!["z".into()] }.to_string();
        assert!(text.contains("20 missing: w0") && text.contains("and 12 more"), "{text}");
        assert!(text.contains("1 unexpected: z"), "{text}");
    }
}
