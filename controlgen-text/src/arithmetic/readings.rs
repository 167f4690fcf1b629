//! What several models say of one text, each of its own reading of it: one forward call a model.

use std::iter;
use std::sync::Arc;

use controlgen_core::{
    Controls, Error, Lanes, LanguageModel, LmInput, Logits, Pass, Result, Rows, Source, State, StateImpl,
    Taps, Tokens, WeightMap,
};
use tch::{Device, Kind, Tensor};

use super::Term;
use super::term::{Identity, Reads};

/// Models, and what each reads. The first reading's model is the one whose sites, special tokens and embeddings count.
pub(crate) struct Readings {
    groups: Vec<Group>,
    /// The group of each reading, and its number within it.
    at: Vec<(usize, usize)>,
    /// What tells these readings, and their handles, from others.
    id: Arc<()>,
}

/// One model and all that it reads: rows of one call, reading by reading.
struct Group {
    lm: Box<dyn LanguageModel>,
    of: Identity,
    reads: Vec<Reads>,
}

impl Readings {
    pub(crate) fn new() -> Self {
        Self { groups: Vec::new(), at: Vec::new(), id: Arc::new(()) }
    }

    /// The number of what a term reads, which several terms may have.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Context`] for a term that cannot be read.
    pub(crate) fn add(&mut self, term: &Term) -> Result<usize> {
        term.check()?;
        if let Some(first) = self.groups.first() {
            let (expected, found) = (first.lm.spec().vocab, term.lm().spec().vocab);
            if expected != found {
                let expected = format!("{expected} tokens, as the first term has");
                return Err(Error::value("vocabulary of a term", expected, found));
            }
        }
        let group = self.groups.iter().position(|group| group.of == term.of).unwrap_or_else(|| {
            self.groups.push(Group { lm: term.lm().handle(), of: term.of, reads: Vec::new() });
            self.groups.len() - 1
        });
        let reads = &mut self.groups[group].reads;
        let row = reads.iter().position(|reads| *reads == term.reads).unwrap_or_else(|| {
            reads.push(term.reads.clone());
            reads.len() - 1
        });
        Ok(self.at.iter().position(|&at| at == (group, row)).unwrap_or_else(|| {
            self.at.push((group, row));
            self.at.len() - 1
        }))
    }

    /// The first reading's model.
    pub(crate) fn base(&self) -> &dyn LanguageModel {
        &*self.groups[0].lm
    }

    /// How many positions a text may have under all models, with what they read more.
    pub(crate) fn context(&self) -> i64 {
        let left = |group: &Group| match group.lm.spec() {
            // The encoder reads more, not the decoder.
            spec if spec.decoder_start.is_some() => spec.context,
            spec => spec.context - group.extra(),
        };
        self.groups.iter().map(left).min().unwrap_or(0)
    }

    /// Other handles over the same weights.
    pub(crate) fn handle(&self) -> Self {
        let handle =
            |group: &Group| Group { lm: group.lm.handle(), of: group.of, reads: group.reads.clone() };
        let groups = self.groups.iter().map(handle).collect();
        Self { groups, at: self.at.clone(), id: Arc::clone(&self.id) }
    }

