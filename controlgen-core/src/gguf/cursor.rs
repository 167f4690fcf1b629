//! Bounds-checked reading of little-endian fields.

/// Where reading failed, and why. The caller knows the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) at: usize,
    pub(super) problem: String,
}

impl Fault {
    pub(super) fn new(at: usize, problem: impl Into<String>) -> Self {
        Self { at, problem: problem.into() }
    }
}

/// A position in a file. Copies are cheap; every step is checked against the end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor at an offset, which may lie behind the end: reading fails there.
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// The offset of the next byte.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// The next `count` bytes. `what` names them in the error.
    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(count);
        let Some(taken) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            return Err(Fault::new(
                self.at,
                format!("{what}: expected {count} bytes, found {} to the end", self.left()),
            ));
        };
        self.at += count;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `width` bytes each: refused where the rest of the file cannot
    /// hold them.
    pub(super) fn count(&mut self, width: usize, what: &str) -> Result<usize, Fault> {
        let at = self.at;
        let count = self.u64(what)?;
        usize::try_from(count)
            .ok()
            .filter(|&count| count.checked_mul(width).is_some_and(|needed| needed <= self.left()))
            .ok_or_else(|| {
                let left = self.left();
                Fault::new(
                    at,
                    format!(
                        "{what}: {count} of at least {width} bytes each do not fit into the {left} bytes left"
                    ),
                )
            })
    }

    /// A string: its length, then its bytes. Not checked to be UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a [u8], Fault> {
        let length = self.count(1, what)?;
        self.take(length, what)
    }

    /// A string that must be UTF-8.
    pub(super) fn text(&mut self, what: &str) -> Result<&'a str, Fault> {
        let at = self.at;
        std::str::from_utf8(self.string(what)?)
            .map_err(|error| Fault::new(at, format!("{what} is not UTF-8: {error}")))
    }
}
