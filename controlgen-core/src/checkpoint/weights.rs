//! The loader that is handed to models.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::TensorSource;
use super::report::{Report, matches};
use crate::{Error, Result};

/// Takes tensors out of a checkpoint by name, and remembers what was taken and what was missing.
///
/// A name that is missing is recorded and gives a placeholder, so that [`finish`](Self::finish) can list all
/// of them at once. A model is only valid if `finish` (or [`finish_lenient`](Self::finish_lenient), and a
/// look at its report) says so: call it when everything has been asked for.
///
/// ```
/// # use controlgen_core::{Result, checkpoint::{Safetensors, Weights, save}};
/// # use tch::{Device, Kind, Tensor};
/// # fn main() -> Result<()> {
/// # let path = std::env::temp_dir().join("controlgen-weights-doctest.safetensors");
/// # let ones = Tensor::f_ones([4], (Kind::Float, Device::Cpu))?;
/// # save(&path, &[("model.norm.weight".to_owned(), ones)], &[])?;
/// let checkpoint = Safetensors::open(&path)?;
/// let weights = Weights::new(&checkpoint, (Kind::BFloat16, Device::Cpu));
/// let norm = weights.scope("model").scope("norm").get("weight", &[4])?;
/// let report = weights.finish(&["*.rotary_emb.inv_freq"])?;
/// # assert_eq!(norm.size(), [4]);
/// # assert_eq!(report.used, ["model.norm.weight"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Weights<'a> {
    source: &'a dyn TensorSource,
    placement: (Kind, Device),
    prefix: String,
    candidates: Option<Rc<Candidates<'a>>>,
    record: Rc<RefCell<Record>>,
}

type Candidates<'a> = dyn Fn(&str) -> Vec<String> + 'a;

#[derive(Default)]
struct Record {
    used: BTreeSet<String>,
    /// With the shapes that were asked for.
    missing: BTreeMap<String, Vec<i64>>,
}

impl<'a> Weights<'a> {
    /// A loader whose tensors get this element type and lie on this device.
    pub fn new(source: &'a dyn TensorSource, placement: (Kind, Device)) -> Self {
        Self { source, placement, prefix: String::new(), candidates: None, record: Rc::default() }
    }

    /// A loader for the names below `name`, joined by a dot. It shares the record of this one.
    pub fn scope(&self, name: impl AsRef<str>) -> Self {
        Self { prefix: self.full(name.as_ref()), ..self.clone() }
    }

    /// Asks for `candidates(name)` instead of each full name: the first of them that the checkpoint has is
    /// taken.
    ///
    /// [`prefixes`] makes the usual function. It replaces one that was set before, here and in scopes taken
    /// from the result; the record stays shared.
    pub fn rename(&self, candidates: impl Fn(&str) -> Vec<String> + 'a) -> Self {
        Self { candidates: Some(Rc::new(candidates)), ..self.clone() }
    }

    /// The same names, read as another element type or onto another device.
    pub fn placed(&self, placement: (Kind, Device)) -> Self {
        Self { placement, ..self.clone() }
    }

    /// The full name of something in this scope.
    pub fn full(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    /// The name under which the checkpoint has something of this scope, if it does.
    pub fn find(&self, name: &str) -> Option<String> {
        let full = self.full(name);
        match &self.candidates {
            None => self.source.info(&full).is_some().then_some(full),
            Some(candidates) => candidates(&full).into_iter().find(|name| self.source.info(name).is_some()),
        }
    }

    /// The shape of a tensor, if the checkpoint has it. Asking does not count as use.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.source.info(&self.find(name)?)?.shape)
    }

