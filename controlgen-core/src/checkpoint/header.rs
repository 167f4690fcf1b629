//! The header of a safetensors file.
//!
//! Eight bytes of length, then JSON:
//! `{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …}`
//! and optionally `"__metadata__"`, an object of strings; then the data, without holes. The `safetensors` crate
//! takes the last of duplicate names, and allocates a multiple of the header's size to parse it; this reader
//! refuses duplicates and stays within twice the file's size.

use std::ops::Range;

use tch::Kind;

use super::json::{Fault, RawString, Scanner};

/// The longest header, the same limit as in other implementations.
const MAX_HEADER: u64 = 100_000_000;
/// Tensors of models have five dimensions at most; a few more do no harm.
const MAX_RANK: usize = 8;
const METADATA: &str = "__metadata__";

/// The element types that are read and written, with their names.
const DTYPES: [(&str, Kind); 14] = [
    ("BOOL", Kind::Bool),
    ("U8", Kind::Uint8),
    ("I8", Kind::Int8),
    ("I16", Kind::Int16),
    ("I32", Kind::Int),
    ("I64", Kind::Int64),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("F32", Kind::Float),
    ("F64", Kind::Double),
    ("F8_E4M3", Kind::Float8e4m3fn),
    ("F8_E5M2", Kind::Float8e5m2),
    ("F8_E4M3FNUZ", Kind::Float8e4m3fnuz),
    ("F8_E5M2FNUZ", Kind::Float8e5m2fnuz),
];

/// The names of the element types, for errors.
pub(super) fn dtype_names() -> String {
    DTYPES.map(|(name, _)| name).join(", ")
}

/// The name of an element type, if files can hold it.
pub(super) fn dtype_name(kind: Kind) -> Option<&'static str> {
    DTYPES.iter().find(|(_, other)| *other == kind).map(|(name, _)| *name)
}

/// A checked header.
pub(super) struct Header {
    /// All names, one after the other.
    names: String,
    /// All sizes, one shape after the other.
    sizes: Vec<i64>,
    /// Sorted by name.
    entries: Vec<Entry>,
    /// Where the JSON text ends in the file, and the data begin.
    data_at: usize,
}

/// A tensor. Offsets into `names` and `sizes` fit 32 bits, as a header does.
#[derive(Debug, Clone, Copy)]
struct Entry {
    name_at: u32,
    name_length: u32,
    sizes_at: u32,
    rank: u8,
    kind: Kind,
    /// From the beginning of the data.
    begin: u64,
    end: u64,
}

/// A tensor of a header.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorEntry<'a> {
    pub(super) name: &'a str,
    pub(super) kind: Kind,
    pub(super) shape: &'a [i64],
    begin: u64,
    end: u64,
    data_at: usize,
}

impl TensorEntry<'_> {
    /// Where in the file the data lie.
    pub(super) fn range(&self) -> Range<usize> {
        // Both fit: they were checked against the file's length.
        self.data_at + self.begin as usize..self.data_at + self.end as usize
    }
}

impl Header {
    /// Reads and checks the header of a file.
    pub(super) fn read(file: &[u8]) -> Result<Self, Fault> {
        let text = text_range(file)?;
        let data_length = file.len() - text.end;
        let inside = |fault: Fault| Fault { at: fault.at + text.start, ..fault };
        let header = Self::parse(&file[text.clone()], text.end).map_err(inside)?;
        header.check_data(data_length as u64)?;
        Ok(header)
    }

