//! Lanes: what each row of a batch is.

use std::any::Any;

use tch::Tensor;

use crate::{Error, Result};

/// Anything with one entry per batch row: the state of a model, of a control, a column of lanes.
///
/// `reorder` is the one operation that beams, resampling, dropping finished rows and repeating prompts need.
pub trait Rows: Send + Sized + 'static {
    /// Makes row `i` what row `rows[i]` was. A row may be taken several times (a fork) or not at all.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is not a row.
    fn reorder(&mut self, rows: &[i64]) -> Result<()>;
}

impl<S: Clone + Send + 'static> Rows for Vec<S> {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let pick = |&row: &i64| {
            let found = usize::try_from(row).ok().and_then(|row| self.get(row));
            found.cloned().ok_or_else(|| bad_row(row, self.len()))
        };
        *self = rows.iter().map(pick).collect::<Result<_>>()?;
        Ok(())
    }
}

impl Rows for () {
    fn reorder(&mut self, _rows: &[i64]) -> Result<()> {
        Ok(())
    }
}

/// A tensor whose first dimension is the row.
impl Rows for Tensor {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let len = self.size().first().copied().unwrap_or(0);
        if let Some(&row) = rows.iter().find(|&&row| row < 0 || row >= len) {
            return Err(bad_row(row, usize::try_from(len).unwrap_or(0)));
        }
        *self = self.f_index_select(0, &Tensor::f_from_slice(rows)?.f_to_device(self.device())?)?;
        Ok(())
    }
}

fn bad_row(row: i64, len: usize) -> Error {
    Error::value("row", format!("0 .. {len}"), row)
}

trait AnyRows: Any + Send {
    fn reorder_any(&mut self, rows: &[i64]) -> Result<()>;
}

impl<S: Rows> AnyRows for S {
    fn reorder_any(&mut self, rows: &[i64]) -> Result<()> {
        self.reorder(rows)
    }
}

/// Rows of a type that is not known here.
pub struct BoxRows(Box<dyn AnyRows>);

impl BoxRows {
    /// Boxes rows.
    pub fn new(rows: impl Rows) -> Self {
        Self(Box::new(rows))
    }

    /// The rows, if they are of type `T`.
    pub fn get<T: 'static>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }

    /// The rows, which should be of type `T`.
    ///
    /// # Errors
    /// [`Error::ForeignState`] where they are not.
    pub fn expect<T: 'static>(&self) -> Result<&T> {
        self.get().ok_or(Error::ForeignState { expected: std::any::type_name::<T>() })
    }

    /// The rows, which should be of type `T`.
    ///
    /// # Errors
    /// [`Error::ForeignState`] where they are not.
    pub fn expect_mut<T: 'static>(&mut self) -> Result<&mut T> {
        let any: &mut dyn Any = &mut *self.0;
        any.downcast_mut().ok_or(Error::ForeignState { expected: std::any::type_name::<T>() })
    }
}

impl Rows for BoxRows {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder_any(rows)
    }
}

/// What one batch row is. A control that needs to know more of a row brings a column of its own ([`Lanes::with`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lane {
    /// Which sample of the run.
    pub sample: u32,
    /// Under which condition: unconditional, source prompt, edited prompt.
    pub condition: u32,
    /// Which variant of the forward pass: 0 is the plain one.
    pub variant: u8,
}

/// What every batch row is: one [`Lane`] a row, and typed columns.
#[derive(Clone, Default)]
pub struct Lanes {
    rows: Vec<Lane>,
    columns: Vec<Column>,
}

/// Rows of a type that is not known here, which can be cloned.
struct Column(Box<dyn AnyColumn>);

trait AnyColumn: AnyRows {
    fn clone_any(&self) -> Column;
}

impl<S: Rows + Clone> AnyColumn for S {
    fn clone_any(&self) -> Column {
        Column(Box::new(self.clone()))
    }
}

impl Clone for Column {
    fn clone(&self) -> Self {
        (*self.0).clone_any()
    }
}

impl Lanes {
    /// Lanes with no columns.
    pub fn new(rows: Vec<Lane>) -> Self {
        Self { rows, columns: Vec::new() }
    }

    /// One plain lane for each of `rows` samples.
    pub fn samples(rows: usize) -> Self {
        let lane = |sample| Lane { sample, ..Lane::default() };
        Self::new((0..u32::try_from(rows).unwrap_or(u32::MAX)).map(lane).collect())
    }

    /// Adds a column, one entry a row, found again by its type.
    #[must_use]
    pub fn with(mut self, column: impl Rows + Clone) -> Self {
        self.columns.push(Column(Box::new(column)));
        self
    }

    /// The column of type `T`.
    pub fn get<T: 'static>(&self) -> Option<&T> {
        self.columns.iter().find_map(|column| {
            let any: &dyn Any = &*column.0;
            any.downcast_ref()
        })
    }

    /// The rows.
    pub fn rows(&self) -> &[Lane] {
        &self.rows
    }

    /// The rows of condition `to`, and for each the row of condition `from` with the same sample and variant.
    /// Rows without a partner are left out.
    pub fn pairs(&self, from: u32, to: u32) -> (Vec<i64>, Vec<i64>) {
        let with_condition =
            |condition| (0i64..).zip(&self.rows).filter(move |(_, lane)| lane.condition == condition);
        with_condition(to)
            .filter_map(|(i, lane)| {
                let partner = Lane { condition: from, ..*lane };
                with_condition(from).find(|(_, other)| **other == partner).map(|(j, _)| (i, j))
            })
            .unzip()
    }
}

impl Rows for Lanes {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.rows.reorder(rows)?;
        self.columns.iter_mut().try_for_each(|column| column.0.reorder_any(rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reorder_carries_the_columns() {
        let lane = |sample, condition| Lane { sample, condition, variant: 0 };
        let mut lanes = Lanes::new(vec![lane(0, 0), lane(1, 0)]).with(vec!["a", "b"]);
        lanes.reorder(&[1, 1, 0]).unwrap();
        assert_eq!(lanes.get::<Vec<&str>>().unwrap(), &["b", "b", "a"]);
        assert_eq!(lanes.rows()[2].sample, 0);
        assert!(lanes.reorder(&[3]).is_err());
        assert!(lanes.get::<Vec<u8>>().is_none());
    }

    #[test]
    fn pairs_go_by_sample_and_variant() {
        let lane = |sample, condition| Lane { sample, condition, variant: 0 };
        let lanes = Lanes::new(vec![lane(0, 0), lane(1, 0), lane(1, 1), lane(0, 1), lane(2, 1)]);
        assert_eq!(lanes.pairs(0, 1), (vec![2, 3], vec![1, 0]));
    }

    #[test]
    fn tensors_are_rows() {
        let mut t = Tensor::from_slice(&[10i64, 20, 30]);
        t.reorder(&[2, 0]).unwrap();
        assert_eq!(Vec::<i64>::try_from(&t).unwrap(), [30, 10]);
        assert!(t.reorder(&[2]).is_err());
    }
}
