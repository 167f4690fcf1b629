//! What the controls do to the batch's scores `[B, V]`, in few kernels and in place.

use std::iter;

use controlgen_core::{Error, Result, Rows};
use tch::{Device, Kind, Tensor};

use super::check;

/// B and V, of scores that are `[B, V]` and f32.
pub(crate) fn dims(logits: &Tensor) -> Result<(i64, i64)> {
    let size = logits.size();
    let [rows, vocab] = size[..] else {
        return Err(Error::shape("logits", "[B, V]", &size));
    };
    if rows == 0 || vocab == 0 {
        return Err(Error::shape("logits", "[B, V] with B and V of at least 1", &size));
    }
    match logits.f_kind()? {
        Kind::Float => Ok((rows, vocab)),
        other => {
            Err(Error::Kind { what: "logits".into(), expected: "f32".into(), found: format!("{other:?}") })
        }
    }
}

/// V, of scores whose rows are those of the state.
pub(super) fn vocab(logits: &Tensor, states: usize) -> Result<i64> {
    let (rows, vocab) = dims(logits)?;
    check::rows("logits", states, usize::try_from(rows).unwrap_or(0))?;
    Ok(vocab)
}

/// The rows of a state with their numbers.
pub(super) fn numbered<T>(rows: &[T]) -> impl Iterator<Item = (i64, &T)> {
    (0i64..).zip(rows)
}

/// Bans cells, each numbered row · V + token. They need not differ.
pub(super) fn ban_cells(logits: &Tensor, cells: &[i64]) -> Result<()> {
    if !cells.is_empty() {
        let index = Tensor::f_from_slice(cells)?.f_to_device(logits.device())?;
        let _ = logits.f_view([-1])?.f_index_fill_(0, &index, f64::NEG_INFINITY)?;
    }
    Ok(())
}

/// Adds to cells, each numbered row · V + token. Additions to one cell add up.
pub(super) fn add_to_cells(logits: &Tensor, cells: &[i64], values: &[f32]) -> Result<()> {
    if !cells.is_empty() {
        let index = Tensor::f_from_slice(cells)?.f_to_device(logits.device())?;
        let values = Tensor::f_from_slice(values)?.f_to_device(logits.device())?;
        let _ = logits.f_view([-1])?.f_index_add_(0, &index, &values)?;
    }
    Ok(())
}

/// LibTorch hands smaller tensors to one thread; waking the others takes longer than a pass over a row.
const ONE_THREAD: i64 = 1 << 14;

/// Bans what lies below its row's cut; a cut that is NaN bans nothing.
pub(super) fn ban_below(logits: &mut Tensor, cuts: &[f32]) -> Result<()> {
    if logits.device() == Device::Cpu {
        // One pass over the row, where a mask takes two and a buffer.
        for (i, cut) in numbered(cuts) {
            // What is greater is kept, hence the next lower number.
            let cut = f64::from(cut.next_down());
            for mut part in logits.f_get(i)?.f_split(ONE_THREAD, 0)? {
                let _ = part.f_threshold_(cut, f64::NEG_INFINITY)?;
            }
        }
    } else {
        let cuts = Tensor::f_from_slice(cuts)?.f_to_device(logits.device())?;
        let _ = logits.f_masked_fill_(&logits.f_lt_tensor(&cuts.f_unsqueeze(1)?)?, f64::NEG_INFINITY)?;
    }
    Ok(())
}

/// Bans the cells of a Boolean `[B, V]` that are true.
pub(crate) fn ban_where(logits: &mut Tensor, banned: &Tensor) -> Result<()> {
    if logits.device() != Device::Cpu {
        let _ = logits.f_masked_fill_(banned, f64::NEG_INFINITY)?;
        return Ok(());
    }
    let (logits, banned) = (logits.f_view([-1])?, banned.f_view([-1])?);
    for (mut part, banned) in iter::zip(logits.f_split(ONE_THREAD, 0)?, banned.f_split(ONE_THREAD, 0)?) {
        let _ = part.f_masked_fill_(&banned, f64::NEG_INFINITY)?;
    }
    Ok(())
}