    fn parse(text: &[u8], data_at: usize) -> Result<Self, Fault> {
        std::str::from_utf8(text)
            .map_err(|error| Fault { at: error.valid_up_to(), problem: "not UTF-8".to_owned() })?;
        // Counted first, so that the lists are allocated once and in their exact size.
        let (mut count, mut name_bytes, mut size_count) = (0, 0, 0);
        each_tensor(text, |name, tensor| {
            count += 1;
            name_bytes += name.raw_len();
            size_count += tensor.rank;
            Ok(())
        })?;
        let mut header = Self {
            names: String::with_capacity(name_bytes),
            sizes: Vec::with_capacity(size_count),
            entries: Vec::with_capacity(count),
            data_at,
        };
        each_tensor(text, |name, tensor| {
            let (name_at, sizes_at) = (header.names.len(), header.sizes.len());
            name.push_to(&mut header.names)?;
            header.sizes.extend_from_slice(&tensor.sizes[..tensor.rank]);
            header.entries.push(Entry {
                name_at: name_at as u32,
                name_length: (header.names.len() - name_at) as u32,
                sizes_at: sizes_at as u32,
                rank: tensor.rank as u8,
                kind: tensor.kind,
                begin: tensor.begin,
                end: tensor.end,
            });
            Ok(())
        })?;
        let names = &header.names;
        header.entries.sort_unstable_by(|a, b| a.name(names).cmp(b.name(names)));
        match header.entries.windows(2).find(|pair| pair[0].name(names) == pair[1].name(names)) {
            Some(pair) => Err(Fault {
                at: 0,
                problem: format!("the tensor `{}` is there twice", cut(pair[0].name(names))),
            }),
            None => Ok(header),
        }
    }

    /// Checks that the tensors follow each other without holes, from the beginning of the data to the end.
    fn check_data(&self, data_length: u64) -> Result<(), Fault> {
        let mut order: Vec<u32> = (0..self.entries.len() as u32).collect();
        order.sort_unstable_by_key(|&index| {
            let entry = &self.entries[index as usize];
            (entry.begin, entry.end)
        });
        let mut at = 0;
        for index in order {
            let entry = &self.entries[index as usize];
            if entry.begin != at || entry.end > data_length {
                let problem = format!(
                    "tensor `{}`: expected data that begin at {at} and end by {data_length}, found {} to {}",
                    cut(entry.name(&self.names)),
                    entry.begin,
                    entry.end
                );
                return Err(Fault { at: self.data_at, problem });
            }
            at = entry.end;
        }
        if at != data_length {
            let problem = format!("the tensors take {at} bytes, the file holds {data_length} bytes of data");
            return Err(Fault { at: self.data_at, problem });
        }
        Ok(())
    }

    /// The tensors, sorted by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = TensorEntry<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// A tensor, if it is there.
    pub(super) fn get(&self, name: &str) -> Option<TensorEntry<'_>> {
        let found = self.entries.binary_search_by(|entry| entry.name(&self.names).cmp(name)).ok()?;
        self.entries.get(found).map(|entry| self.view(entry))
    }

    fn view(&self, entry: &Entry) -> TensorEntry<'_> {
        let at = entry.sizes_at as usize;
        TensorEntry {
            name: entry.name(&self.names),
            kind: entry.kind,
            shape: &self.sizes[at..at + usize::from(entry.rank)],
            begin: entry.begin,
            end: entry.end,
            data_at: self.data_at,
        }
    }
}

impl Entry {
    fn name<'a>(&self, names: &'a str) -> &'a str {
        let at = self.name_at as usize;
        &names[at..at + self.name_length as usize]
    }
}

/// The value of a key in `__metadata__`, if it is there.
pub(super) fn metadata(file: &[u8], key: &str) -> Result<Option<String>, Fault> {
    let text = file.get(text_range(file)?).unwrap_or_default();
    let mut found = None;
    Scanner::new(text).object(|scanner, name| {
        if !name.is(METADATA) {
            return scanner.skip();
        }
        scanner.object(|scanner, name| {
            let value = scanner.string()?;
            if name.text()? == key {
                found = Some(value.long_text()?);
            }
            Ok(())
        })
    })?;
    Ok(found)
}

