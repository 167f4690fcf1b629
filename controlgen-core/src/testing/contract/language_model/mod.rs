//! What every language model keeps.

mod gradients;
mod numbers;
mod refusals;
mod sites;
mod state;

use tch::{Kind, Tensor};

use super::{Check, Clause, Options, Violation, check, noise};
use crate::noise::Stream;
use crate::{LanguageModel, LmInput, Pass, Result, Source, State};

/// The model, and what it reads.
pub struct Case<'a> {
    lm: &'a dyn LanguageModel,
    tolerance: f64,
    seed: u64,
    /// Three rows of 6 tokens.
    rows: Vec<Vec<i64>>,
    /// The same, `[3, 6]`.
    ids: Tensor,
    /// To go on with, `[3, 2]`.
    more: Tensor,
}

/// How many tokens are read at most, but for the clause on the context.
const ROOM: i64 = 8;

pub fn clauses<'a>() -> Vec<Clause<Case<'a>>> {
    vec![
        ("spec", numbers::spec),
        ("start", refusals::start),
        ("repeatable", numbers::repeatable),
        ("cached", numbers::cached),
        ("last", numbers::last),
        ("fork", state::fork),
        ("truncate", state::truncate),
        ("reorder", state::reorder),
        ("embeddings", numbers::embeddings),
        ("rows", numbers::rows),
        ("padding", numbers::padding),
        ("positions", numbers::positions),
        ("gradients", gradients::flow),
        ("no gradients", gradients::none),
        ("handle", state::handle),
        ("sites", sites::names),
        ("hooks", sites::hooks),
        ("identity control", sites::identity),
        ("effect", sites::effect),
        ("map_weights", sites::map_weights),
        ("failing control", state::failing_control),
        ("foreign sites", refusals::foreign_sites),
        ("foreign state", refusals::foreign_state),
        ("lanes", refusals::lanes),
        ("bad input", refusals::bad_input),
        ("context", refusals::context),
    ]
}

impl Options {
    /// [`language_model`](super::language_model) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn language_model(&self, lm: &dyn LanguageModel) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let case = Case::new(lm, self).map_err(|b| b.in_clause("language_model", "spec"))?;
        check("language_model", &clauses(), &case)
    }
}

/// A new state of so many rows. An encoder–decoder's encoder has read the same text in each, so that rows differ by what
/// the decoder reads, as those of other models do.
fn start(lm: &dyn LanguageModel, rows: i64, pass: &Pass<'_>) -> Result<State> {
    let spec = lm.spec();
    if spec.decoder_start.is_none() {
        return lm.start(Source::Rows(rows), pass);
    }
    let text = Tensor::f_arange(4, (Kind::Int64, spec.placement.device))?.f_remainder(spec.vocab)?;
    let text = text.f_unsqueeze(0)?.f_expand([rows, 4], false)?;
    lm.start(Source::Encoder(LmInput::ids(&text)), pass)
}

impl<'a> Case<'a> {
    fn new(lm: &'a dyn LanguageModel, options: &Options) -> Result<Self, super::Breach> {
        let spec = lm.spec();
        super::demand(spec.vocab >= 2, "a vocabulary of at least 2", spec.vocab)?;
        super::demand(spec.context >= ROOM, format!("a context of at least {ROOM}"), spec.context)?;
        let mut stream = Stream::new(options.seed, 0);
        let mut draw = |_| stream.index(spec.vocab as usize) as i64;
        // The first tokens differ, hence so do the rows.
        let rows: Vec<Vec<i64>> = (0..3)
            .map(|row| std::iter::once(row % spec.vocab).chain((1..6).map(&mut draw)).collect())
            .collect();
        let more: Vec<i64> = (0..6).map(&mut draw).collect();
        let device = spec.placement.device;
        let ids = Tensor::f_from_slice(&rows.concat())?.f_view([3, 6])?.f_to_device(device)?;
        let more = Tensor::f_from_slice(&more)?.f_view([3, 2])?.f_to_device(device)?;
        Ok(Self {
            lm,
            tolerance: options.tolerance(spec.placement.kind),
            seed: options.seed,
            rows,
            ids,
            more,
        })
    }

    fn start(&self, rows: i64) -> Result<State> {
        start(self.lm, rows, &Pass::default())
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State) -> Result<Tensor> {
        Ok(self.lm.forward(input, state, &Pass::default())?.logits)
    }

    /// The logits `[B, T, V]` of ids `[B, T]` read at once.
    fn read(&self, ids: &Tensor) -> Result<Tensor> {
        self.forward(LmInput::ids(ids), &mut self.start(ids.size()[0])?)
    }

    /// The logits `[B, T, V]` of `tail` `[B, T]` after `head`, read at once.
    fn after(&self, head: &Tensor, tail: &Tensor) -> Result<Tensor> {
        let whole = self.read(&Tensor::f_cat(&[head, tail], 1)?)?;
        Ok(whole.f_narrow(1, head.size()[1], tail.size()[1])?)
    }

    /// The logits of ids under a pass.
    fn under(&self, ids: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let mut state = start(self.lm, ids.size()[0], pass)?;
        Ok(self.lm.forward(LmInput::ids(ids), &mut state, pass)?.logits)
    }

    /// Equal but for roundings.
    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        super::close(what, found, expected, self.tolerance)
    }

    /// Standard normals of the model's type.
    fn noise(&self, salt: u64, shape: &[i64]) -> Result<Tensor> {
        noise(self.seed, salt, shape, self.lm.spec().placement.options())
    }

    /// A state that has read the first four tokens of each row.
    fn begun(&self) -> Result<State> {
        let mut state = self.start(3)?;
        let _ = self.forward(LmInput::ids(&self.head()?), &mut state)?;
        Ok(state)
    }

    /// The first four tokens, `[3, 4]`.
    fn head(&self) -> Result<Tensor> {
        Ok(self.ids.f_narrow(1, 0, 4)?)
    }

    /// Demands that a state that was [begun](Self::begun) be as it was, after something that failed.
    fn still_begun(&self, state: &mut State) -> Check {
        let (len, rows) = (state.len(), state.rows());
        super::demand(
            (len, rows) == (4, 3),
            "a state as before the error: 4 positions, 3 rows",
            format!("{len}, {rows}"),
        )?;
        let found = self.forward(LmInput::ids(&self.more), state)?;
        self.close("what follows an error", &found, &self.after(&self.head()?, &self.more)?)
    }
}
