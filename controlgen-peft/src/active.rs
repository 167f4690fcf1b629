//! Which adapters of a stack act on which rows of a batch.

use controlgen_core::{Adapter, AdapterId, Error, Lanes, Pass, Result, Rows};
use tch::{Device, Tensor};

/// A column of [`Lanes`](controlgen_core::Lanes): for each row, which adapters of the stack act on it: none, one or
/// several. Without this column all act on all rows.
///
/// ```
/// # use controlgen_core::{Adapter, Lanes, LanguageModel, Result, testing::TableLm};
/// # use controlgen_peft::{ActiveAdapters, Lora, LoraConfig, Targets};
/// # fn main() -> Result<()> {
/// # let lm = TableLm::random(6, 1)?;
/// # let config = LoraConfig { r: 2, target_modules: Targets::names(["lm_head"]), ..LoraConfig::default() };
/// let poet = Lora::new(config.clone(), lm.sites(), 1)?;
/// let clerk = Lora::new(config, lm.sites(), 2)?;
/// let adapters: [(&str, &dyn Adapter); 2] = [("poet", &poet), ("clerk", &clerk)];
/// let rows = [vec!["poet"], vec![], vec!["poet", "clerk"]];
/// let lanes = Lanes::samples(3).with(ActiveAdapters::new(&adapters, &rows)?);
/// # assert_eq!(lanes.rows().len(), 3);
/// # assert!(ActiveAdapters::new(&adapters, &[["dancer"]]).is_err());
/// # Ok(())
/// # }
/// ```
pub struct ActiveAdapters {
    adapters: Vec<(AdapterId, Acting)>,
    rows: usize,
    device: Device,
}

impl ActiveAdapters {
    /// The adapters of a stack under names, and for each row the names of those that act on it.
    ///
    /// Every adapter of the stack is to be named, those that act on no row too.
    ///
    /// # Errors
    /// [`Error::Value`] for a name that is not among `adapters`, for a name or an adapter given twice.
    pub fn new<R, S>(adapters: &[(&str, &dyn Adapter)], rows: &[R]) -> Result<Self>
    where
        R: AsRef<[S]>,
        S: AsRef<str>,
    {
        for (i, (name, adapter)) in adapters.iter().enumerate() {
            if adapters[..i].iter().any(|(other, it)| other == name || it.id() == adapter.id()) {
                return Err(Error::value("names of adapters", "each name and each adapter once", name));
            }
        }
        let mut acts = vec![vec![false; rows.len()]; adapters.len()];
        for (row, names) in rows.iter().enumerate() {
            for name in names.as_ref() {
                let name = name.as_ref();
                let Some(found) = adapters.iter().position(|(known, _)| *known == name) else {
                    let known = adapters.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                    let what = format!("adapter of row {row}");
                    return Err(Error::value(what, format!("one of {known}"), format!("`{name}`")));
                };
                acts[found][row] = true;
            }
        }
        let acting = |(adapter, rows): (&(&str, &dyn Adapter), _)| {
            Ok((adapter.1.id(), Acting::of(rows, Device::Cpu)?))
        };
        let adapters_acting = adapters.iter().zip(acts).map(acting).collect::<Result<_>>()?;
        Ok(Self { adapters: adapters_acting, rows: rows.len(), device: Device::Cpu })
    }

    /// The same, with the indices of the rows kept on the model's device. The CPU unless said.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn on(self, device: Device) -> Result<Self> {
        let moved = |(id, acting): (AdapterId, Acting)| Ok((id, Acting::of(acting.rows, device)?));
        let adapters = self.adapters.into_iter().map(moved).collect::<Result<_>>()?;
        Ok(Self { adapters, device, ..self })
    }

    fn of(&self, id: AdapterId) -> Result<&Acting> {
        let found = self.adapters.iter().find(|(other, _)| *other == id);
        found.map(|(_, acting)| acting).ok_or_else(|| {
            let expected = "every adapter of the stack among the names given";
            Error::value("the column ActiveAdapters", expected, "an adapter that is not")
        })
    }
}

