//! What a decoder remembers: keys and values of the tokens it has read, and which of them are padding.

use std::sync::Arc;

use controlgen_core::layers::{Rotary, Rotations};
use controlgen_core::{Error, LmInput, Mask, Offset, Placement, Result, SiteMap, State, StateImpl};
use tch::{Device, Kind, Tensor};

/// Keys and values of every layer, in buffers with room to grow.
///
/// Forks share the buffers until one of them writes (copy on write). When a graph is being recorded, buffers are
/// replaced instead of written, since autograd refuses the write.
pub struct KvCache {
    /// The sites of the model that started it: what tells that model, and its handles, from others.
    sites: Arc<SiteMap>,
    layers: Vec<Layer>,
    /// Positions held, padding included.
    len: i64,
    rows: i64,
    /// Boolean `[B, len]`, false for padding; `None` while there is none.
    keep: Option<Tensor>,
    /// Room asked for by `reserve`.
    reserved: i64,
    context: i64,
    /// Shared by all forks that still use the same buffers.
    owner: Arc<()>,
}

/// Buffers `[B, heads, capacity, head_dim]`; none before the first token.
struct Layer {
    k: Option<Tensor>,
    v: Option<Tensor>,
}

/// Where the tokens of a pass stand, and what they see.
pub struct Placed {
    /// How many tokens are new.
    pub len: i64,
    /// What each query sees of all keys.
    pub mask: Mask,
    positions: Positions,
    /// Which of all positions are no padding, once this pass is done; `None` while there is no padding.
    keep: Option<Tensor>,
}

enum Positions {
    /// `start .. start + len` in every row
    Range(i64),
    /// `[B, len]`
    Rows(Tensor),
}

impl Placed {
    /// The positions `[1 or B, len]`, where they do not just count on in every row.
    pub fn rows(&self) -> Option<&Tensor> {
        match &self.positions {
            Positions::Range(_) => None,
            Positions::Rows(positions) => Some(positions),
        }
    }

    /// Rotations for these positions.
    pub fn rotations(&self, rotary: &Rotary) -> Result<Rotations> {
        match &self.positions {
            Positions::Range(start) => rotary.range(*start, self.len),
            Positions::Rows(positions) => rotary.at(positions),
        }
    }

    /// Rows of a table `[context, D]` of learned positions: `[1 or B, len, D]`.
    pub fn lookup(&self, table: &Tensor) -> Result<Tensor> {
        match &self.positions {
            Positions::Range(start) => Ok(table.f_narrow(0, *start, self.len)?.f_unsqueeze(0)?),
            Positions::Rows(positions) => {
                let limit = table.size()[0];
                let (low, high) = positions.f_aminmax(None, false)?;
                let (low, high) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?);
                if low < 0 {
                    return Err(Error::value("position", format!("0 .. {limit}"), low));
                }
                if high >= limit {
                    return Err(Error::Context { limit, needed: high.saturating_add(1) });
                }
                Ok(Tensor::f_embedding(table, positions, -1, false, false)?)
            }
        }
    }
}

impl KvCache {
    /// An empty cache for `rows` rows of the model with these sites.
    pub fn new(sites: &Arc<SiteMap>, layers: usize, rows: i64, context: i64) -> Self {
        let layers = std::iter::repeat_with(|| Layer { k: None, v: None }).take(layers).collect();
        Self {
            sites: Arc::clone(sites),
            layers,
            len: 0,
            rows,
            keep: None,
            reserved: 0,
            context,
            owner: Arc::new(()),
        }
    }

