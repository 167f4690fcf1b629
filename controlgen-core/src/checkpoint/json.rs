//! Reading of JSON in place.
//!
//! A header is untrusted, and a general parser allocates many times its size for it. This one hands out
//! slices.

/// Where reading failed, and why. The caller knows the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) at: usize,
    pub(super) problem: String,
}

/// Bytes a string may take in the file where its text is needed (names, keys).
pub(super) const MAX_STRING: usize = 1 << 16;
/// How deep objects and arrays may lie in values that are passed over.
const MAX_DEPTH: usize = 32;

/// A position in JSON text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A string as it stands in the file, with its quotes.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawString<'a> {
    raw: &'a [u8],
    at: usize,
}

impl<'a> RawString<'a> {
    /// How many bytes the string takes in the file; its text takes no more.
    pub(super) fn raw_len(&self) -> usize {
        self.raw.len()
    }

    /// The text, whatever its length.
    pub(super) fn long_text(&self) -> Result<String, Fault> {
        serde_json::from_slice(self.raw).map_err(|error| Fault { at: self.at, problem: error.to_string() })
    }

    /// Appends the text to `out`. Strings of more than [`MAX_STRING`] bytes are refused.
    pub(super) fn push_to(&self, out: &mut String) -> Result<(), Fault> {
        let fault = |problem: String| Fault { at: self.at, problem };
        if self.raw.len() > MAX_STRING {
            return Err(fault(format!("a name of {} bytes, expected at most {MAX_STRING}", self.raw.len())));
        }
        let inner = self.raw.get(1..self.raw.len() - 1).unwrap_or_default();
        if !inner.contains(&b'\\') {
            out.push_str(std::str::from_utf8(inner).map_err(|error| fault(error.to_string()))?);
        } else {
            let text: String = serde_json::from_slice(self.raw).map_err(|error| fault(error.to_string()))?;
            out.push_str(&text);
        }
        Ok(())
    }

    /// The text.
    pub(super) fn text(&self) -> Result<String, Fault> {
        let mut text = String::new();
        self.push_to(&mut text)?;
        Ok(text)
    }

    /// Whether the text is exactly `expected`, which must contain nothing that JSON could escape.
    pub(super) fn is(&self, expected: &str) -> bool {
        self.raw.get(1..self.raw.len() - 1) == Some(expected.as_bytes())
    }
}

