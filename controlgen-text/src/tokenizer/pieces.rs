//! What each token stands for in bytes, and how tokens join into text.
//!
//! Two families cover the language models. *Byte-level* vocabularies spell every byte with one printable character
//! (GPT-2's `bytes_to_unicode`); the text is the concatenation of the bytes. *SentencePiece* vocabularies spell a
//! space as `▁`, and bytes without a piece of their own as `<0xAB>`. Both are decoded here, token by token, so that
//! whole texts and streams share one code path. Anything else (WordPiece, CTC) is left to the `tokenizers` crate.

use serde_json::Value;

/// How the tokens of a vocabulary become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decoding {
    /// Every character of a token stands for one byte.
    ByteLevel,
    /// SentencePiece pieces.
    Pieces {
        /// What a space is written as.
        space: char,
        /// Whether `<0xAB>` stands for the byte AB.
        byte_fallback: bool,
        /// How many leading spaces the text loses.
        strip: usize,
        /// Whether the first token loses all its `space` characters.
        bare_first: bool,
    },
    /// Known to the `tokenizers` crate only: tokens have no bytes of their own.
    Opaque,
}

impl Decoding {
    /// Recognises the family from the `decoder` of a tokenizer.json.
    pub(crate) fn of(decoder: &Value) -> Self {
        let steps: Vec<&Value> = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().into_iter().flatten().collect(),
            Some(_) => vec![decoder],
            None => return Self::Opaque,
        };
        let (mut space, mut fallback, mut fused, mut strip, mut bare_first) = (None, false, false, 0, false);
        for step in &steps {
            match step["type"].as_str() {
                Some("ByteLevel") if steps.len() == 1 => return Self::ByteLevel,
                Some("Replace") if space.is_none() && !fallback && !fused => {
                    let (from, to) = (step["pattern"]["String"].as_str(), step["content"].as_str());
                    match (from.and_then(only_char), to) {
                        (Some(from), Some(" ")) => space = Some(from),
                        _ => return Self::Opaque,
                    }
                }
                Some("Metaspace") if steps.len() == 1 => {
                    space = step["replacement"].as_str().and_then(only_char);
                    bare_first = step["prepend_scheme"].as_str() != Some("never");
                }
                Some("ByteFallback") if !fallback && !fused => fallback = true,
                Some("Fuse") => fused = true,
                // On the fused text, `Strip` acts once; before, it would act on every token.
                Some("Strip") if fused && strip == 0 => {
                    let stop = step["stop"].as_u64();
                    match (step["content"].as_str(), step["start"].as_u64(), stop) {
                        (Some(" "), Some(start), Some(0)) => {
                            strip = usize::try_from(start).unwrap_or(usize::MAX);
                        }
                        _ => return Self::Opaque,
                    }
                }
                _ => return Self::Opaque,
            }
        }
        match space {
            Some(space) => Self::Pieces { space, byte_fallback: fallback, strip, bare_first },
            None => Self::Opaque,
        }
    }

    /// The bytes of one token inside a text (at its beginning, SentencePiece may drop a space).
    pub(crate) fn bytes(self, token: &str) -> Option<Vec<u8>> {
        match self {
            Self::ByteLevel => Some(byte_level_bytes(token)),
            Self::Pieces { space, byte_fallback, .. } => Some(match fallback_byte(token) {
                Some(byte) if byte_fallback => vec![byte],
                _ => token.replace(space, " ").into_bytes(),
            }),
            Self::Opaque => None,
        }
    }
}

fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// The byte that `<0xAB>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if hexadecimal { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The bytes of a byte-level token. One that uses a character outside the alphabet is text as it stands, as in the
/// `tokenizers` crate.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the 68 other bytes, in order, for U+0100
/// and following.
fn printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

fn byte_of(c: char) -> Option<u8> {
    static REST: std::sync::LazyLock<Vec<u8>> =
        std::sync::LazyLock::new(|| (0..=255).filter(|&byte| !printable(byte)).collect());
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => Some(byte).filter(|&byte| printable(byte)),
        Err(_) => REST.get(usize::try_from(code - 256).ok()?).copied(),
    }
}

/// Joins tokens into text, holding back bytes that do not yet make a character.
#[derive(Debug, Clone)]
pub(crate) struct Joiner {
    decoding: Decoding,
    /// Bytes of a character that is not complete: three at most.
    pending: Vec<u8>,
    /// Leading spaces that are still to be dropped.
    strip: usize,
    /// Whether no token has come yet.
    first: bool,
}

impl Joiner {
    /// A joiner at the beginning of a text; `None` where the tokens have no bytes of their own.
    pub(crate) fn new(decoding: Decoding) -> Option<Self> {
        let strip = match decoding {
            Decoding::ByteLevel => 0,
            Decoding::Pieces { strip, .. } => strip,
            Decoding::Opaque => return None,
        };
        Some(Self { decoding, pending: Vec::new(), strip, first: true })
    }

    /// From now on, tokens are not the first of their text.
    pub(crate) fn inside(&mut self) {
        (self.strip, self.first) = (0, false);
    }

    /// Appends to `out` the text that `token` completes.
    pub(crate) fn push(&mut self, token: &str, out: &mut String) {
        match self.decoding {
            Decoding::ByteLevel => {
                self.pending.extend(byte_level_bytes(token));
                self.complete(out);
            }
            Decoding::Pieces { space, byte_fallback, bare_first, .. } => {
                match fallback_byte(token) {
                    Some(byte) if byte_fallback => {
                        self.pending.push(byte);
                        self.complete(out);
                    }
                    _ => {
                        self.give_up(out);
                        let written = if bare_first && self.first { "" } else { " " };
                        self.emit(&token.replace(space, written), out);
                    }
                }
                self.first = false;
            }
            Decoding::Opaque => {}
        }
    }

