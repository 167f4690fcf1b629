//! What is refused, by which error, and that nothing has changed then.

use tch::{Kind, Tensor};

use super::Case;
use crate::testing::contract::probe::{Act, Probe, Where, copied};
use crate::testing::contract::{Check, breach, demand, refused};
use crate::{Error, Lanes, LmInput, Pass, Result, Source, State, StateImpl};

pub fn start(c: &Case<'_>) -> Check {
    let state = c.start(3)?;
    let held = (state.len(), state.rows());
    demand(held == (0, 3), "0 positions of 3 rows in a new state", format!("{held:?}"))?;
    demand(state.is_empty(), "a new state to be empty", "is_empty() is false")?;
    if c.lm.spec().decoder_start.is_some() {
        let rows = c.lm.start(Source::Rows(3), &Pass::default());
        return refused!("no encoder's input", rows, Error::Unsupported { .. });
    }
    for rows in [0, -1] {
        refused!(format!("{rows} rows"), c.start(rows), Error::Value { .. })?;
    }
    let encoder = c.lm.start(Source::Encoder(LmInput::ids(&c.ids)), &Pass::default());
    refused!("an encoder's input", encoder, Error::Unsupported { .. })
}

pub fn foreign_sites(c: &Case<'_>) -> Check {
    let sites = copied(c.lm.sites());
    let controls = Probe::new(&sites, Where::Sites, Act::Identity).bind(&sites)?;
    let pass = Pass::with_controls(&controls);
    let mut state = c.begun()?;
    let made = c.lm.forward(LmInput::ids(&c.more), &mut state, &pass);
    refused!("controls bound to another model", made, Error::ForeignSites)?;
    c.still_begun(&mut state)
}

/// The state of no model.
struct Stranger;

impl StateImpl for Stranger {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(Self))
    }
    fn reorder(&mut self, _rows: &[i64]) -> Result<()> {
        Ok(())
    }
    fn truncate(&mut self, _len: i64) -> Result<()> {
        Ok(())
    }
    fn len(&self) -> i64 {
        0
    }
    fn rows(&self) -> i64 {
        3
    }
}

pub fn foreign_state(c: &Case<'_>) -> Check {
    let made = c.forward(LmInput::ids(&c.ids), &mut State::new(Stranger));
    refused!("a state of another kind", made, Error::ForeignState { .. })
}

pub fn lanes(c: &Case<'_>) -> Check {
    let mut state = c.begun()?;
    for n in [0, 2, 4] {
        let lanes = Lanes::samples(n);
        let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
        let made = c.lm.forward(LmInput::ids(&c.more), &mut state, &pass);
        refused!(format!("{n} lanes for 3 rows"), made, Error::Value { .. })?;
    }
    c.still_begun(&mut state)?;
    let lanes = Lanes::samples(3);
    let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
    c.close("logits under plain lanes", &c.under(&c.ids, &pass)?, &c.read(&c.ids)?)
}

pub fn bad_input(c: &Case<'_>) -> Check {
    let (spec, device) = (c.lm.spec(), c.ids.device());
    let state = &mut c.begun()?;
    for bad in [spec.vocab, -1] {
        let ids = c.more.f_add_scalar(0)?;
        let _ = ids.f_narrow(0, 1, 1)?.f_narrow(1, 1, 1)?.f_fill_(bad)?;
        refused!(format!("token {bad}"), c.forward(LmInput::ids(&ids), state), Error::Value { .. })?;
    }
    let floats = c.more.f_to_kind(Kind::Float)?;
    refused!("token ids of type f32", c.forward(LmInput::ids(&floats), state), Error::Kind { .. })?;
    let flat = c.more.f_view(-1)?;
    refused!("token ids of one dimension", c.forward(LmInput::ids(&flat), state), Error::Shape { .. })?;
    let none = c.more.f_narrow(1, 0, 0)?;
    refused!("no tokens", c.forward(LmInput::ids(&none), state), Error::Value { .. })?;
    let two = c.more.f_narrow(0, 0, 2)?;
    refused!("2 rows for a state of 3", c.forward(LmInput::ids(&two), state), Error::Value { .. })?;
    let wide = Tensor::f_zeros([3, 2, spec.width + 1], spec.placement.options())?;
    refused!("embeddings too wide", c.forward(LmInput::embeds(&wide), state), Error::Shape { .. })?;
    let other = if spec.placement.kind == Kind::Double { Kind::Float } else { Kind::Double };
    let typed = Tensor::f_zeros([3, 2, spec.width], (other, device))?;
    refused!("embeddings of another type", c.forward(LmInput::embeds(&typed), state), Error::Kind { .. })?;
    let long = Tensor::f_ones([3, 3], (Kind::Bool, device))?;
    let input = LmInput::ids(&c.more).keep(Some(&long));
    refused!("a longer mask", c.forward(input, state), Error::Shape { .. })?;
    let numbers = Tensor::f_ones([3, 2], (Kind::Int64, device))?;
    let input = LmInput::ids(&c.more).keep(Some(&numbers));
    refused!("a mask of integers", c.forward(input, state), Error::Kind { .. })?;
    c.still_begun(state)
}

pub fn context(c: &Case<'_>) -> Check {
    const FILLED: i64 = 256;
    const NONE: i64 = 1 << 24;
    let limit = c.lm.spec().context;
    if limit >= NONE {
        return Ok(());
    }
    let ids =
        |len| -> Result<Tensor> { Ok(c.ids.f_narrow(1, 0, 1)?.f_expand([3, len], false)?.f_contiguous()?) };
    let mut state = c.begun()?;
    for len in [limit - 3, limit + 1] {
        match c.forward(LmInput::ids(&ids(len)?), &mut state) {
            Err(Error::Context { limit: said, .. }) if said == limit => {}
            Err(other) => return breach(format!("Error::Context with a limit of {limit}"), other),
            Ok(_) => return breach(format!("{len} positions after 4 of {limit} to be refused"), "no error"),
        }
    }
    c.still_begun(&mut state.fork()?)?;
    if limit <= FILLED {
        let filled = c.forward(LmInput::ids(&ids(limit - 4)?), &mut state)?;
        demand(state.len() == limit, format!("{limit} positions held"), state.len())?;
        demand(
            filled.size()[1] == limit - 4,
            format!("logits of {} positions", limit - 4),
            filled.size()[1],
        )?;
    }
    Ok(())
}