    /// The same with other weights of all models that have the first one's sites.
    pub(super) fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let mut mapped = self.handle();
        for group in &mut mapped.groups {
            if std::ptr::eq(group.lm.sites(), self.base().sites()) {
                group.lm = group.lm.map_weights(f)?;
            }
        }
        Ok(mapped)
    }

    /// A state that has read nothing, or of encoder–decoders the encoder's input: there the readings part already.
    pub(crate) fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<ReadingsState> {
        let mut states = Vec::with_capacity(self.groups.len());
        let (rows, encoded) = match source {
            Source::Rows(rows) if rows < 1 => {
                return Err(Error::value("rows of a state", "at least 1", rows));
            }
            Source::Rows(rows) => (rows, false),
            Source::Encoder(input) => (input.validate(self.base().spec())?.0, true),
        };
        for group in &self.groups {
            let every: Vec<i64> = (0..group.count()).flat_map(|_| 0..rows).collect();
            let mut lanes = pass.lanes.cloned();
            lanes.iter_mut().try_for_each(|lanes| lanes.reorder(&every))?;
            let pass = Pass { controls: group.controls(pass), lanes: lanes.as_ref(), taps: None, ..*pass };
            states.push(match source {
                Source::Rows(rows) => group.lm.start(Source::Rows(rows * group.count()), &pass)?,
                Source::Encoder(input) => {
                    let len = input.validate(self.base().spec())?.1;
                    group.check_table(&input, self.base())?;
                    let made = group.prompt(&input, rows, len)?.padding_first()?;
                    group.lm.start(Source::Encoder(made.input(&input)), &pass)?
                }
            });
        }
        let mut reads = self.groups.iter().flat_map(|group| &group.reads);
        let whole = encoded || reads.all(|reads| matches!(reads, Reads::After(_)));
        let more = vec![0; self.groups.len()];
        Ok(ReadingsState { id: Arc::clone(&self.id), states, more, rows, len: 0, prompt: 0, whole, encoded })
    }

    /// The state, if it is of these readings.
    pub(super) fn own<'s>(&self, state: &'s mut State) -> Result<&'s mut ReadingsState> {
        let expected = "one that this arithmetic of models started";
        let state: &mut ReadingsState = state.downcast(expected)?;
        if Arc::ptr_eq(&state.id, &self.id) { Ok(state) } else { Err(Error::ForeignState { expected }) }
    }

    /// Reads on; the first call reads the prompt. Gives each reading's logits, `[B, T, V]` or `[B, 1, V]`.
    ///
    /// Where a reading has no part of the prompt but its end, it says nothing after the tokens before: NaN.
    pub(crate) fn forward(
        &self,
        input: LmInput<'_>,
        state: &mut ReadingsState,
        pass: &Pass<'_>,
    ) -> Result<Vec<Tensor>> {
        let (batch, len) = input.validate(self.base().spec())?;
        if batch != state.rows {
            return Err(Error::value(
                "rows of the input",
                format!("{}, as the state has", state.rows),
                batch,
            ));
        }
        let first = state.len == 0 && !state.encoded;
        let call = Call { input, batch, len, first, encoded: state.encoded, base: self.base() };
        let mut said = Vec::with_capacity(self.groups.len());
        for (i, group) in self.groups.iter().enumerate() {
            // What is seen of a pass is seen of the first reading's.
            let pass = Pass { taps: pass.taps.filter(|_| i == 0), ..*pass };
            match group.forward(&call, &mut state.states[i], &pass) {
                Ok(logits) => said.push(logits),
                Err(error) => {
                    // Those before have read on already.
                    for (before, more) in iter::zip(&mut state.states[..i], &state.more) {
                        before.truncate(if state.len == 0 { 0 } else { state.len + more })?;
                    }
                    return Err(error);
                }
            }
        }
        if call.first {
            state.more = self.groups.iter().map(|group| group.width(len) - len).collect();
            state.prompt = len;
        }
        state.len += len;
        let device = self.base().spec().placement.device;
        let of = |&(group, row): &(usize, usize)| -> Result<Tensor> {
            let logits = said[group].f_narrow(0, row as i64 * batch, batch)?;
            let logits = logits.f_to_device(device)?;
            if input.logits == Logits::Last {
                return Ok(logits);
            }
            let width = logits.size()[1];
            match self.groups[group].reads[row] {
                Reads::Instead(_) | Reads::LastToken if call.first && len > 1 => {
                    let last = logits.f_narrow(1, width - 1, 1)?;
                    let nothing = last.f_full_like(f64::NAN)?.f_expand([-1, len - 1, -1], false)?;
                    Ok(Tensor::f_cat(&[&nothing, &last], 1)?)
                }
                _ => Ok(logits.f_narrow(1, width - len, len)?),
            }
        };
        self.at.iter().map(of).collect()
    }
}