    /// The cache in a state that the model with these sites started.
    pub fn of<'s>(state: &'s mut State, sites: &Arc<SiteMap>) -> Result<&'s mut Self> {
        let expected = "one that this model started";
        let cache: &mut Self = state.downcast(expected)?;
        cache.check(sites)?;
        Ok(cache)
    }

    /// Refuses a cache of another model than the one with these sites.
    pub fn check(&self, sites: &Arc<SiteMap>) -> Result<()> {
        let expected = "one that this model started";
        if Arc::ptr_eq(&self.sites, sites) { Ok(()) } else { Err(Error::ForeignState { expected }) }
    }

    /// A fork: the buffers are shared until one of both writes.
    pub fn share(&self) -> Self {
        let same = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        Self {
            sites: Arc::clone(&self.sites),
            layers: self.layers.iter().map(|l| Layer { k: same(&l.k), v: same(&l.v) }).collect(),
            keep: same(&self.keep),
            owner: Arc::clone(&self.owner),
            ..*self
        }
    }

    /// Places the new tokens `[B, T]` of `input` after those held; positions count from `offset`.
    pub fn place(
        &self,
        input: &LmInput<'_>,
        (batch, len): (i64, i64),
        offset: &Offset,
        placement: Placement,
    ) -> Result<Placed> {
        if batch != self.rows {
            return Err(Error::value("rows of the input", format!("{} as the state has", self.rows), batch));
        }
        let needed = self.len + len + offset.most();
        if needed > self.context {
            return Err(Error::Context { limit: self.context, needed });
        }
        let device = placement.device;
        let new = match input.keep {
            Some(keep) if !keep.f_all()?.f_int64_value(&[])?.eq(&1) => Some(keep.f_to_device(device)?),
            _ => None,
        };
        let padded = new.is_some() || self.keep.is_some();
        let offset_by = |positions: Tensor| -> Result<Tensor> {
            Ok(match offset {
                Offset::All(0) => positions,
                Offset::All(n) => positions.f_add_scalar(*n)?,
                Offset::Rows(rows) => {
                    if i64::try_from(rows.len()) != Ok(batch) {
                        return Err(Error::value("rows of the position offset", batch, rows.len()));
                    }
                    positions.f_add(&Tensor::f_from_slice(rows)?.f_to_device(device)?.f_unsqueeze(1)?)?
                }
            })
        };
        let positions = match (input.positions, padded, offset) {
            (Some(positions), ..) => Positions::Rows(offset_by(positions.f_to_device(device)?)?),
            (None, false, Offset::All(n)) => Positions::Range(self.len + n),
            (None, false, Offset::Rows(_)) => {
                let range = Tensor::f_arange_start(self.len, self.len + len, (Kind::Int64, device))?;
                Positions::Rows(offset_by(range.f_unsqueeze(0)?)?)
            }
            (None, true, _) => {
                let mut positions = match &new {
                    Some(keep) => keep.f_cumsum(1, Kind::Int64)?.f_sub_scalar(1)?,
                    None => Tensor::f_arange(len, (Kind::Int64, device))?
                        .f_unsqueeze(0)?
                        .f_expand([batch, -1], false)?,
                };
                if let Some(keep) = &self.keep {
                    let before = keep.f_sum_dim_intlist(&[1i64][..], true, Kind::Int64)?;
                    positions = positions.f_add(&before)?;
                } else {
                    positions = positions.f_add_scalar(self.len)?;
                }
                Positions::Rows(offset_by(positions.f_clamp_min(0)?)?)
            }
        };
        if !padded {
            return Ok(Placed { len, mask: Mask::Causal, positions, keep: None });
        }
        let keep = self.keep_with(new.as_ref(), len, placement)?;
        let columns = keep.f_unsqueeze(1)?.f_unsqueeze(1)?; // (B, 1, 1, Tk)
        let mask = if len == 1 {
            Mask::Keep(columns)
        } else {
            let ones = Tensor::f_ones([len, self.len + len], (Kind::Bool, device))?;
            let causal = ones.f_tril(self.len)?;
            // Padding sees itself, so that no row of scores is empty.
            let itself = causal.f_triu(self.len)?;
            Mask::Keep(columns.f_logical_and(&causal)?.f_logical_or(&itself)?)
        };
        Ok(Placed { len, mask, positions, keep: Some(keep) })
    }

    /// Which of the positions held and the `len` new ones are no padding: `[B, len + new]`.
    fn keep_with(&self, new: Option<&Tensor>, len: i64, placement: Placement) -> Result<Tensor> {
        let ones = |n| Tensor::f_ones([self.rows, n], (Kind::Bool, placement.device));
        let old = self.keep.as_ref().map_or_else(|| ones(self.len), |keep| Ok(keep.shallow_clone()))?;
        let new = new.map_or_else(|| ones(len), |keep| Ok(keep.shallow_clone()))?;
        Ok(Tensor::f_cat(&[&old, &new], 1)?)
    }

    /// Adds a layer's new keys and values `[B, heads, T, head_dim]`; gives all of them.
    pub fn push(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let recorded = |t: &Option<Tensor>| t.as_ref().is_some_and(Tensor::requires_grad);
        let held = &self.layers[layer];
        if k.requires_grad() || v.requires_grad() || recorded(&held.k) || recorded(&held.v) {
            let len = self.len;
            let join = |held: &Option<Tensor>, new: &Tensor| -> Result<Tensor> {
                Ok(match held {
                    Some(held) => Tensor::f_cat(&[&held.f_narrow(2, 0, len)?, new], 2)?,
                    None => new.shallow_clone(),
                })
            };
            let (k, v) = (join(&held.k, k)?, join(&held.v, v)?);
            let all = (k.shallow_clone(), v.shallow_clone());
            self.layers[layer] = Layer { k: Some(k), v: Some(v) };
            return Ok(all);
        }
        self.unshare()?;
        let needed = self.len + k.size()[2];
        // Room for a few dozen more, then half as much again, so that growing costs little by the token.
        let room = (needed + (needed >> 1) + 32).max(self.reserved).min(self.context.max(needed));
        let held = &mut self.layers[layer];
        let k = write(&mut held.k, k, self.len, room)?;
        let v = write(&mut held.v, v, self.len, room)?;
        Ok((k, v))
    }

    /// Counts the pass's tokens as read.
    pub fn commit(&mut self, placed: Placed) {
        self.keep = placed.keep;
        self.len += placed.len;
    }

    /// Gives this fork buffers of its own, if others use them too.
    fn unshare(&mut self) -> Result<()> {
        if Arc::strong_count(&self.owner) == 1 {
            return Ok(());
        }
        let len = self.len;
        for layer in &mut self.layers {
            for buffer in [&mut layer.k, &mut layer.v].into_iter().flatten() {
                *buffer = with_room(buffer, len, buffer.size()[2])?;
            }
        }
        self.owner = Arc::new(());
        Ok(())
    }
}

