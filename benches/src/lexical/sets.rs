//! Concept sets from a file.

use std::ops::Index;
use std::path::Path;

use controlgen_core::{Error, Result};
use serde::Deserialize;

/// Sets of words that a text is to say, each word as its forms, the plain one first.
#[derive(Deserialize)]
pub struct ConceptSets {
    sets: Vec<Vec<Vec<String>>>,
}

impl ConceptSets {
    /// A file as `benches/reference/concept_sets.py` makes it.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        let read: Self = serde_json::from_str(&text).map_err(|source| Error::format(path, source))?;
        let bad = read.sets.iter().position(|set| set.is_empty() || set.iter().any(Vec::is_empty));
        match bad {
            Some(bad) => Err(Error::format(path, format!("set {bad}: expected words with one form or more"))),
            None => Ok(read),
        }
    }

    /// The first `n`, spread over the file; all, unless said.
    pub fn first(mut self, n: Option<usize>) -> Result<Self> {
        let all = self.sets.len();
        let n = n.unwrap_or(all);
        if n == 0 || n > all {
            return Err(Error::value("--sets", format!("1 ..= {all}"), n));
        }
        // An order that does not depend on n: a run of more sets goes on where one of fewer ended.
        let stride =
            (1..all).rev().find(|&stride| stride * 2 <= all + 1 && coprime(stride, all)).unwrap_or(1);
        self.sets = (0..n).map(|i| self.sets[i * stride % all].clone()).collect();
        Ok(self)
    }

    pub fn len(&self) -> usize {
        self.sets.len()
    }
}

impl Index<usize> for ConceptSets {
    type Output = [Vec<String>];
    fn index(&self, i: usize) -> &[Vec<String>] {
        &self.sets[i]
    }
}

fn coprime(a: usize, b: usize) -> bool {
    if b == 0 { a == 1 } else { coprime(b, a % b) }
}

/// The plain forms of a set.
pub fn plain(set: &[Vec<String>]) -> Vec<String> {
    set.iter().filter_map(|forms| forms.first().cloned()).collect()
}
