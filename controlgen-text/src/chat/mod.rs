//! Chat templates: messages to the prompt that a model was trained on.
//!
//! A template is a Jinja program that comes with the tokenizer. It is rendered as transformers renders it: the same
//! variables, functions and filters, white space trimmed alike, JSON written alike. Steps and memory are bounded by
//! minijinja's fuel. (One thing is not, in minijinja 3.1: lists joined by `+`, and the result again, more than 32
//! times over. Templates that mean harm should not be rendered.)

mod message;
mod python;
mod time;

use std::sync::Arc;

use controlgen_core::{Error, Result};
use message::jinja;
use minijinja::{Environment, ErrorKind, Value as Jinja, context, syntax::SyntaxConfig};

pub use message::{ChatOptions, Message};
pub use time::CivilTime;

/// How much a rendering may do: about as many steps, or as many times 64 bytes of text made on the way.
const FUEL: u64 = 2_000_000;

/// A compiled chat template, or several by name. A clone shares them. `Send` and `Sync`.
#[derive(Clone)]
pub struct ChatTemplate {
    templates: Arc<[Named]>,
    tokens: Arc<[(String, String)]>,
}

struct Named {
    name: String,
    environment: Environment<'static>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.names().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// A template without special tokens as variables.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not compile.
    pub fn new(template: &str) -> Result<Self> {
        let none: [(&str, &str); 0] = [];
        Self::with_templates([("default".to_owned(), template.to_owned())], none)
    }

    /// Templates by name, and special tokens by role (`("bos_token", "<s>")`), which become variables.
    /// [`Tokenizer::chat_template`](crate::tokenizer::Tokenizer::chat_template) gives both.
    ///
    /// # Errors
    /// [`Error::Template`] for one that does not compile.
    pub fn with_templates<'a>(
        templates: impl IntoIterator<Item = (String, String)>,
        tokens: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        let templates = templates
            .into_iter()
            .map(|(name, text)| {
                let environment = compile(&text).map_err(|error| explain(&name, &error))?;
                Ok(Named { name, environment })
            })
            .collect::<Result<_>>()?;
        let tokens = tokens.into_iter().map(|(role, token)| (role.to_owned(), token.to_owned())).collect();
        Ok(Self { templates, tokens })
    }

    /// The names of the templates.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.templates.iter().map(|named| named.name.as_str())
    }

    /// The text of a conversation. It holds its special tokens: encode it with
    /// [`Special::Keep`](crate::tokenizer::Special::Keep).
    ///
    /// # Errors
    /// [`Error::Template`] where the template fails, refuses the messages (`raise_exception`) or does too much;
    /// [`Error::Value`] for a template name that is not there.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        let named = self.choose(options)?;
        let fail = |error: minijinja::Error| explain(&named.name, &error);
        let mut variables: Vec<(String, Jinja)> = Vec::new();
        let tokens = self.tokens.iter().map(|(role, token)| (role.clone(), Jinja::from(token.as_str())));
        variables.extend(tokens);
        let set = options.variables.iter().map(|(name, value)| (name.clone(), jinja(value)));
        variables.extend(set);
        if let Some(now) = options.now {
            let strftime = move |format: &str| now.strftime(format).map_err(python::refuse);
            variables.push(("strftime_now".into(), Jinja::from_function(strftime)));
        }
        // Later entries win.
        let context = context! {
            messages => messages.iter().map(Message::to_jinja).collect::<Vec<_>>(),
            tools => jinja(&options.tools),
            documents => jinja(&options.documents),
            add_generation_prompt => options.generation_prompt,
            ..Jinja::from_pairs(variables)
        };
        named.environment.get_template(SOURCE).and_then(|template| template.render(context)).map_err(fail)
    }

    fn choose(&self, options: &ChatOptions) -> Result<&Named> {
        let find = |wanted: &str| self.templates.iter().find(|named| named.name == wanted);
        let tools = options.tools.as_ref().and_then(|_| find("tool_use"));
        let found = match &options.template {
            Some(name) => find(name),
            None => tools.or_else(|| find("default")),
        };
        found.ok_or_else(|| {
            let wanted = options.template.as_deref().unwrap_or("default");
            let names = self.names().collect::<Vec<_>>().join(", ");
            Error::value("chat template", format!("one of: {names}"), wanted)
        })
    }
}

/// The name of the one template in each environment.
const SOURCE: &str = "chat template";

fn compile(text: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("int", python::int);
    environment.add_filter("float", python::float);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("callable", python::is_callable);
    environment.add_function("raise_exception", |message: &str| -> Result<Jinja, minijinja::Error> {
        Err(python::refuse(message.to_owned()))
    });
    environment.add_template_owned(SOURCE, generation_blocks(text))?;
    Ok(environment)
}