impl<'a> Scanner<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// An error here.
    pub(super) fn fault(&self, problem: impl Into<String>) -> Fault {
        Fault { at: self.at, problem: problem.into() }
    }

    fn skip_space(&mut self) {
        while matches!(self.bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        self.skip_space();
        self.bytes.get(self.at).copied()
    }

    fn expected(&mut self, what: &str) -> Fault {
        let found =
            self.peek().map_or_else(|| "the end".to_owned(), |byte| format!("`{}`", byte.escape_ascii()));
        self.fault(format!("expected {what}, found {found}"))
    }

    /// Takes a byte if it comes next.
    pub(super) fn accept(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Takes a byte that must come next.
    pub(super) fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        if self.accept(byte) { Ok(()) } else { Err(self.expected(&format!("`{}`", byte.escape_ascii()))) }
    }

    /// Checks that nothing follows.
    pub(super) fn end(&mut self) -> Result<(), Fault> {
        if self.peek().is_none() { Ok(()) } else { Err(self.expected("the end")) }
    }

    /// A string, checked but for UTF-8.
    pub(super) fn string(&mut self) -> Result<RawString<'a>, Fault> {
        if self.peek() != Some(b'"') {
            return Err(self.expected("a string"));
        }
        let start = self.at;
        self.at += 1;
        loop {
            let byte =
                self.bytes.get(self.at).copied().ok_or_else(|| self.fault("a string without an end"))?;
            match byte {
                b'"' => break,
                b'\\' => self.escape()?,
                0..0x20 => return Err(self.fault("a control character in a string")),
                _ => self.at += 1,
            }
        }
        self.at += 1;
        Ok(RawString { raw: &self.bytes[start..self.at], at: start })
    }

    /// Passes over an escape, or two that stand for one character.
    fn escape(&mut self) -> Result<(), Fault> {
        match self.bytes.get(self.at + 1) {
            None => Err(self.fault("a string without an end")),
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                Ok(())
            }
            Some(b'u') => match self.code_unit() {
                Some(0xD800..=0xDBFF) => {
                    self.at += 6;
                    let second = self.bytes.get(self.at..).filter(|rest| rest.starts_with(b"\\u"));
                    match second.and_then(|_| self.code_unit()) {
                        Some(0xDC00..=0xDFFF) => {
                            self.at += 6;
                            Ok(())
                        }
                        _ => Err(self.fault("half of a surrogate pair in a string")),
                    }
                }
                Some(0xDC00..=0xDFFF) => Err(self.fault("half of a surrogate pair in a string")),
                Some(_) => {
                    self.at += 6;
                    Ok(())
                }
                None => Err(self.fault("expected four hexadecimal digits in a string")),
            },
            Some(_) => Err(self.fault("an unknown escape in a string")),
        }
    }

    /// The number of the `\uXXXX` that comes next.
    fn code_unit(&self) -> Option<u32> {
        let digits = self.bytes.get(self.at + 2..self.at + 6)?;
        digits.iter().try_fold(0, |unit, &digit| Some(unit << 4 | char::from(digit).to_digit(16)?))
    }

    /// An integer in 0 ..= 2⁶⁴ − 1, written without sign, point or exponent.
    pub(super) fn integer(&mut self) -> Result<u64, Fault> {
        if !self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            return Err(self.expected("an integer >= 0"));
        }
        let start = self.at;
        let mut value = 0_u64;
        while let Some(digit @ b'0'..=b'9') = self.bytes.get(self.at) {
            value = value
                .checked_mul(10)
                .and_then(|value| value.checked_add(u64::from(digit - b'0')))
                .ok_or_else(|| self.fault("an integer that exceeds 2^64 - 1"))?;
            self.at += 1;
        }
        if self.bytes[start] == b'0' && self.at > start + 1 {
            return Err(self.fault("an integer that begins with 0"));
        }
        if matches!(self.bytes.get(self.at), Some(b'.' | b'e' | b'E')) {
            return Err(self.fault("expected an integer, found a fraction"));
        }
        Ok(value)
    }

    /// Calls `member` with each key of an object, the scanner standing at its value.
    pub(super) fn object(
        &mut self,
        mut member: impl FnMut(&mut Self, RawString<'a>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.expect(b'{')?;
        if self.accept(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string()?;
            self.expect(b':')?;
            member(self, key)?;
            if !self.accept(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// Calls `item` at each item of an array.
    pub(super) fn list(&mut self, mut item: impl FnMut(&mut Self) -> Result<(), Fault>) -> Result<(), Fault> {
        self.expect(b'[')?;
        if self.accept(b']') {
            return Ok(());
        }
        loop {
            item(self)?;
            if !self.accept(b',') {
                return self.expect(b']');
            }
        }
    }

    /// Passes over a value of any type.
    pub(super) fn skip(&mut self) -> Result<(), Fault> {
        self.skip_within(0)
    }

    fn skip_within(&mut self, depth: usize) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(self.fault(format!("nested more than {MAX_DEPTH} deep")));
        }
        match self.peek() {
            Some(b'{') => self.object(|scanner, _| scanner.skip_within(depth + 1)),
            Some(b'[') => self.list(|scanner| scanner.skip_within(depth + 1)),
            Some(b'"') => self.string().map(drop),
            Some(b't' | b'f' | b'n' | b'-' | b'0'..=b'9') => {
                // A number, true, false, or null.
                let in_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
                let rest = &self.bytes[self.at..];
                let length = rest.iter().take_while(|byte| in_word(byte)).count();
                serde_json::from_slice::<serde::de::IgnoredAny>(&rest[..length])
                    .map_err(|error| self.fault(error.to_string()))?;
                self.at += length;
                Ok(())
            }
            _ => Err(self.expected("a value")),
        }
    }
}
