//! What a model remembers, and who else has a hand on it.

use tch::Tensor;

use super::Case;
use crate::testing::contract::probe::{Act, FAILS, Probe, Where};
use crate::testing::contract::{Check, breach, demand, on_thread};
use crate::{Error, LmInput, Pass, Rows};

/// Twice, so that either writes first.
pub fn fork(c: &Case<'_>) -> Check {
    let (head, a, b) = (c.head()?, c.ids.f_narrow(1, 4, 2)?, &c.more);
    for fork_first in [false, true] {
        let mut one = c.begun()?;
        let mut other = one.fork()?;
        demand(
            (other.len(), other.rows()) == (4, 3),
            "a fork of 4 positions and 3 rows",
            format!("{}, {}", other.len(), other.rows()),
        )?;
        let (x, y);
        if fork_first {
            y = c.forward(LmInput::ids(b), &mut other)?;
            x = c.forward(LmInput::ids(&a), &mut one)?;
        } else {
            x = c.forward(LmInput::ids(&a), &mut one)?;
            y = c.forward(LmInput::ids(b), &mut other)?;
        }
        c.close("logits of the original", &x, &c.after(&head, &a)?)?;
        c.close("logits of the fork", &y, &c.after(&head, b)?)?;
        // What was written last must not show in the other's next token either.
        let token = c.ids.f_narrow(1, 0, 1)?;
        let (x, y) =
            (c.forward(LmInput::ids(&token), &mut one)?, c.forward(LmInput::ids(&token), &mut other)?);
        c.close("logits of the original, later", &x, &c.after(&Tensor::f_cat(&[&head, &a], 1)?, &token)?)?;
        c.close("logits of the fork, later", &y, &c.after(&Tensor::f_cat(&[&head, b], 1)?, &token)?)?;
    }
    Ok(())
}

pub fn truncate(c: &Case<'_>) -> Check {
    let mut state = c.begun()?;
    let _ = c.forward(LmInput::ids(&c.ids.f_narrow(1, 4, 2)?), &mut state)?;
    let mut fork = state.fork()?;
    state.truncate(4)?;
    demand(state.len() == 4, "4 positions after truncate(4)", state.len())?;
    let found = c.forward(LmInput::ids(&c.more), &mut state)?;
    c.close("logits after truncate(4)", &found, &c.after(&c.head()?, &c.more)?)?;
    let found = c.forward(LmInput::ids(&c.more), &mut fork)?;
    c.close("logits of a fork, the original truncated", &found, &c.after(&c.ids, &c.more)?)?;
    state.truncate(0)?;
    let found = c.forward(LmInput::ids(&c.ids), &mut state)?;
    c.close("logits after truncate(0)", &found, &c.read(&c.ids)?)
}

pub fn reorder(c: &Case<'_>) -> Check {
    let mut state = c.begun()?;
    let mut fork = state.fork()?;
    let head = c.head()?;
    for picks in [&[2i64, 0, 2, 1][..], &[3, 1], &[1]] {
        state.reorder(picks)?;
        let rows = i64::try_from(picks.len()).unwrap_or(0);
        demand(state.rows() == rows, format!("{rows} rows after reorder({picks:?})"), state.rows())?;
    }
    // Row 1 of [row 3, row 1] of [2, 0, 2, 1]: the original's row 0.
    let found = c.forward(LmInput::ids(&c.more.f_narrow(0, 1, 1)?), &mut state)?;
    let expected = c.after(&head.f_narrow(0, 0, 1)?, &c.more.f_narrow(0, 1, 1)?)?;
    c.close("logits of a row that was moved three times", &found, &expected)?;
    let mut state = fork.fork()?;
    state.reorder(&[2, 0, 2, 1])?;
    let more = Tensor::f_cat(&[&c.more, &c.ids.f_narrow(0, 0, 1)?.f_narrow(1, 0, 2)?], 0)?;
    let picked =
        head.f_index_select(0, &Tensor::f_from_slice(&[2i64, 0, 2, 1])?.f_to_device(head.device())?)?;
    let found = c.forward(LmInput::ids(&more), &mut state)?;
    c.close("logits of rows reordered to [2, 0, 2, 1]", &found, &c.after(&picked, &more)?)?;
    let found = c.forward(LmInput::ids(&c.more), &mut fork)?;
    c.close("logits of a fork, the original reordered", &found, &c.after(&head, &c.more)?)
}

pub fn handle(c: &Case<'_>) -> Check {
    let expected = c.after(&c.head()?, &c.more)?;
    let handle = c.lm.handle();
    let mut state = c.begun()?;
    let found = handle.forward(LmInput::ids(&c.more), &mut state, &Pass::default())?.logits;
    c.close("a handle's logits, of the original's state", &found, &expected)?;
    let state = c.begun()?;
    let (mut fork, more, ids) = (state.fork()?, c.more.shallow_clone(), c.ids.shallow_clone());
    let (later, whole) = on_thread(move || {
        let later = handle.forward(LmInput::ids(&more), &mut fork, &Pass::default())?.logits;
        let mut state = super::start(&*handle, 3, &Pass::default())?;
        Ok((later, handle.forward(LmInput::ids(&ids), &mut state, &Pass::default())?.logits))
    })?;
    c.close("a handle's logits on another thread", &whole, &c.read(&c.ids)?)?;
    c.close("a handle's logits on another thread, of the original's state", &later, &expected)
}

/// At the first call, in the middle, and at the last.
pub fn failing_control(c: &Case<'_>) -> Check {
    let sites = c.lm.sites();
    let probe = Probe::new(sites, Where::Sites, Act::Identity);
    // Of a pass alone: what an encoder's sites see, they see before it.
    let controls = probe.bind(sites)?;
    let pass = Pass::with_controls(&controls);
    let _ = c.lm.forward(LmInput::ids(&c.head()?), &mut c.start(3)?, &pass)?;
    let calls = probe.calls();
    for at in [1, calls.div_euclid(2).max(1), calls] {
        let mut state = c.begun()?;
        let controls = Probe::new(sites, Where::Sites, Act::FailAt(at)).bind(sites)?;
        let made = c.lm.forward(LmInput::ids(&c.ids), &mut state, &Pass::with_controls(&controls));
        match made {
            Err(Error::Unsupported { what, .. }) if what == FAILS => {}
            Err(other) => return breach("the control's own error", other),
            Ok(_) if calls == 0 => {}
            Ok(_) => return breach("the control's error", "none"),
        }
        c.still_begun(&mut state)?;
    }
    Ok(())
}
