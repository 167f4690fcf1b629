//! Fixtures, GGUF files built by hand, and damage done to files.
#![allow(dead_code, clippy::unwrap_used)] // helpers of tests, of which each uses a part

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::TensorSource;
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A tensor of a source, converted to `kind`.
pub fn read(source: &dyn TensorSource, name: &str, kind: Kind) -> Tensor {
    let mut tensor = Tensor::empty(source.info(name).unwrap().shape, (kind, Device::Cpu));
    source.read(name, &mut tensor).unwrap();
    tensor
}

/// A GGUF file under construction, which remembers where its fields lie.
#[derive(Clone, Default)]
pub struct GgufBytes {
    pub bytes: Vec<u8>,
    /// Offset and width of every count, length, type, dimension and offset.
    pub fields: Vec<(usize, usize)>,
    /// Where the dimensions of tensors lie.
    pub dims: Vec<usize>,
    /// Where the encodings of tensors lie.
    pub encodings: Vec<usize>,
    /// Where the texts lie.
    pub texts: Vec<std::ops::Range<usize>>,
}

impl GgufBytes {
    /// Magic number, version and counts.
    pub fn new(version: u32, tensors: u64, keys: u64) -> Self {
        let mut file = Self::default();
        file.bytes.extend(b"GGUF");
        file.u32(version).u64(tensors).u64(keys);
        file
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.fields.push((self.bytes.len(), 4));
        self.bytes.extend(value.to_le_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.fields.push((self.bytes.len(), 8));
        self.bytes.extend(value.to_le_bytes());
        self
    }

    pub fn string(&mut self, text: impl AsRef<[u8]>) -> &mut Self {
        self.u64(text.as_ref().len() as u64);
        let start = self.bytes.len();
        self.bytes.extend(text.as_ref());
        self.texts.push(start..self.bytes.len());
        self
    }

    /// A key whose value has a type and these bytes.
    pub fn key(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.string(key).u32(kind);
        self.bytes.extend(value);
        self
    }

    /// The description of a tensor; dimensions fastest first.
    pub fn tensor(&mut self, name: &str, dims: &[u64], encoding: u32, offset: u64) -> &mut Self {
        self.string(name).u32(dims.len() as u32);
        for &dim in dims {
            self.dims.push(self.bytes.len());
            self.u64(dim);
        }
        self.encodings.push(self.bytes.len());
        self.u32(encoding).u64(offset)
    }

    /// Pads to the alignment and appends the data.
    pub fn data(&mut self, alignment: usize, data: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(alignment), 0);
        bytes.extend(data);
        bytes
    }
}

/// A safetensors file with this header.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Numbers at which readers break.
fn awkward(rng: &mut ChaCha8Rng, length: usize) -> u64 {
    let length = length as u64;
    let numbers = [
        0,
        1,
        2,
        3,
        7,
        8,
        9,
        31,
        32,
        33,
        64,
        255,
        256,
        257,
        0x7FFF_FFFF,
        0x8000_0000,
        0xFFFF_FFFF,
        1 << 32,
        (1 << 62) - 1,
        1 << 62,
        (1 << 63) - 1,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
        length - 1,
        length,
        length + 1,
        length.wrapping_neg(),
        length << 1,
    ];
    match rng.random_range(0..4) {
        0 => rng.random_range(0..=length),
        1 => rng.random(),
        _ => numbers[rng.random_range(0..numbers.len())],
    }
}

/// Damage that needs no knowledge of the format, most of it in the first `head` bytes.
pub fn damage_bytes(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, head: usize) {
    let head = head.clamp(1, bytes.len());
    let at = if rng.random_range(0..8) == 0 {
        rng.random_range(0..bytes.len())
    } else {
        rng.random_range(0..head)
    };
    match rng.random_range(0..8) {
        0 | 1 => bytes[at] ^= 1 << rng.random_range(0..8),
        2 => bytes[at] = rng.random(),
        3 => {
            let number = awkward(rng, bytes.len()).to_le_bytes();
            let width = if rng.random() { 4 } else { 8 };
            let end = bytes.len().min(at + width);
            bytes[at..end].copy_from_slice(&number[..end - at]);
        }
        4 => bytes.truncate(at),
        5 => {
            let (end, to) = (bytes.len().min(at + rng.random_range(1..64)), rng.random_range(0..head));
            let piece = bytes[at..end].to_vec();
            bytes.splice(to..to, piece);
        }
        6 => drop(bytes.drain(at..(at + rng.random_range(1..32)).min(bytes.len()))),
        _ => bytes.extend(std::iter::repeat_n(rng.random::<u8>(), rng.random_range(1..100))),
    }
}