/// Writes `{% generation %} … {% endgeneration %}` as a condition that always holds. transformers uses these blocks
/// to tell which tokens the assistant wrote; they do not change the text.
fn generation_blocks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[2..end];
        let name = inner.trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&format!("{{%{}%}}", inner.replacen(name, "if true", 1))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", inner.replacen(name, "endif", 1))),
            _ => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Our error for one of minijinja.
fn explain(template: &str, error: &minijinja::Error) -> Error {
    let mut root = error;
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>() {
            root = inner;
        }
        source = inner.source();
    }
    let detail = root.detail().map_or_else(|| root.kind().to_string(), str::to_owned);
    let problem = match root.kind() {
        ErrorKind::OutOfFuel => format!("it did not end within {FUEL} steps"),
        ErrorKind::UnknownFunction if detail.contains("strftime_now") => {
            "it asks for the date, and none was given (ChatOptions::now)".to_owned()
        }
        ErrorKind::InvalidOperation => detail,
        kind => match root.detail() {
            Some(detail) => format!("{kind}: {detail}"),
            None => kind.to_string(),
        },
    };
    Error::Template { template: template.to_owned(), line: error.line(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String> {
        ChatTemplate::new(template)?.render(&[Message::user("hi")], &ChatOptions::new())
    }

    #[test]
    fn templates_refuse_messages() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert_eq!(error, "chat template `default`, line 1: roles must alternate");
    }

    #[test]
    fn broken_templates_are_errors() {
        for (template, expected) in [
            ("{% for m in messages %}", "syntax error"),
            ("\n{{ messages[0].content.nonsense() }}", "line 2: unknown method"),
            ("{{ undefined_thing.field }}", "undefined"),
            ("{{ messages | nonsense }}", "unknown filter"),
            ("{{ strftime_now('%Y') }}", "asks for the date"),
            ("{{ {'a': nothing} | tojson }}", "undefined"),
        ] {
            let error = render(template).unwrap_err();
            assert!(matches!(error, Error::Template { .. }), "{error:?}");
            assert!(error.to_string().contains(expected), "{template}: {error}");
        }
    }

    #[test]
    fn runaway_templates_are_stopped() {
        for template in [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{{ 'x' * 1000000000000 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaaaa') %}{% endfor %}",
            "{{ ('x' * 1000000).join(range(100000)) }}",
            "{{ '{:>99999999999}'.format('x') }}",
            "{{ '%99999999999s' | format('x') }}",
        ] {
            let begin = std::time::Instant::now();
            let error = render(template).unwrap_err();
            assert!(matches!(error, Error::Template { .. }), "{error:?}");
            assert!(begin.elapsed().as_secs() < 20, "{template}: {:?}", begin.elapsed());
        }
    }

    #[test]
    fn generation_blocks_do_not_change_the_text() {
        let marked =
            "a{% generation %}\nb {%- generation -%} c {% endgeneration %}{%- endgeneration %}\nd{{ 'x' }}";
        let plain = "a{% if true %}\nb {%- if true -%} c {% endif %}{%- endif %}\nd{{ 'x' }}";
        assert_eq!(generation_blocks(marked), plain);
        assert_eq!(generation_blocks("{% set generation = 1 %}{% open"), "{% set generation = 1 %}{% open");
        assert_eq!(render(marked).unwrap(), render(plain).unwrap());
    }

    #[test]
    fn templates_are_chosen_by_name() {
        let named = [("default", "d"), ("tool_use", "t"), ("rag", "r")];
        let templates = named.map(|(name, text)| (name.to_owned(), text.to_owned()));
        let template = ChatTemplate::with_templates(templates, []).unwrap();
        let text = |options: ChatOptions| template.render(&[], &options);
        assert_eq!(text(ChatOptions::new()).unwrap(), "d");
        assert_eq!(text(ChatOptions::new().tools(vec![])).unwrap(), "t");
        assert_eq!(text(ChatOptions::new().tools(vec![]).template("rag")).unwrap(), "r");
        let error = text(ChatOptions::new().template("x")).unwrap_err().to_string();
        assert_eq!(error, "chat template: expected one of: default, tool_use, rag, found x");
    }

    #[test]
    fn templates_are_shared_between_threads() {
        fn shared<T: Send + Sync + Clone>() {}
        shared::<ChatTemplate>();
        shared::<crate::tokenizer::Tokenizer>();
        shared::<crate::tokenizer::StopStrings>();
        shared::<crate::tokenizer::TextStream>();
    }
}
