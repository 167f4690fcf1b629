//! What templates take for granted because Python and Jinja give it: `json.dumps`, methods of strings, and tests and
//! filters where minijinja's differ.

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// An error with a message of its own.
pub(super) fn refuse(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Methods of strings, lists and dictionaries.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = |at: usize| args.get(at).and_then(Value::as_str);
    if let Some(this) = value.as_str() {
        // Text is charged for when it is there; what may be far longer than what it is made of, before.
        state.consume_fuel(made_by(name, this, args) >> 6)?;
        match (name, text(0)) {
            ("removeprefix", Some(prefix)) => return Ok(this.strip_prefix(prefix).unwrap_or(this).into()),
            ("removesuffix", Some(suffix)) => return Ok(this.strip_suffix(suffix).unwrap_or(this).into()),
            ("partition", Some(by)) if !by.is_empty() => {
                let (before, after) = this.split_once(by).map_or((this, None), |(a, b)| (a, Some(b)));
                let parts = [before, after.map_or("", |_| by), after.unwrap_or_default()];
                return Ok(Tuple::from(parts.map(Value::from)).into());
            }
            ("rpartition", Some(by)) if !by.is_empty() => {
                let (before, after) = this.rsplit_once(by).map_or((None, this), |(a, b)| (Some(a), b));
                let parts = [before.unwrap_or_default(), before.map_or("", |_| by), after];
                return Ok(Tuple::from(parts.map(Value::from)).into());
            }
            ("index", Some(part)) => {
                let at = this.find(part).ok_or_else(|| refuse(format!("substring {part:?} not found")))?;
                return Ok(this[..at].chars().count().into());
            }
            ("title", None) => return Ok(title(this).into()),
            ("rsplit", Some(by)) if !by.is_empty() => {
                let limit = args.get(1).and_then(Value::as_usize).map_or(usize::MAX, |n| n.saturating_add(1));
                let mut parts: Vec<&str> = this.rsplitn(limit, by).collect();
                parts.reverse();
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// How many bytes the methods make that repeat one of their strings.
fn made_by(method: &str, this: &str, args: &[Value]) -> u64 {
    let bytes = match (method, args) {
        ("replace", [old, new, ..]) => {
            let (old, new) = (old.as_str().unwrap_or_default(), new.as_str().unwrap_or_default());
            this.matches(old).count().saturating_mul(new.len())
        }
        ("join", [parts, ..]) => parts.len().unwrap_or_default().saturating_mul(this.len()),
        // Widths and precisions; a number too long for u64 counts as one that cannot be had.
        ("format", _) => {
            let fields = this.split('{').skip(1).filter_map(|field| field.split('}').next());
            let numbers = fields.flat_map(|field| field.split(|c: char| !c.is_ascii_digit()));
            let widths = numbers.filter(|number| !number.is_empty()).map(|n| n.parse().unwrap_or(usize::MAX));
            widths.fold(0, usize::saturating_add)
        }
        _ => 0,
    };
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Python's `str.title`: a letter is a capital unless it follows a letter.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

/// Jinja's test `iterable`: what Python can loop over, so not none.
pub(super) fn is_iterable(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined
    )
}

/// Jinja's test `sequence`: what has a length and items, so texts and dictionaries too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
}

/// Jinja's test `callable`.
pub(super) fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain
}

/// Jinja's filter `int`: what is no number becomes the default, 0.
pub(super) fn int(value: &Value, default: Option<Value>) -> Value {
    let number = match value.kind() {
        ValueKind::Number if value.is_integer() => return value.clone(),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim();
            if let Ok(number) = text.parse::<i64>() {
                return number.into();
            }
            text.parse().ok()
        }
        _ => None,
    };
    match number {
        // Whole numbers up to 2⁵³ are exact; larger ones do not occur in templates.
        Some(number) if number.abs() <= 9_007_199_254_740_992.0 => Value::from(number.trunc() as i64),
        _ => default.unwrap_or_else(|| Value::from(0)),
    }
}

/// Jinja's filter `float`: what is no number becomes the default, 0.0.
pub(super) fn float(value: &Value, default: Option<Value>) -> Value {
    let number = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => value.as_str().unwrap_or_default().trim().parse().ok(),
        _ => None,
    };
    number.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// transformers' `tojson`: Python's `json.dumps` with `ensure_ascii=False`, and without escapes for HTML.
#[allow(clippy::needless_pass_by_value)] // the signature of a filter
pub(super) fn tojson(state: &mut State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Some(spaces)) if spaces <= 64 => Some(" ".repeat(spaces)),
            _ => {
                return Err(refuse(format!(
                    "tojson: expected indent as 0 ..= 64 or a string, found {indent}"
                )));
            }
        },
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refuse("tojson: expected two separators".into())),
    };
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = Writer { out: String::new(), indent, separators, ensure_ascii, sort_keys };
    writer.value(state, value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: (String, String),
    ensure_ascii: bool,
    sort_keys: bool,
}

/// Deeper values are refused: they would overflow the stack.
const DEEPEST: usize = 200;

impl Writer {
    fn value(&mut self, state: &mut State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(refuse(format!("tojson: a value nested deeper than {DEEPEST}")));
        }
        let before = self.out.len();
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&repr(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut first = true;
                for item in value.try_iter()?.checked() {
                    self.item(&mut first, depth);
                    self.value(state, &item?, depth + 1)?;
                }
                self.close(']', first, depth);
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                let mut first = true;
                for key in keys {
                    self.item(&mut first, depth);
                    self.key(&key)?;
                    let separator = self.separators.1.clone();
                    self.out.push_str(&separator);
                    self.value(state, &value.get_item(&key)?, depth + 1)?;
                }
                self.close('}', first, depth);
            }
            other => return Err(refuse(format!("tojson: a value of kind {other} is not JSON serializable"))),
        }
        // A list that holds the same list twice, and so on, is small until it is written.
        let written = u64::try_from(self.out.len() - before).unwrap_or(u64::MAX);
        state.consume_fuel(1 + (written >> 6))
    }

    /// What stands before an item.
    fn item(&mut self, first: &mut bool, depth: usize) {
        if !std::mem::replace(first, false) {
            let separator = self.separators.0.clone();
            self.out.push_str(&separator);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        let text = match key.kind() {
            ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
            ValueKind::None => "null".to_owned(),
            ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
            ValueKind::Number if key.is_integer() => key.to_string(),
            ValueKind::Number => repr(f64::try_from(key.clone())?),
            other => return Err(refuse(format!("tojson: keys must be strings or numbers, not {other}"))),
        };
        self.string(&text);
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a float: the shortest digits that read back the same, in scientific notation outside
/// 1e-4 ..= 1e16.
fn repr(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}