impl Group {
    fn count(&self) -> i64 {
        self.reads.len() as i64
    }

    fn extra(&self) -> i64 {
        self.reads.iter().map(Reads::extra).max().unwrap_or(0)
    }

    /// How many positions a prompt of `len` takes.
    fn width(&self, len: i64) -> i64 {
        let width = |reads: &Reads| match reads {
            Reads::After(prefix) => prefix.len() as i64 + len,
            Reads::Instead(text) => text.len() as i64,
            Reads::LastToken => 1,
        };
        self.reads.iter().map(width).max().unwrap_or(len)
    }

    /// The controls of a pass, if they were bound to this model.
    fn controls<'p>(&self, pass: &Pass<'p>) -> Option<&'p Controls> {
        pass.controls.filter(|_| pass.check_sites(self.lm.sites()).is_ok())
    }

    /// The logits of all its readings, reading by reading.
    fn forward(&self, call: &Call<'_>, state: &mut State, pass: &Pass<'_>) -> Result<Tensor> {
        let &Call { input, batch, len, first, encoded, base } = call;
        let controls = self.controls(pass);
        self.check_table(&input, base)?;
        let plain = matches!(&self.reads[..], [Reads::After(prefix)] if prefix.is_empty());
        if plain && self.device() == base.spec().placement.device {
            return Ok(self.lm.forward(input, state, &Pass { controls, ..*pass })?.logits);
        }
        let made = if first { self.prompt(&input, batch, len)? } else { self.next(&input, encoded)? };
        let every: Vec<i64> = (0..self.count()).flat_map(|_| 0..batch).collect();
        let mut lanes: Option<Lanes> = pass.lanes.cloned();
        lanes.iter_mut().try_for_each(|lanes| lanes.reorder(&every))?;
        let taps = Taps::new();
        let inner = Pass { controls, lanes: lanes.as_ref(), taps: pass.taps.map(|_| &taps), step: pass.step };
        let logits = self.lm.forward(made.input(&input), state, &inner)?.logits;
        if let Some(outer) = pass.taps {
            // What is seen of the prompt's columns, in the rows of the first reading.
            let width = made.tokens.size()[1];
            for (site, seen) in taps.take() {
                let size = seen.size();
                let mut seen = seen;
                if size.first() == Some(&(batch * self.count())) {
                    seen = seen.f_narrow(0, 0, batch)?;
                }
                if width > len && size.get(1) == Some(&width) {
                    seen = seen.f_narrow(1, width - len, len)?;
                }
                outer.push(site, seen);
            }
        }
        Ok(logits)
    }

    /// Refuses embeddings that are of another model's table.
    fn check_table(&self, input: &LmInput<'_>, base: &dyn LanguageModel) -> Result<()> {
        let own = self.lm.embeddings().data_ptr() == base.embeddings().data_ptr();
        if own || matches!(input.tokens, Tokens::Ids(_)) {
            return Ok(());
        }
        let what = "embeddings given to an arithmetic of models with several tables of them";
        Err(Error::unsupported(what, "token ids, or terms over one table"))
    }

    fn device(&self) -> Device {
        self.lm.spec().placement.device
    }

    /// Columns of tokens that stand for themselves, in every row.
    fn columns(&self, ids: &[i64], input: &LmInput<'_>, batch: i64) -> Result<Tensor> {
        let ids = Tensor::f_from_slice(ids)?.f_to_device(self.device())?;
        Ok(match input.tokens {
            Tokens::Ids(_) => ids.f_unsqueeze(0)?.f_expand([batch, -1], false)?,
            Tokens::Embeds(_) => {
                let table = self.lm.embeddings();
                table.f_index_select(0, &ids)?.f_unsqueeze(0)?.f_expand([batch, -1, -1], false)?
            }
        })
    }

    /// The first call: prefixes and other texts beside the prompts, the shorter ones padded on the left.
    fn prompt(&self, input: &LmInput<'_>, batch: i64, len: i64) -> Result<Made> {
        let (device, width) = (self.device(), self.width(len));
        let fill = self.lm.spec().pad.or(self.lm.spec().eos.first().copied()).unwrap_or(0);
        let (Tokens::Ids(given) | Tokens::Embeds(given)) = input.tokens;
        let given = given.f_to_device(device)?;
        let flag = |value: bool, n: i64| Tensor::f_full([batch, n], i64::from(value), (Kind::Bool, device));
        let kept = match input.keep {
            Some(keep) => keep.f_to_device(device)?,
            None => flag(true, len)?,
        };
        let (mut tokens, mut keep, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for reads in &self.reads {
            let (before, own, prompt) = match reads {
                Reads::After(prefix) => (&prefix[..], prefix.len() as i64, len),
                Reads::Instead(text) => (&text[..], text.len() as i64, 0),
                Reads::LastToken => (&[][..], 0, 1),
            };
            let padding = width - own - prompt;
            let columns = [&vec![fill; padding as usize][..], before].concat();
            let (columns, prompt_from) = (self.columns(&columns, input, batch)?, len - prompt);
            tokens.push(Tensor::f_cat(&[&columns, &given.f_narrow(1, prompt_from, prompt)?], 1)?);
            let prompt_kept = kept.f_narrow(1, prompt_from, prompt)?;
            keep.push(Tensor::f_cat(&[&flag(false, padding)?, &flag(true, own)?, &prompt_kept], 1)?);
            if let Some(given) = input.positions {
                if !matches!(reads, Reads::After(_)) {
                    return Err(no_positions());
                }
                let before: Vec<i64> = iter::repeat_n(0, padding as usize).chain(0..own).collect();
                let before = Tensor::f_from_slice(&before)?.f_to_device(device)?;
                let before = before.f_unsqueeze(0)?.f_expand([batch, -1], false)?;
                let given = given.f_to_device(device)?.f_add_scalar(own)?;
                positions.push(Tensor::f_cat(&[&before, &given], 1)?);
            }
        }
        let keep = Tensor::f_cat(&keep, 0)?; // (K · B, W)
        let padded = keep.f_all()?.f_int64_value(&[])? == 0;
        let positions = if positions.is_empty() { None } else { Some(Tensor::f_cat(&positions, 0)?) };
        Ok(Made { tokens: Tensor::f_cat(&tokens, 0)?, keep: Some(keep).filter(|_| padded), positions })
    }

    /// A later call: every reading goes on with the same tokens.
    fn next(&self, input: &LmInput<'_>, encoded: bool) -> Result<Made> {
        let device = self.device();
        let repeat = |t: &Tensor| -> Result<Tensor> {
            let mut times = vec![1; t.dim()];
            times[0] = self.count();
            Ok(t.f_to_device(device)?.f_repeat(times)?)
        };
        let (Tokens::Ids(given) | Tokens::Embeds(given)) = input.tokens;
        let mut positions = Vec::new();
        if let Some(given) = input.positions {
            for reads in &self.reads {
                let before = match reads {
                    // The decoder reads the same in all.
                    _ if encoded => 0,
                    Reads::After(prefix) => prefix.len() as i64,
                    _ => return Err(no_positions()),
                };
                positions.push(given.f_to_device(device)?.f_add_scalar(before)?);
            }
        }
        let positions = if positions.is_empty() { None } else { Some(Tensor::f_cat(&positions, 0)?) };
        Ok(Made { tokens: repeat(given)?, keep: input.keep.map(repeat).transpose()?, positions })
    }
}

