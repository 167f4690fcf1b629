//! hf-hub's errors as ours.

use std::path::PathBuf;

use controlgen_core::{Error, RemoteError};
use hf_hub::HFError;

/// Our error for one of hf-hub's.
pub(super) fn explain(what: &str, error: HFError) -> Error {
    let with_sources = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let inner_text = inner.to_string();
            if !text.contains(&inner_text) {
                text = format!("{text}: {inner_text}");
            }
            source = inner.source();
        }
        text
    };
    // The type of the context has no public name.
    macro_rules! said {
        ($context:expr) => {{
            let message = $context.server_message.clone().unwrap_or_default();
            ($context.status.as_u16(), if message.is_empty() { $context.url.clone() } else { message })
        }};
    }
    let reason = match error {
        HFError::RepoNotFound { context, .. }
        | HFError::RevisionNotFound { context, .. }
        | HFError::EntryNotFound { context, .. } => {
            RemoteError::NotFound(context.map_or_else(String::new, |context| said!(context).1))
        }
        HFError::AuthRequired { context } | HFError::Forbidden { context } => {
            let (status, message) = said!(context);
            RemoteError::Denied { status, message }
        }
        HFError::Http { context } | HFError::RateLimited { context, .. } | HFError::Conflict { context } => {
            match said!(context) {
                (404, message) => RemoteError::NotFound(message),
                (status, message) => RemoteError::Status { status, message },
            }
        }
        HFError::Io(source) => return Error::Io { path: PathBuf::from(what), source },
        HFError::Url(source) => {
            return Error::value("endpoint", "an address such as https://huggingface.co", source);
        }
        HFError::InvalidParameter(problem) => return Error::value(what, "a valid request", problem),
        HFError::Request { ref source, .. } => RemoteError::Network(with_sources(source)),
        other => RemoteError::Protocol(with_sources(&other)),
    };
    Error::Remote { what: what.to_owned(), reason }
}
