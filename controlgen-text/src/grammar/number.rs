//! Numbers in JSON that do not run on.

/// How long the number is in which a JSON text ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NumberAtEnd {
    in_string: bool,
    escaped: bool,
    length: usize,
}

impl NumberAtEnd {
    /// Reads on.
    pub(super) fn read(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match (self.in_string, byte) {
                (true, _) if self.escaped => self.escaped = false,
                (true, b'\\') => self.escaped = true,
                (_, b'"') => (self.in_string, self.length) = (!self.in_string, 0),
                (false, byte) if continues(byte) => self.length += 1,
                _ => self.length = 0,
            }
        }
    }

    /// Its characters; 0 where there is none.
    pub(super) fn length(self) -> usize {
        self.length
    }
}

/// Whether a byte may continue a number.
pub(super) fn continues(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_count() {
        for (text, length) in [
            ("", 0),
            ("[1", 1),
            ("{\"a\": -12.5e+3", 8),
            ("{\"a\": 12, ", 0),
            ("\"12", 0),
            ("\"1\\\"2", 0),
            ("[\"\\\\\", 34", 2),
            ("[\"1\", 2]", 0),
        ] {
            let mut whole = NumberAtEnd::default();
            whole.read(text.as_bytes());
            let mut apart = NumberAtEnd::default();
            text.bytes().for_each(|byte| apart.read(&[byte]));
            assert_eq!((whole.length(), apart.length()), (length, length), "{text}");
        }
    }
}