/// Writes new keys or values after the `len` held, growing the buffer to `room` where it is too small.
fn write(buffer: &mut Option<Tensor>, new: &Tensor, len: i64, room: i64) -> Result<Tensor> {
    let &[rows, heads, added, width] = new.size().as_slice() else {
        return Err(Error::shape("keys and values", "[B, heads, T, head_dim]", &new.size()));
    };
    let needed = len + added;
    let grown = match &*buffer {
        Some(held) if held.size()[2] >= needed => held.shallow_clone(),
        Some(held) => with_room(held, len, room)?,
        None => Tensor::f_empty([rows, heads, room, width], (new.f_kind()?, new.device()))?,
    };
    grown.f_narrow(2, len, added)?.f_copy_(new)?;
    let all = grown.f_narrow(2, 0, needed)?;
    // Only now: what is held stays whole if there was no memory for more.
    *buffer = Some(grown);
    Ok(all)
}

/// A new buffer with room for `room` positions, of which the first `len` are `held`'s.
fn with_room(held: &Tensor, len: i64, room: i64) -> Result<Tensor> {
    let mut shape = held.size();
    shape[2] = room;
    let buffer = Tensor::f_empty(shape, (held.f_kind()?, held.device()))?;
    buffer.f_narrow(2, 0, len)?.f_copy_(&held.f_narrow(2, 0, len)?)?;
    Ok(buffer)
}

impl StateImpl for KvCache {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(self.share()))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let count = i64::try_from(rows.len()).unwrap_or(i64::MAX);
        let len = self.len;
        // No rows until all is done: without memory for it, the layers would disagree.
        self.rows = 0;
        // All buffers are on one device: the index is brought there once.
        let buffers = self.layers.iter().find_map(|layer| layer.k.as_ref());
        let device = buffers.or(self.keep.as_ref()).map_or(Device::Cpu, Tensor::device);
        let index = Tensor::f_from_slice(rows)?.f_to_device(device)?;
        for layer in &mut self.layers {
            for buffer in [&mut layer.k, &mut layer.v].into_iter().flatten() {
                let used = buffer.f_narrow(2, 0, len)?;
                *buffer = if used.requires_grad() {
                    used.f_index_select(0, &index)?
                } else {
                    // Straight to its place: beams do this at every step.
                    let mut shape = buffer.size();
                    shape[0] = count;
                    let rows = Tensor::f_empty(shape, (buffer.f_kind()?, buffer.device()))?;
                    let _ = used.f_index_select_out(&rows.f_narrow(2, 0, len)?, 0, &index)?;
                    rows
                };
            }
        }
        if let Some(keep) = &mut self.keep {
            *keep = keep.f_index_select(0, &index)?;
        }
        self.rows = count;
        self.owner = Arc::new(());
        Ok(())
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        if let Some(keep) = &mut self.keep {
            *keep = keep.f_narrow(1, 0, len)?;
        }
        self.len = len;
        Ok(())
    }

    fn len(&self) -> i64 {
        self.len
    }

    fn rows(&self) -> i64 {
        self.rows
    }

    fn reserve(&mut self, len: i64) -> Result<()> {
        self.reserved = len.min(self.context);
        Ok(())
    }
}