    /// Reads a tensor of exactly this shape.
    ///
    /// If the checkpoint has no such tensor, a placeholder is returned: zeros of this shape that take no
    /// memory.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Kind`] if the checkpoint's tensor has another shape, or an element type
    /// that does not convert; otherwise as [`TensorSource::read`].
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        match self.optional(name, shape)? {
            Some(tensor) => Ok(tensor),
            None => self.missing(name, shape),
        }
    }

    /// Reads a tensor of exactly this shape, or none if the checkpoint does not have it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn optional(&self, name: &str, shape: &[i64]) -> Result<Option<Tensor>> {
        let Some(source_name) = self.find(name) else { return Ok(None) };
        self.check(&source_name, shape)?;
        let mut tensor = Tensor::f_empty(shape, self.placement)?;
        self.read(source_name, &mut tensor)?;
        Ok(Some(tensor))
    }

    /// Reads a matrix that the checkpoint stores as `[columns, rows]`, the transpose of what is asked for, as
    /// GPT-2 stores the weights of its linear layers. `shape` is that of the result, which is contiguous.
    ///
    /// # Errors
    /// As [`get`](Self::get), and [`Error::Shape`] if `shape` does not have two dimensions.
    pub fn transposed(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let &[rows, columns] = shape else {
            return Err(Error::shape(self.full(name), "[rows, columns]", shape));
        };
        let Some(source_name) = self.find(name) else { return self.missing(name, shape) };
        self.check(&source_name, &[columns, rows])?;
        let tensor = Tensor::f_empty(shape, self.placement)?;
        self.read(source_name, &mut tensor.f_transpose(0, 1)?)?;
        Ok(tensor)
    }

    /// Reads several tensors as one, joined along the first dimension: the weights of projections that are
    /// computed together. Each is read straight into its place, so that nothing is held twice.
    ///
    /// # Errors
    /// As [`get`](Self::get); and [`Error::Shape`] if the shapes differ in another dimension than the first,
    /// or have none.
    pub fn fused(&self, parts: &[(&str, &[i64])]) -> Result<Tensor> {
        let Some((name, [_, rest @ ..])) = parts.first() else {
            return Err(Error::value(
                "parts of a fused tensor",
                "one at least, of one dimension at least",
                "none",
            ));
        };
        let mut rows = 0_i64;
        for (other, part) in parts {
            let first = part.first().copied().filter(|&first| first >= 0 && part.get(1..) == Some(rest));
            let total = first.and_then(|first| rows.checked_add(first));
            rows = total.ok_or_else(|| {
                Error::shape(self.full(other), format!("[n, {rest:?}] as `{}`", self.full(name)), part)
            })?;
        }
        let shape: Vec<i64> = std::iter::once(rows).chain(rest.iter().copied()).collect();
        let mut found = Vec::with_capacity(parts.len());
        for (name, part) in parts {
            match self.find(name) {
                Some(source_name) => {
                    self.check(&source_name, part)?;
                    found.push(source_name);
                }
                None => drop(self.missing(name, part)?),
            }
        }
        if found.len() < parts.len() {
            // The record is what counts; the tensors that are there have been used as far as it is concerned.
            self.record.borrow_mut().used.extend(found);
            return self.placeholder(&shape);
        }
        let tensor = Tensor::f_empty(&shape, self.placement)?;
        let mut at = 0;
        for (source_name, (_, part)) in found.into_iter().zip(parts) {
            let length = part.first().copied().unwrap_or(0);
            self.read(source_name, &mut tensor.f_narrow(0, at, length)?)?;
            at += length;
        }
        Ok(tensor)
    }

    /// Ends loading, strictly: nothing may be missing, and nothing left over but names that match one of the
    /// patterns in `ignore`, in which `*` stands for any run of characters.
    ///
    /// # Errors
    /// [`Error::Keys`] with all names that are missing and all that are left over.
    pub fn finish(&self, ignore: &[&str]) -> Result<Report> {
        let report = self.finish_lenient(ignore);
        if report.missing.is_empty() && report.unexpected.is_empty() {
            return Ok(report);
        }
        Err(Error::Keys { what: self.source.what(), missing: report.missing, unexpected: report.unexpected })
    }

    /// Ends loading, and leaves it to the caller what to make of names that are missing (whose tensors are zeros) or left
    /// over.
    pub fn finish_lenient(&self, ignore: &[&str]) -> Report {
        self.source.finished();
        let record = self.record.borrow();
        let left = |name: &String| {
            !record.used.contains(name) && !ignore.iter().any(|pattern| matches(pattern, name))
        };
        let mut unexpected: Vec<String> = self.source.names().into_iter().filter(left).collect();
        unexpected.sort_unstable();
        Report {
            used: record.used.iter().cloned().collect(),
            missing: record.missing.keys().cloned().collect(),
            unexpected,
        }
    }

    /// What was asked for and missing: names and shapes.
    pub fn missing_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let record = self.record.borrow();
        record.missing.iter().map(|(name, shape)| (name.clone(), shape.clone())).collect()
    }

    fn check(&self, source_name: &str, shape: &[i64]) -> Result<()> {
        match self.source.info(source_name) {
            Some(info) if info.shape != shape => Err(Error::shape(
                format!("{}: tensor `{source_name}`", self.source.what()),
                format!("{shape:?}"),
                &info.shape,
            )),
            _ => Ok(()),
        }
    }

    fn read(&self, source_name: String, into: &mut Tensor) -> Result<()> {
        self.source.read(&source_name, into)?;
        self.record.borrow_mut().used.insert(source_name);
        Ok(())
    }

    fn missing(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let placeholder = self.placeholder(shape)?;
        self.record.borrow_mut().missing.insert(self.full(name), shape.to_vec());
        Ok(placeholder)
    }

    /// Zeros that take the memory of one.
    fn placeholder(&self, shape: &[i64]) -> Result<Tensor> {
        if let Some(negative) = shape.iter().find(|&&size| size < 0) {
            return Err(Error::value(format!("a size in {}", self.full("")), ">= 0", negative));
        }
        let one = Tensor::f_zeros(vec![1; shape.len()], self.placement)?;
        Ok(one.f_expand(shape, false)?)
    }
}

/// A function for [`Weights::rename`]: a name as it is, then with each `from` at its beginning replaced by
/// `to`.
///
/// `prefixes(&[("model.", ""), ("", "transformer.")])` also finds `model.x` as `x`, and `x` as
/// `transformer.x`.
pub fn prefixes(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Vec<String> + use<> {
    let pairs: Vec<(String, String)> =
        pairs.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect();
    move |name| {
        let replaced =
            |(from, to): &(String, String)| Some(format!("{to}{}", name.strip_prefix(from.as_str())?));
        std::iter::once(name.to_owned()).chain(pairs.iter().filter_map(replaced)).collect()
    }
}
