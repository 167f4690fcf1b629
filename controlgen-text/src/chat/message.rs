//! What a template is given: messages and options.

use controlgen_core::{Error, Result};
use minijinja::Value as Jinja;
use serde_json::{Map, Value};

use super::time::CivilTime;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message of a role (`system`, `user`, `assistant`, `tool`, or what the template knows), whose content is a
    /// text, a list of parts, or null.
    pub fn new(role: impl Into<String>, content: impl Into<Value>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), content.into());
        Self { fields }
    }

    /// A message of the system.
    pub fn system(content: impl Into<Value>) -> Self {
        Self::new("system", content)
    }

    /// A message of the user.
    pub fn user(content: impl Into<Value>) -> Self {
        Self::new("user", content)
    }

    /// A message of the assistant.
    pub fn assistant(content: impl Into<Value>) -> Self {
        Self::new("assistant", content)
    }

    /// Sets a further field, such as `tool_calls`, `name` or `reasoning_content`.
    #[must_use]
    pub fn with(mut self, field: impl Into<String>, value: impl Into<Value>) -> Self {
        self.fields.insert(field.into(), value.into());
        self
    }

    /// A message from JSON, as in transformers: an object with a `role`.
    ///
    /// # Errors
    /// [`Error::Value`] for anything else.
    pub fn from_json(message: Value) -> Result<Self> {
        match message {
            Value::Object(fields) if fields.get("role").is_some_and(Value::is_string) => Ok(Self { fields }),
            other => Err(Error::value("message", "an object with a `role`", brief(&other.to_string()))),
        }
    }

    /// The role.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content, where it is a text.
    pub fn text(&self) -> Option<&str> {
        self.fields.get("content").and_then(Value::as_str)
    }

    /// As templates see it: reasoning is there under each of the names that templates ask for, as in transformers.
    pub(super) fn to_jinja(&self) -> Jinja {
        let names = ["reasoning_content", "thinking", "reasoning"];
        let reasoning = names.iter().find_map(|name| self.fields.get(*name).filter(|value| !value.is_null()));
        let mut fields = self.fields.clone();
        if let Some(reasoning) = reasoning {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning.clone());
        }
        jinja(&fields)
    }
}

/// What a template is told beside the messages.
///
/// ```
/// # use controlgen_text::chat::ChatOptions;
/// let options = ChatOptions::new().generation_prompt(true).set("enable_thinking", false);
/// ```
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    pub(super) generation_prompt: bool,
    pub(super) tools: Option<Vec<Value>>,
    pub(super) documents: Option<Vec<Value>>,
    pub(super) template: Option<String>,
    pub(super) now: Option<CivilTime>,
    pub(super) variables: Map<String, Value>,
}

impl ChatOptions {
    /// No generation prompt, no tools, no documents, no date.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the text ends with the opening of the assistant's answer.
    #[must_use]
    pub fn generation_prompt(mut self, add: bool) -> Self {
        self.generation_prompt = add;
        self
    }

    /// The tools that the model may call: JSON schemas, `{"type": "function", "function": {"name": …}}`.
    #[must_use]
    pub fn tools(mut self, tools: Vec<Value>) -> Self {
        self.tools = Some(tools);
        self
    }

    /// Documents to answer from, `{"title": …, "text": …}`.
    #[must_use]
    pub fn documents(mut self, documents: Vec<Value>) -> Self {
        self.documents = Some(documents);
        self
    }

    /// The template to use, by name, where there are several. Unless told, it is `tool_use` where that exists and
    /// tools are given, else `default`.
    #[must_use]
    pub fn template(mut self, name: impl Into<String>) -> Self {
        self.template = Some(name.into());
        self
    }

    /// The date and time that templates may write (`strftime_now`). Without one, that function is undefined: templates
    /// which test for it then write a date of their own, others fail.
    #[must_use]
    pub fn now(mut self, now: CivilTime) -> Self {
        self.now = Some(now);
        self
    }

    /// Sets a variable of the template; it takes precedence over a special token of the same name.
    #[must_use]
    pub fn set(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }
}

pub(super) fn jinja(value: &impl serde::Serialize) -> Jinja {
    Jinja::from(minijinja::value::Serde(value))
}

/// The beginning of a text, for an error.
fn brief(text: &str) -> String {
    let mut brief: String = text.chars().take(80).collect();
    if brief.len() < text.len() {
        brief.push('…');
    }
    brief
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_from_json_need_a_role() {
        let message =
            Message::from_json(serde_json::json!({"role": "tool", "content": "42", "name": "f"})).unwrap();
        assert_eq!((message.role(), message.text()), ("tool", Some("42")));
        assert!(Message::from_json(serde_json::json!({"content": "42"})).is_err());
        assert!(Message::from_json(serde_json::json!(["role"])).is_err());
    }
}