fn no_positions() -> Error {
    Error::unsupported(
        "positions given to a term that reads another text than the prompt",
        "positions that are counted",
    )
}

/// What all groups are called with.
struct Call<'a> {
    input: LmInput<'a>,
    batch: i64,
    len: i64,
    /// Whether it is the prompt.
    first: bool,
    /// Whether encoders have read the prompts.
    encoded: bool,
    base: &'a dyn LanguageModel,
}

/// The input of a group's call.
struct Made {
    /// `[K · B, T]` or `[K · B, T, D]`
    tokens: Tensor,
    keep: Option<Tensor>,
    positions: Option<Tensor>,
}

impl Made {
    /// With all padding before all tokens, for models that count distances by columns: what is padded between a prefix
    /// and the prompt would part them.
    fn padding_first(self) -> Result<Self> {
        let Some(keep) = &self.keep else { return Ok(self) };
        let order = keep.f_to_kind(Kind::Int64)?.f_argsort_stable(true, 1, false)?;
        let gather = |t: &Tensor| -> Result<Tensor> {
            if t.dim() == 2 {
                return Ok(t.f_gather(1, &order, false)?);
            }
            let index = order.f_unsqueeze(-1)?.f_expand([-1, -1, t.size()[2]], false)?;
            Ok(t.f_gather(1, &index, false)?)
        };
        let positions = self.positions.as_ref().map(gather).transpose()?;
        Ok(Self { tokens: gather(&self.tokens)?, keep: Some(gather(keep)?), positions })
    }