    /// Appends replacement characters for bytes that never became a character.
    pub(crate) fn finish(&mut self, out: &mut String) {
        self.give_up(out);
    }

    /// Moves whole characters from `pending` to `out`; what can never become one is replaced.
    fn complete(&mut self, out: &mut String) {
        let bytes = std::mem::take(&mut self.pending);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (valid, invalid) = match std::str::from_utf8(rest) {
                Ok(text) => (text, Some(0)),
                Err(error) => {
                    let (valid, _) = rest.split_at(error.valid_up_to());
                    (std::str::from_utf8(valid).unwrap_or_default(), error.error_len())
                }
            };
            self.emit(valid, out);
            rest = &rest[valid.len()..];
            let Some(invalid) = invalid else { break };
            self.replace(invalid, out);
            rest = &rest[invalid..];
        }
        self.pending = rest.to_vec();
    }

    fn give_up(&mut self, out: &mut String) {
        let held = std::mem::take(&mut self.pending).len();
        self.replace(held, out);
    }

    /// Byte-level decoding replaces each maximal part of a character by one U+FFFD (as `String::from_utf8_lossy`),
    /// SentencePiece each byte.
    fn replace(&mut self, bytes: usize, out: &mut String) {
        let marks = if self.decoding == Decoding::ByteLevel { bytes.min(1) } else { bytes };
        for _ in 0..marks {
            self.emit("\u{FFFD}", out);
        }
    }

    fn emit(&mut self, mut text: &str, out: &mut String) {
        while self.strip > 0 && !text.is_empty() {
            match text.strip_prefix(' ') {
                Some(rest) => (text, self.strip) = (rest, self.strip - 1),
                None => self.strip = 0,
            }
        }
        out.push_str(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn join(decoding: Decoding, tokens: &[&str]) -> String {
        let mut joiner = Joiner::new(decoding).unwrap();
        let mut out = String::new();
        for token in tokens {
            joiner.push(token, &mut out);
        }
        joiner.finish(&mut out);
        out
    }

    fn llama() -> Decoding {
        Decoding::of(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
    }

    #[test]
    fn families_are_recognised() {
        assert_eq!(Decoding::of(&json!({"type": "ByteLevel"})), Decoding::ByteLevel);
        assert_eq!(
            llama(),
            Decoding::Pieces { space: '▁', byte_fallback: true, strip: 1, bare_first: false }
        );
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"});
        let pieces = Decoding::Pieces { space: '▁', byte_fallback: false, strip: 0, bare_first: true };
        assert_eq!(Decoding::of(&metaspace), pieces);
        assert_eq!(Decoding::of(&json!({"type": "WordPiece"})), Decoding::Opaque);
        assert_eq!(Decoding::of(&Value::Null), Decoding::Opaque);
        // `Strip` before `Fuse` acts on every token.
        let per_token = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}]});
        assert_eq!(Decoding::of(&per_token), Decoding::Opaque);
    }

    #[test]
    fn the_alphabet_is_gpt2s() {
        // From GPT-2's vocabulary: space, newline, tab, NUL, DEL, soft hyphen, and é as two bytes.
        for (spelled, bytes) in
            [("Ġ", &b" "[..]), ("Ċ", b"\n"), ("ĉ", b"\t"), ("Ā", b"\0"), ("ġ", b"\x7f"), ("Ń", b"\xad")]
        {
            assert_eq!(byte_level_bytes(spelled), bytes, "{spelled}");
        }
        assert_eq!(byte_level_bytes("cafÃ©"), "café".as_bytes());
        assert_eq!(byte_level_bytes("<｜x｜>"), "<｜x｜>".as_bytes());
        let known = (0..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect::<std::collections::BTreeSet<_>>();
        assert_eq!(known.len(), 256);
    }

    #[test]
    fn invalid_bytes_are_replaced_as_sentencepiece_does() {
        assert_eq!(
            join(llama(), &["▁a", "<0xE5>", "<0x8F>", "<0xAB>", "<0xE5>", "<0x8F>", "b"]),
            "a叫\u{FFFD}\u{FFFD}b"
        );
        assert_eq!(join(llama(), &["<0x20>", "<0x20>", "x"]), " x");
        assert_eq!(join(llama(), &["<0xF0>", "<0x9F>"]), "\u{FFFD}\u{FFFD}");
        assert_eq!(join(llama(), &["▁", "▁x"]), " x");
    }

    #[test]
    fn invalid_bytes_are_replaced_as_in_byte_level_decoding() {
        for bytes in [&b"a\xE5\x8Fb"[..], b"\xF0\x9F\x98", b"\xFF\xFE\xE5", b"\xE5\xE5\x8F\xAB\x80"] {
            let spelled: Vec<String> = bytes
                .iter()
                .map(|&b| {
                    (0..0x200)
                        .filter_map(char::from_u32)
                        .find(|&c| byte_of(c) == Some(b))
                        .unwrap()
                        .to_string()
                })
                .collect();
            let tokens: Vec<&str> = spelled.iter().map(String::as_str).collect();
            assert_eq!(join(Decoding::ByteLevel, &tokens), String::from_utf8_lossy(bytes), "{bytes:x?}");
        }
    }
}
