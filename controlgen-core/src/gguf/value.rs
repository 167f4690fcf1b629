//! Metadata values, read from the map when they are asked for.

use std::fmt::{self, Debug, Display, Formatter};

use super::cursor::{Cursor, Fault};

/// How deep arrays may lie inside arrays.
const MAX_DEPTH: usize = 4;

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// 8-bit unsigned.
    U8,
    /// 8-bit signed.
    I8,
    /// 16-bit unsigned.
    U16,
    /// 16-bit signed.
    I16,
    /// 32-bit unsigned.
    U32,
    /// 32-bit signed.
    I32,
    /// 32-bit floating point.
    F32,
    /// True or false.
    Bool,
    /// Text.
    String,
    /// Values of one type.
    Array,
    /// 64-bit unsigned.
    U64,
    /// 64-bit signed.
    I64,
    /// 64-bit floating point.
    F64,
}

impl ValueKind {
    pub(super) fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let at = cursor.at();
        let number = cursor.u32("type of a value")?;
        Ok(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return Err(Fault::new(at, format!("type of a value: expected 0 ..= 12, found {number}"))),
        })
    }

    /// The least number of bytes a value takes.
    fn width(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// A metadata value. It borrows from the file: strings and arrays are not copied.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// 8-bit unsigned.
    U8(u8),
    /// 8-bit signed.
    I8(i8),
    /// 16-bit unsigned.
    U16(u16),
    /// 16-bit signed.
    I16(i16),
    /// 32-bit unsigned.
    U32(u32),
    /// 32-bit signed.
    I32(i32),
    /// 32-bit floating point.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// Text: UTF-8 by the format, but not checked, as some writers put tokens of raw bytes here.
    String(&'a [u8]),
    /// Values of one type.
    Array(Array<'a>),
    /// 64-bit unsigned.
    U64(u64),
    /// 64-bit signed.
    I64(i64),
    /// 64-bit floating point.
    F64(f64),
}

impl<'a> Value<'a> {
    /// The type of this value.
    pub fn kind(&self) -> ValueKind {
        match self {
            Self::U8(_) => ValueKind::U8,
            Self::I8(_) => ValueKind::I8,
            Self::U16(_) => ValueKind::U16,
            Self::I16(_) => ValueKind::I16,
            Self::U32(_) => ValueKind::U32,
            Self::I32(_) => ValueKind::I32,
            Self::F32(_) => ValueKind::F32,
            Self::Bool(_) => ValueKind::Bool,
            Self::String(_) => ValueKind::String,
            Self::Array(_) => ValueKind::Array,
            Self::U64(_) => ValueKind::U64,
            Self::I64(_) => ValueKind::I64,
            Self::F64(_) => ValueKind::F64,
        }
    }

    /// The value of any type of integer.
    pub(super) fn integer(self) -> Option<i128> {
        Some(match self {
            Self::U8(value) => value.into(),
            Self::I8(value) => value.into(),
            Self::U16(value) => value.into(),
            Self::I16(value) => value.into(),
            Self::U32(value) => value.into(),
            Self::I32(value) => value.into(),
            Self::U64(value) => value.into(),
            Self::I64(value) => value.into(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => return None,
        })
    }

    /// Reads a value, and with it checks all that lies within it.
    pub(super) fn read(cursor: &mut Cursor<'a>, kind: ValueKind, depth: usize) -> Result<Self, Fault> {
        let what = "value";
        Ok(match kind {
            ValueKind::U8 => Self::U8(u8::from_le_bytes(cursor.array(what)?)),
            ValueKind::I8 => Self::I8(i8::from_le_bytes(cursor.array(what)?)),
            ValueKind::U16 => Self::U16(u16::from_le_bytes(cursor.array(what)?)),
            ValueKind::I16 => Self::I16(i16::from_le_bytes(cursor.array(what)?)),
            ValueKind::U32 => Self::U32(u32::from_le_bytes(cursor.array(what)?)),
            ValueKind::I32 => Self::I32(i32::from_le_bytes(cursor.array(what)?)),
            ValueKind::F32 => Self::F32(f32::from_le_bytes(cursor.array(what)?)),
            ValueKind::U64 => Self::U64(u64::from_le_bytes(cursor.array(what)?)),
            ValueKind::I64 => Self::I64(i64::from_le_bytes(cursor.array(what)?)),
            ValueKind::F64 => Self::F64(f64::from_le_bytes(cursor.array(what)?)),
            ValueKind::Bool => {
                let at = cursor.at();
                match cursor.array(what)? {
                    [0] => Self::Bool(false),
                    [1] => Self::Bool(true),
                    [other] => return Err(Fault::new(at, format!("bool: expected 0 or 1, found {other}"))),
                }
            }
            ValueKind::String => Self::String(cursor.string("string")?),
            ValueKind::Array => Self::Array(Array::read(cursor, depth)?),
        })
    }
}

/// In short: long strings are cut, arrays described by type and length.
impl Display for Value<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::String(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => match text.char_indices().nth(40) {
                    Some((end, _)) => write!(f, "the string {:?}…", &text[..end]),
                    None => write!(f, "the string {text:?}"),
                },
                Err(_) => write!(f, "a string of {} bytes that is not UTF-8", bytes.len()),
            },
            Self::Array(array) => write!(f, "an array of {} {:?}", array.len(), array.kind()),
            Self::Bool(value) => Display::fmt(value, f),
            Self::F32(value) => Debug::fmt(value, f),
            Self::F64(value) => Debug::fmt(value, f),
            other => Display::fmt(&other.integer().unwrap_or_default(), f),
        }
    }
}

impl Debug for Value<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind())
    }
}

/// An array of metadata values, still in the file.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    kind: ValueKind,
    length: usize,
    depth: usize,
    start: Cursor<'a>,
}

impl<'a> Array<'a> {
    fn read(cursor: &mut Cursor<'a>, depth: usize) -> Result<Self, Fault> {
        if depth >= MAX_DEPTH {
            return Err(Fault::new(cursor.at(), format!("arrays are nested more than {MAX_DEPTH} deep")));
        }
        let kind = ValueKind::read(cursor)?;
        let length = cursor.count(kind.width(), "length of an array")?;
        let array = Self { kind, length, depth, start: *cursor };
        match kind {
            ValueKind::Bool | ValueKind::String | ValueKind::Array => {
                for _ in 0..length {
                    Value::read(cursor, kind, depth + 1)?;
                }
            }
            // Any bits make a number. `count` has checked that the product does not overflow.
            _ => drop(cursor.take(length * kind.width(), "array")?),
        }
        Ok(array)
    }

    /// The type of the values.
    pub fn kind(&self) -> ValueKind {
        self.kind
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The values in order. They were checked when the file was opened; should the file have changed since,
    /// the iteration ends early.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (mut cursor, kind, depth) = (self.start, self.kind, self.depth);
        (0..self.length).map_while(move |_| Value::read(&mut cursor, kind, depth + 1).ok())
    }
}

impl Debug for Array<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