impl Clone for ActiveAdapters {
    fn clone(&self) -> Self {
        let adapters = self.adapters.iter().map(|(id, acting)| (*id, acting.handle())).collect();
        Self { adapters, ..*self }
    }
}

impl Rows for ActiveAdapters {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let picked = |(id, acting): &(AdapterId, Acting)| {
            let mut of_rows = acting.rows.clone();
            of_rows.reorder(rows)?;
            Ok((*id, Acting::of(of_rows, self.device)?))
        };
        self.adapters = self.adapters.iter().map(picked).collect::<Result<_>>()?;
        self.rows = rows.len();
        Ok(())
    }
}

/// On which rows one adapter acts.
pub(crate) struct Acting {
    rows: Vec<bool>,
    /// `rows`, boolean `[B]`.
    pub(crate) mask: Tensor,
    pub(crate) which: Which,
}

pub(crate) enum Which {
    All,
    None,
    /// `start .. start + len`
    Range(i64, i64),
    /// int64 `[n]`, ascending
    Index(Tensor),
}

impl Acting {
    fn of(rows: Vec<bool>, device: Device) -> Result<Self> {
        let on: Vec<i64> = (0i64..).zip(&rows).filter(|(_, on)| **on).map(|(row, _)| row).collect();
        let which = match (on.first(), on.last()) {
            (Some(_), Some(_)) if on.len() == rows.len() => Which::All,
            (Some(&first), Some(&last)) if on.len() as i64 == last - first + 1 => {
                Which::Range(first, last - first + 1)
            }
            (Some(_), Some(_)) => Which::Index(Tensor::f_from_slice(&on)?.f_to_device(device)?),
            _ => Which::None,
        };
        let mask = Tensor::f_from_slice(&rows)?.f_to_device(device)?;
        Ok(Self { rows, mask, which })
    }

    fn handle(&self) -> Self {
        let which = match &self.which {
            Which::All => Which::All,
            Which::None => Which::None,
            Which::Range(start, len) => Which::Range(*start, *len),
            Which::Index(index) => Which::Index(index.shallow_clone()),
        };
        Self { rows: self.rows.clone(), mask: self.mask.shallow_clone(), which }
    }

    /// Of each row.
    pub(crate) fn rows(&self) -> &[bool] {
        &self.rows
    }
}

/// On which rows an adapter acts; on all where `None`.
pub(crate) fn acting(lanes: Option<&Lanes>, id: AdapterId) -> Result<Option<&Acting>> {
    let Some(lanes) = lanes else { return Ok(None) };
    let Some(column) = lanes.get::<ActiveAdapters>() else { return Ok(None) };
    if column.rows != lanes.rows().len() {
        let expected = format!("{}, one a lane", lanes.rows().len());
        return Err(Error::value("rows of the column ActiveAdapters", expected, column.rows));
    }
    column.of(id).map(Some)
}

/// y with the rows that an adapter acts on replaced by `f(their x, their y)`; x and y `[B, ..]`.
///
/// `f` works on those rows alone. Neither x nor y is written to.
pub(crate) fn on_rows(
    pass: &Pass<'_>,
    id: AdapterId,
    x: &Tensor,
    y: Tensor,
    f: impl FnOnce(&Tensor, Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(acting) = acting(pass.lanes, id)? else { return f(x, y) };
    let batch = y.size().first().copied().unwrap_or(0);
    if i64::try_from(acting.rows.len()) != Ok(batch) {
        let expected = format!("{batch}, one a row of the batch");
        return Err(Error::value("rows of the column ActiveAdapters", expected, acting.rows.len()));
    }
    match &acting.which {
        Which::All => f(x, y),
        Which::None => Ok(y),
        Which::Range(start, len) => {
            let part = |t: &Tensor| t.f_narrow(0, *start, *len);
            let new = f(&part(x)?, part(&y)?)?;
            Ok(y.f_slice_scatter(&new, 0, *start, start + len, 1)?)
        }
        Which::Index(index) => {
            let index = index.f_to_device(y.device())?;
            let new = f(&x.f_index_select(0, &index)?, y.f_index_select(0, &index)?)?;
            Ok(y.f_index_copy(0, &index, &new)?)
        }
    }
}
