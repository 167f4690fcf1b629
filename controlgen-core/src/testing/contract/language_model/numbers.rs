//! The same logits, whichever way they are asked for.

use tch::{Kind, Tensor};

use super::Case;
use crate::LmInput;
use crate::testing::contract::{Check, demand, equal, finite, sized};
use crate::testing::{left_padded, right_padded};

pub fn spec(c: &Case<'_>) -> Check {
    let spec = c.lm.spec();
    sized("embeddings", c.lm.embeddings(), &[spec.vocab, spec.width])?;
    let (expected, found) = (spec.placement.kind, c.lm.embeddings().f_kind()?);
    demand(found == expected, format!("embeddings of type {expected:?}"), format!("{found:?}"))?;
    for token in spec.bos.iter().chain(&spec.eos).chain(&spec.pad) {
        demand((0..spec.vocab).contains(token), format!("special tokens in 0 .. {}", spec.vocab), token)?;
    }
    let logits = c.read(&c.ids)?;
    sized("logits", &logits, &[3, 6, spec.vocab])?;
    demand(logits.is_floating_point(), "floating-point logits", format!("{:?}", logits.f_kind()?))?;
    finite("logits", &logits)
}

pub fn repeatable(c: &Case<'_>) -> Check {
    equal("logits of the same tokens, the second time", &c.read(&c.ids)?, &c.read(&c.ids)?)
}

pub fn cached(c: &Case<'_>) -> Check {
    let whole = c.read(&c.ids)?;
    for cuts in [vec![1; 6], vec![3, 2, 1], vec![1, 4, 1]] {
        let (mut state, mut parts, mut at) = (c.start(3)?, vec![], 0);
        for &n in &cuts {
            parts.push(c.forward(LmInput::ids(&c.ids.f_narrow(1, at, n)?), &mut state)?);
            at += n;
            let held = (state.len(), state.rows());
            demand(held == (at, 3), format!("{at} positions of 3 rows in the state"), format!("{held:?}"))?;
        }
        c.close(&format!("logits of tokens read by {cuts:?}"), &Tensor::f_cat(&parts, 1)?, &whole)?;
    }
    Ok(())
}

pub fn last(c: &Case<'_>) -> Check {
    let (mut one, mut other) = (c.start(3)?, c.start(3)?);
    for (at, n) in [(0, 4), (4, 1), (5, 1)] {
        let ids = c.ids.f_narrow(1, at, n)?;
        let all = c.forward(LmInput::ids(&ids), &mut one)?;
        let last = c.forward(LmInput::ids(&ids).last(), &mut other)?;
        c.close(&format!("last logits of {n} tokens after {at}"), &last, &all.f_narrow(1, n - 1, 1)?)?;
    }
    Ok(())
}

pub fn embeddings(c: &Case<'_>) -> Check {
    let look_up = |ids: &Tensor| {
        c.lm.embeddings().f_index_select(0, &ids.f_view(-1)?)?.f_view([3, -1, c.lm.spec().width])
    };
    let mut state = c.start(3)?;
    let found = c.forward(LmInput::embeds(&look_up(&c.ids)?), &mut state)?;
    c.close("logits of embeddings", &found, &c.read(&c.ids)?)?;
    let found = c.forward(LmInput::embeds(&look_up(&c.more)?), &mut state)?;
    c.close("logits of embeddings after embeddings", &found, &c.after(&c.ids, &c.more)?)?;
    // And of each after the other.
    let mut state = c.begun()?;
    let found = c.forward(LmInput::embeds(&look_up(&c.more)?), &mut state)?;
    c.close("logits of embeddings after tokens", &found, &c.after(&c.head()?, &c.more)?)
}