/// Where the JSON text of a file lies.
fn text_range(file: &[u8]) -> Result<Range<usize>, Fault> {
    let fault = |problem: String| Fault { at: 0, problem };
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(fault(format!("expected at least 8 bytes, found {}", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(fault(format!(
            "a header of {length} bytes, expected at most {}",
            MAX_HEADER.min(rest.len() as u64)
        )));
    }
    Ok(8..8 + length as usize)
}

/// A tensor as the header describes it.
struct Described {
    kind: Kind,
    sizes: [i64; MAX_RANK],
    rank: usize,
    begin: u64,
    end: u64,
}

/// Calls `tensor` with each tensor of a header. The whole text is checked.
fn each_tensor<'a>(
    text: &'a [u8],
    mut tensor: impl FnMut(RawString<'a>, &Described) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut scanner = Scanner::new(text);
    let mut metadata_seen = false;
    scanner.object(|scanner, name| {
        if name.is(METADATA) {
            if std::mem::replace(&mut metadata_seen, true) {
                return Err(scanner.fault("`__metadata__` is there twice"));
            }
            return scanner.object(|scanner, _| scanner.string().map(drop));
        }
        let described = describe(scanner)?;
        tensor(name, &described)
    })?;
    scanner.end()
}

/// Reads `{"dtype": …, "shape": […], "data_offsets": […]}`, and checks that they agree.
fn describe(scanner: &mut Scanner<'_>) -> Result<Described, Fault> {
    let (mut kind, mut shape, mut offsets) = (None, None, None);
    scanner.object(|scanner, key| {
        let repeated = if key.is("dtype") {
            kind.replace(dtype(scanner)?).is_some()
        } else if key.is("shape") {
            shape.replace(integers::<MAX_RANK>(scanner, "shape")?).is_some()
        } else if key.is("data_offsets") {
            offsets.replace(integers::<2>(scanner, "data_offsets")?).is_some()
        } else {
            scanner.skip()?;
            false
        };
        if repeated { Err(scanner.fault("a field is there twice")) } else { Ok(()) }
    })?;
    let missing = |field: &str| scanner.fault(format!("a tensor without `{field}`"));
    let kind = kind.ok_or_else(|| missing("dtype"))?;
    let (shape, rank) = shape.ok_or_else(|| missing("shape"))?;
    let ([begin, end], 2) = offsets.ok_or_else(|| missing("data_offsets"))? else {
        return Err(scanner.fault("`data_offsets`: expected two numbers"));
    };
    let width = kind.elt_size_in_bytes() as u64;
    let shape = &shape[..rank];
    // LibTorch computes strides with sizes of 0 taken as 1, so these must not overflow either.
    let fits = shape
        .iter()
        .try_fold(width, |product, &size| product.checked_mul(size.max(1)))
        .is_some_and(|product| i64::try_from(product).is_ok());
    if !fits {
        return Err(scanner.fault(format!("the shape {shape:?} overflows")));
    }
    let bytes = shape.iter().product::<u64>() * width;
    if end.checked_sub(begin) != Some(bytes) {
        return Err(scanner.fault(format!(
            "{kind:?} of shape {shape:?} takes {bytes} bytes, its data_offsets are [{begin}, {end}]"
        )));
    }
    let mut sizes = [0; MAX_RANK];
    for (to, &from) in sizes.iter_mut().zip(shape) {
        *to = from as i64; // fits, as the product does
    }
    Ok(Described { kind, sizes, rank, begin, end })
}

fn dtype(scanner: &mut Scanner<'_>) -> Result<Kind, Fault> {
    let found = scanner.string()?;
    DTYPES.iter().find(|(name, _)| found.is(name)).map(|(_, kind)| *kind).ok_or_else(|| {
        let found = found.text().unwrap_or_default();
        scanner.fault(format!("element type `{}`, expected one of {}", cut(&found), dtype_names()))
    })
}

/// Up to `N` integers, and how many.
fn integers<const N: usize>(scanner: &mut Scanner<'_>, what: &str) -> Result<([u64; N], usize), Fault> {
    let (mut list, mut count) = ([0; N], 0);
    scanner.list(|scanner| {
        let value = scanner.integer()?;
        let Some(slot) = list.get_mut(count) else {
            return Err(scanner.fault(format!("`{what}`: expected at most {N} numbers")));
        };
        *slot = value;
        count += 1;
        Ok(())
    })?;
    Ok((list, count))
}

/// The beginning of a name, for errors.
pub(super) fn cut(name: &str) -> &str {
    name.char_indices().nth(80).map_or(name, |(end, _)| &name[..end])
}