/// Replaces one of the fields by an awkward number.
pub fn damage_field(rng: &mut ChaCha8Rng, bytes: &mut [u8], fields: &[(usize, usize)]) {
    let (at, width) = fields[rng.random_range(0..fields.len())];
    let mut old = [0; 8];
    old[..width].copy_from_slice(&bytes[at..at + width]);
    let old = u64::from_le_bytes(old);
    let new = match rng.random_range(0..4) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ 1 << rng.random_range(0..8 * width),
        _ => awkward(rng, bytes.len()),
    };
    bytes[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Replaces a number, a string or a member of the JSON text at `text`, and mostly keeps the length before it
/// right.
pub fn damage_json(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, prefix: usize) {
    let end = if prefix == 0 {
        bytes.len()
    } else {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes.len().min(prefix + length)
    };
    let mut text = bytes[prefix..end].to_vec();
    let runs = |text: &[u8], wanted: &dyn Fn(&u8) -> bool| {
        let mut runs = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let length = text[at..].iter().take_while(|byte| wanted(byte)).count();
            if length > 0 {
                runs.push(at..at + length);
            }
            at += length.max(1);
        }
        runs
    };
    let numbers = runs(&text, &u8::is_ascii_digit);
    let words = runs(&text, &|byte| byte.is_ascii_alphanumeric() || b"_.".contains(byte));
    match rng.random_range(0..6) {
        0..=2 if !numbers.is_empty() => {
            let at = numbers[rng.random_range(0..numbers.len())].clone();
            let old: u64 = std::str::from_utf8(&text[at.clone()]).unwrap().parse().unwrap_or(0);
            let new = match rng.random_range(0..6) {
                0 => (old ^ 1).to_string(),
                1 => old.wrapping_add(8).to_string(),
                2 => format!("-{old}"),
                3 => format!("{old}.0"),
                _ => awkward(rng, bytes.len()).to_string(),
            };
            text.splice(at, new.into_bytes());
        }
        3 | 4 if !words.is_empty() => {
            let from = words[rng.random_range(0..words.len())].clone();
            let to = words[rng.random_range(0..words.len())].clone();
            let word = text[from].to_vec();
            text.splice(to, word);
        }
        _ => {
            // A member again, or gone.
            let cuts: Vec<usize> = (0..text.len()).filter(|&at| text[at] == b',').collect();
            if cuts.len() > 1 {
                let first = rng.random_range(0..cuts.len() - 1);
                let last = (first + rng.random_range(1..5)).min(cuts.len() - 1);
                let piece = text[cuts[first]..cuts[last]].to_vec();
                if rng.random() {
                    text.splice(cuts[first]..cuts[first], piece);
                } else {
                    text.drain(cuts[first]..cuts[last]);
                }
            }
        }
    }
    if prefix > 0 && rng.random_range(0..16) != 0 {
        bytes[..8].copy_from_slice(&(text.len() as u64).to_le_bytes());
    }
    bytes.splice(prefix..end, text);
}

/// Changes a GGUF file in a way that mostly leaves it valid: a smaller dimension, another encoding, other
/// letters, other data.
pub fn alter_gguf(rng: &mut ChaCha8Rng, bytes: &mut [u8], file: &GgufBytes) {
    match rng.random_range(0..4) {
        0 => {
            let at = file.dims[rng.random_range(0..file.dims.len())];
            let old = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            bytes[at..at + 8].copy_from_slice(&rng.random_range(0..=old).to_le_bytes());
        }
        1 => {
            let at = file.encodings[rng.random_range(0..file.encodings.len())];
            bytes[at] = rng.random_range(0..31);
        }
        2 => {
            let range = file.texts[rng.random_range(0..file.texts.len())].clone();
            if !range.is_empty() {
                bytes[rng.random_range(range)] = rng.random_range(b'a'..=b'z');
            }
        }
        _ => {
            let start = file.bytes.len();
            bytes[start..].fill_with(|| rng.random());
        }
    }
}

/// Changes a safetensors file in a way that mostly leaves it valid: another shape of as many elements,
/// another element type of the same width, another name, another order, other data.
pub fn alter_safetensors(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>) {
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let Ok(serde_json::Value::Object(mut header)) = serde_json::from_slice(&bytes[8..end]) else { return };
    let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
    if names.is_empty() {
        return;
    }
    let name = &names[rng.random_range(0..names.len())];
    match rng.random_range(0..5) {
        0 => {
            let shape = header[name]["shape"].as_array().cloned().unwrap_or_default();
            let count: u64 = shape.iter().map(|size| size.as_u64().unwrap_or(1)).product();
            let divisor = rng.random_range(1..=8);
            let other = count.div_ceil(divisor);
            header[name]["shape"] = if divisor * other == count {
                serde_json::json!([divisor, other])
            } else {
                serde_json::json!([1, count, 1])
            };
        }
        1 => {
            let widths = [
                vec!["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "BOOL"],
                vec!["I16", "F16", "BF16", "U16"],
                vec!["I32", "F32"],
                vec!["I64", "F64"],
            ];
            let old = header[name]["dtype"].as_str().unwrap_or_default().to_owned();
            if let Some(same) = widths.iter().find(|same| same.contains(&old.as_str())) {
                header[name]["dtype"] = same[rng.random_range(0..same.len())].into();
            }
        }
        2 => {
            let letters: String = (0..rng.random_range(0..20)).map(|_| rng.random::<char>()).collect();
            let tensor = header.remove(name).unwrap();
            header.insert(letters, tensor);
        }
        3 => {
            let letters: String = (0..rng.random_range(0..20)).map(|_| rng.random::<char>()).collect();
            header.insert(
                "__metadata__".to_owned(),
                serde_json::json!({ letters.clone(): letters, "note": "x" }),
            );
        }
        _ => bytes[end..].fill_with(|| rng.random()),
    }
    let text =
        if rng.random() { serde_json::to_vec(&header) } else { serde_json::to_vec_pretty(&header) }.unwrap();
    bytes[..8].copy_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.splice(8..end, text);
}