/// [`ban_below`] for cuts `[B, 1]` that are on the device; they are not fetched from a GPU.
pub(super) fn ban_below_tensor(logits: &mut Tensor, cuts: &Tensor) -> Result<()> {
    if logits.device() == Device::Cpu {
        ban_below(logits, &to_vec(cuts)?)
    } else {
        let _ = logits.f_masked_fill_(&logits.f_lt_tensor(cuts)?, f64::NEG_INFINITY)?;
        Ok(())
    }
}

/// The k-th largest score of each row, `[B, 1]`; the smallest where there are fewer than k.
pub(super) fn kth_largest(logits: &Tensor, k: usize) -> Result<Tensor> {
    let (_, vocab) = dims(logits)?;
    let k = i64::try_from(k).unwrap_or(vocab).min(vocab);
    if k == 1 {
        return Ok(logits.f_amax([-1].as_slice(), true)?);
    }
    Ok(logits.f_topk(k, -1, true, false)?.0.f_amin([-1].as_slice(), true)?)
}

/// The elements of an f32 tensor, in order.
pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    let mut out = vec![0f32; tensor.numel()];
    tensor.f_copy_data(&mut out, tensor.numel())?;
    Ok(out)
}

/// A tensor of a control's own, made at its first use and kept: all rows share it.
#[derive(Default)]
pub struct Prepared(Option<Tensor>);

impl Prepared {
    /// The tensor, made anew if there is none for this device.
    pub(super) fn get(&mut self, device: Device, make: impl FnOnce() -> Result<Tensor>) -> Result<&Tensor> {
        match self.0.take() {
            Some(tensor) if tensor.device() == device => Ok(self.0.insert(tensor)),
            _ => Ok(self.0.insert(make()?.f_to_device(device)?)),
        }
    }
}

impl Rows for Prepared {
    fn reorder(&mut self, _rows: &[i64]) -> Result<()> {
        Ok(())
    }
}

/// Token ids that are banned in every row.
#[derive(Clone, Debug)]
pub(super) struct TokenSet {
    what: &'static str,
    ids: Vec<i64>,
    largest: i64,
}

impl TokenSet {
    /// One or more ids; `what` names them in errors.
    pub(super) fn new(what: &'static str, ids: impl IntoIterator<Item = i64>) -> Result<Self> {
        let ids = check::token_set(what, ids)?;
        let largest = ids.iter().copied().max().unwrap_or(0);
        Ok(Self { what, ids, largest })
    }

    /// The ids.
    pub(super) fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Refuses ids that the vocabulary lacks.
    pub(super) fn check(&self, vocab: i64) -> Result<()> {
        in_vocabulary(self.what, self.largest, vocab)
    }

    /// Bans the ids in every row.
    pub(super) fn ban(&self, prepared: &mut Prepared, logits: &mut Tensor) -> Result<()> {
        self.check(dims(logits)?.1)?;
        let index = prepared.get(logits.device(), || Ok(Tensor::f_from_slice(&self.ids)?))?;
        let _ = logits.f_index_fill_(1, index, f64::NEG_INFINITY)?;
        Ok(())
    }
}

/// Refuses an id that the vocabulary lacks.
pub(crate) fn in_vocabulary(what: &str, id: i64, vocab: i64) -> Result<()> {
    if (0..vocab).contains(&id) { Ok(()) } else { Err(Error::value(what, format!("0 .. {vocab}"), id)) }
}

/// What the rows' prompts give, one state each; `start` may refuse.
pub(super) fn start_rows<S>(prompts: &[Vec<i64>], start: impl Fn(&[i64]) -> S) -> Result<Vec<S>> {
    iter::zip(0.., prompts)
        .map(|(row, prompt)| {
            check::tokens(&format!("prompt {row}"), prompt)?;
            Ok(start(prompt))
        })
        .collect()
}

/// Takes note of one token a row.
pub(super) fn advance_rows<S>(states: &mut [S], tokens: &[i64], advance: impl Fn(&mut S, i64)) -> Result<()> {
    check::rows("tokens", states.len(), tokens.len())?;
    check::tokens("chosen tokens", tokens)?;
    iter::zip(states, tokens).for_each(|(state, &token)| advance(state, token));
    Ok(())
}