    /// As an input like the one it was made of.
    fn input(&self, of: &LmInput<'_>) -> LmInput<'_> {
        let input = match of.tokens {
            Tokens::Ids(_) => LmInput::ids(&self.tokens),
            Tokens::Embeds(_) => LmInput::embeds(&self.tokens),
        };
        let input = input.keep(self.keep.as_ref()).positions(self.positions.as_ref());
        LmInput { logits: of.logits, ..input }
    }
}

/// What all models have read.
pub(crate) struct ReadingsState {
    id: Arc<()>,
    /// Of each group, with a row for each reading and row: reading by reading.
    states: Vec<State>,
    /// How many positions each group's state holds beside those of the text; none before the first call.
    more: Vec<i64>,
    rows: i64,
    /// Positions of the text.
    len: i64,
    /// Those of the first call.
    prompt: i64,
    /// Whether every reading has the whole prompt.
    whole: bool,
    /// Whether encoders have read the prompts.
    encoded: bool,
}

impl ReadingsState {
    pub(crate) fn fork(&self) -> Result<Self> {
        let states = self.states.iter().map(State::fork).collect::<Result<_>>()?;
        Ok(Self { id: Arc::clone(&self.id), states, more: self.more.clone(), ..*self })
    }
}

impl Rows for ReadingsState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let (batch, count) = (self.rows, rows.len() as i64);
        if let Some(&row) = rows.iter().find(|&&row| row < 0 || row >= batch) {
            return Err(Error::value("row", format!("0 .. {batch}"), row));
        }
        for state in &mut self.states {
            let readings = state.rows().div_euclid(batch.max(1));
            let all: Vec<i64> =
                (0..readings).flat_map(|k| rows.iter().map(move |row| k * batch + row)).collect();
            state.reorder(&all)?;
        }
        self.rows = count;
        Ok(())
    }
}

impl StateImpl for ReadingsState {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(self.fork()?))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        Rows::reorder(self, rows)
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        if len > 0 && len < self.prompt && !self.whole {
            let what = "forgetting a part of a prompt that a term does not read";
            return Err(Error::unsupported(what, "forgetting all of it, or what was generated"));
        }
        for (state, more) in iter::zip(&mut self.states, &self.more) {
            state.truncate(if len == 0 { 0 } else { len + more })?;
        }
        if len == 0 {
            self.more.fill(0);
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
        // What the first call will add is not known yet: a hint need not be exact.
        iter::zip(&mut self.states, &self.more).try_for_each(|(state, more)| state.reserve(len + more))
    }
}