pub fn rows(c: &Case<'_>) -> Check {
    let (together, mut state) = (c.read(&c.ids)?, c.start(3)?);
    let _ = c.forward(LmInput::ids(&c.ids), &mut state)?;
    let later = c.forward(LmInput::ids(&c.more), &mut state)?;
    for i in 0..3 {
        let (ids, more) = (c.ids.f_narrow(0, i, 1)?, c.more.f_narrow(0, i, 1)?);
        c.close(&format!("row {i} of a batch"), &together.f_narrow(0, i, 1)?, &c.read(&ids)?)?;
        c.close(&format!("row {i}, read on"), &later.f_narrow(0, i, 1)?, &c.after(&ids, &more)?)?;
    }
    Ok(())
}

pub fn padding(c: &Case<'_>) -> Check {
    let (device, last) = (c.ids.device(), c.lm.spec().vocab - 1);
    let rows = [c.rows[0].clone(), c.rows[1][..3].to_vec(), c.rows[2][..1].to_vec()];
    let mut alone = Vec::new();
    for (i, row) in (0i64..).zip(&rows) {
        let ids = Tensor::f_from_slice(row)?.f_unsqueeze(0)?.f_to_device(device)?;
        alone.push((c.read(&ids)?, c.after(&ids, &c.more.f_narrow(0, i, 1)?)?));
    }
    for (left, pad, cuts) in [
        (true, 0, &[6i64][..]),
        (true, last, &[2, 4]),
        (true, 0, &[1, 1, 1, 1, 1, 1]),
        (false, 0, &[6]),
        (false, last, &[2, 4]),
    ] {
        let (ids, keep) = if left { left_padded(&rows, pad)? } else { right_padded(&rows, pad)? };
        let (ids, keep) = (ids.f_to_device(device)?, keep.f_to_device(device)?);
        let (mut state, mut parts, mut at) = (c.start(3)?, vec![], 0);
        for &n in cuts {
            let (ids, keep) = (ids.f_narrow(1, at, n)?, keep.f_narrow(1, at, n)?);
            parts.push(c.forward(LmInput::ids(&ids).keep(Some(&keep)), &mut state)?);
            at += n;
        }
        let found = Tensor::f_cat(&parts, 1)?;
        let later = c.forward(LmInput::ids(&c.more), &mut state)?;
        for (i, (expected, expected_later)) in (0i64..).zip(&alone) {
            let len = expected.size()[1];
            let kept = found.f_narrow(0, i, 1)?.f_narrow(1, if left { 6 - len } else { 0 }, len)?;
            let side = if left { "left" } else { "right" };
            let what = format!("row {i}, padded on the {side} with {pad}, read by {cuts:?}");
            c.close(&what, &kept, expected)?;
            c.close(&format!("{what}, and on"), &later.f_narrow(0, i, 1)?, expected_later)?;
        }
    }
    Ok(())
}

pub fn positions(c: &Case<'_>) -> Check {
    let device = c.ids.device();
    let counted = Tensor::f_arange(6, (Kind::Int64, device))?.f_unsqueeze(0)?.f_expand([3, 6], false)?;
    let given = LmInput::ids(&c.ids).positions(Some(&counted));
    c.close("logits with positions given", &c.forward(given, &mut c.start(3)?)?, &c.read(&c.ids)?)?;
    // With padding on the left, and in two pieces.
    let (_, keep) = left_padded(&[vec![0; 6], vec![0; 4], vec![0; 5]], 0)?;
    let keep = keep.f_to_device(device)?;
    let counted = keep.f_cumsum(1, Kind::Int64)?.f_sub_scalar(1)?.f_clamp_min(0)?;
    let (mut one, mut other) = (c.start(3)?, c.start(3)?);
    for (at, n) in [(0, 4), (4, 2)] {
        let cut = |t: &Tensor| t.f_narrow(1, at, n);
        let (ids, keep, counted) = (cut(&c.ids)?, cut(&keep)?, cut(&counted)?);
        let input = LmInput::ids(&ids).keep(Some(&keep));
        let plain = c.forward(input, &mut one)?;
        let found = c.forward(input.positions(Some(&counted)), &mut other)?;
        c.close(
            "last logits of padded rows with positions given",
            &found.f_narrow(1, n - 1, 1)?,
            &plain.f_narrow(1, n - 1, 1)?,
        )?;
    }
    Ok(())
}
