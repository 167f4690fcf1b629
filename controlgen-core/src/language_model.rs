//! Language models: tokens or embeddings in, logits out, with explicit state.

use std::any::Any;

use tch::{Kind, Tensor};

use crate::{Error, Pass, Placement, Result, Rows, SiteId, SiteMap};

/// What is known of a language model without running it.
#[derive(Clone, Debug)]
pub struct LmSpec {
    /// The architecture, as `model_type` in Hugging Face's config.json names it.
    pub architecture: String,
    /// V: how many logits there are.
    pub vocab: i64,
    /// D: width of an embedding.
    pub width: i64,
    /// How many positions the model was made for.
    pub context: i64,
    /// The token that starts a sequence, if the model has one.
    pub bos: Option<i64>,
    /// The tokens that end a sequence.
    pub eos: Vec<i64>,
    /// The token that fills unequal rows, if the model has one.
    pub pad: Option<i64>,
    /// The token that a decoder starts with, of an encoder–decoder: its prompt is the encoder's input
    /// ([`Source::Encoder`]), and this is read first. `None` for decoder-only models, which read their prompt.
    pub decoder_start: Option<i64>,
    /// Where the model runs.
    pub placement: Placement,
}

/// Tokens, or what stands for them.
#[derive(Clone, Copy)]
pub enum Tokens<'a> {
    /// Token ids, int64 `[B, T]`.
    Ids(&'a Tensor),
    /// Embeddings `[B, T, D]`: soft tokens, soft prompts.
    Embeds(&'a Tensor),
}

impl Tokens<'_> {
    /// B and T, once ids are of a vocabulary of `vocab`, or embeddings `width` wide and of type `kind`, and `keep` is
    /// boolean `[B, T]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`]; [`Error::Value`] for a token id that is none.
    pub fn validate(&self, keep: Option<&Tensor>, vocab: i64, width: i64, kind: Kind) -> Result<(i64, i64)> {
        let (batch, len) = match self {
            Tokens::Ids(ids) => {
                let &[batch, len] = ids.size().as_slice() else {
                    return Err(Error::shape("token ids", "[B, T]", &ids.size()));
                };
                expect_kind("token ids", ids, Kind::Int64)?;
                if batch * len > 0 {
                    let (low, high) = ids.f_aminmax(None, false)?;
                    let (low, high) = (low.f_int64_value(&[])?, high.f_int64_value(&[])?);
                    if low < 0 || high >= vocab {
                        let found = if low < 0 { low } else { high };
                        return Err(Error::value("token id", format!("0 .. {vocab}"), found));
                    }
                }
                (batch, len)
            }
            Tokens::Embeds(embeds) => {
                let &[batch, len, found] = embeds.size().as_slice() else {
                    return Err(Error::shape("embeddings", "[B, T, D]", &embeds.size()));
                };
                if found != width {
                    let expected = format!("[{batch}, {len}, {width}]");
                    return Err(Error::shape("embeddings", expected, &embeds.size()));
                }
                expect_kind("embeddings", embeds, kind)?;
                (batch, len)
            }
        };
        if batch == 0 || len == 0 {
            let what = "the model's input";
            return Err(Error::value(what, "at least one row and one token", format!("[{batch}, {len}]")));
        }
        if let Some(keep) = keep {
            expect_kind("keep", keep, Kind::Bool)?;
            expect_rows("keep", keep, batch, len)?;
        }
        Ok((batch, len))
    }
}

/// Which positions' logits are wanted. The last product is a fifth of a small model's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logits {
    /// Of every position: `[B, T, V]`.
    #[default]
    All,
    /// Of the last position: `[B, 1, V]`.
    Last,
}

/// The input of one forward pass.
#[derive(Clone, Copy)]
pub struct LmInput<'a> {
    /// The tokens.
    pub tokens: Tokens<'a>,
    /// Boolean `[B, T]`: false marks padding, which no token sees, now or later. All true where `None`.
    pub keep: Option<&'a Tensor>,
    /// Positions, int64 `[B, T]`. Where `None` a row's tokens count on from the tokens it had, padding not counted
    /// (the cumulative sum of `keep`, less 1, at least 0).
    pub positions: Option<&'a Tensor>,
    /// Which logits are wanted.
    pub logits: Logits,
}

impl<'a> LmInput<'a> {
    /// Token ids `[B, T]`.
    pub fn ids(ids: &'a Tensor) -> Self {
        Self { tokens: Tokens::Ids(ids), keep: None, positions: None, logits: Logits::All }
    }

    /// Embeddings `[B, T, D]`.
    pub fn embeds(embeds: &'a Tensor) -> Self {
        Self { tokens: Tokens::Embeds(embeds), keep: None, positions: None, logits: Logits::All }
    }

    /// Marks padding.
    #[must_use]
    pub fn keep(self, keep: Option<&'a Tensor>) -> Self {
        Self { keep, ..self }
    }

    /// Gives positions.
    #[must_use]
    pub fn positions(self, positions: Option<&'a Tensor>) -> Self {
        Self { positions, ..self }
    }

    /// Asks for the last position's logits alone.
    #[must_use]
    pub fn last(self) -> Self {
        Self { logits: Logits::Last, ..self }
    }

    /// B and T, once everything agrees with everything.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`]; [`Error::Value`] for a token id that is none.
    pub fn validate(&self, spec: &LmSpec) -> Result<(i64, i64)> {
        let (batch, len) = self.tokens.validate(self.keep, spec.vocab, spec.width, spec.placement.kind)?;
        if let Some(positions) = self.positions {
            expect_kind("positions", positions, Kind::Int64)?;
            expect_rows("positions", positions, batch, len)?;
        }
        Ok((batch, len))
    }
}

fn expect_kind(what: &str, tensor: &Tensor, expected: Kind) -> Result<()> {
    let found = tensor.f_kind()?;
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
    Err(Error::Kind { what: what.to_owned(), expected, found })
}

fn expect_rows(what: &str, tensor: &Tensor, batch: i64, len: i64) -> Result<()> {
    if tensor.size() == [batch, len] {
        return Ok(());
    }
    Err(Error::shape(what, format!("[{batch}, {len}]"), &tensor.size()))
}

/// What a model starts from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Nothing but the number of rows: decoder-only models.
    Rows(i64),
    /// The encoder's input: encoder–decoder models.
    Encoder(LmInput<'a>),
}

/// The output of one forward pass.
#[derive(Debug)]
pub struct LmOutput {
    /// The next token's logits after each position: `[B, T, V]`, or `[B, 1, V]` under [`Logits::Last`].
    pub logits: Tensor,
}

/// What a model remembers of the tokens it has read: the implementer's side of [`State`].
///
/// Reordering rows is [`State`]'s `Rows::reorder`.
pub trait StateImpl: Any + Send {
    /// An independent copy. It may share storage as long as no write is seen through the other.
    fn fork(&self) -> Result<Box<dyn StateImpl>>;

    /// Makes row `i` what row `rows[i]` was.
    fn reorder(&mut self, rows: &[i64]) -> Result<()>;

    /// Forgets everything from position `len` on.
    fn truncate(&mut self, len: i64) -> Result<()>;

    /// How many positions it holds, padding included.
    fn len(&self) -> i64;

    /// Whether it holds no position.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many rows it has.
    fn rows(&self) -> i64;

    /// Makes room for `len` positions in all, to avoid growing step by step. A hint.
    fn reserve(&mut self, len: i64) -> Result<()> {
        let _ = len;
        Ok(())
    }
}

/// What a model remembers of the tokens it has read. Made by [`LanguageModel::start`], owned by the caller.
pub struct State(Box<dyn StateImpl>);

impl State {
    /// Boxes a model's own state.
    pub fn new(state: impl StateImpl) -> Self {
        Self(Box::new(state))
    }

    /// An independent state with the same content.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn fork(&self) -> Result<Self> {
        Ok(Self(self.0.fork()?))
    }

    /// Forgets everything from position `len` on.
    ///
    /// # Errors
    /// [`Error::Value`] where it holds fewer positions.
    pub fn truncate(&mut self, len: i64) -> Result<()> {
        if len < 0 || len > self.len() {
            return Err(Error::value("positions to keep", format!("0 ..= {}", self.len()), len));
        }
        self.0.truncate(len)
    }

    /// How many positions it holds, padding included.
    pub fn len(&self) -> i64 {
        self.0.len()
    }

    /// Whether it holds no position.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many rows it has.
    pub fn rows(&self) -> i64 {
        self.0.rows()
    }

    /// Makes room for `len` positions in all. A hint.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn reserve(&mut self, len: i64) -> Result<()> {
        self.0.reserve(len)
    }

    /// The model's own state.
    ///
    /// # Errors
    /// [`Error::ForeignState`] where another kind of model made it.
    pub fn downcast<T: StateImpl>(&mut self, expected: &'static str) -> Result<&mut T> {
        let any: &mut dyn Any = &mut *self.0;
        any.downcast_mut().ok_or(Error::ForeignState { expected })
    }
}

impl Rows for State {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        if let Some(&row) = rows.iter().find(|&&row| row < 0 || row >= self.rows()) {
            return Err(Error::value("row", format!("0 .. {}", self.rows()), row));
        }
        if (0..self.rows()).eq(rows.iter().copied()) {
            return Ok(());
        }
        self.0.reorder(rows)
    }
}

/// Answers for a linear or embedding site's weight `[outputs, inputs]` (`[rows, width]`) with another one, or leaves it;
/// and after it for the site's bias `[outputs]`, if it has one. Number of dimensions tells them apart.
pub type WeightMap<'f> = &'f mut dyn FnMut(SiteId, &Tensor) -> Result<Option<Tensor>>;

/// A language model: p(token | tokens before it).
///
/// A model is an owned handle over shared weights: [`LanguageModel::handle`] makes another, for another thread, in
/// microseconds. It is not `Sync`, because LibTorch's tensors are not. All that changes is in [`State`].
///
/// Whether gradients are recorded is the caller's choice: searches run under `tch::no_grad_guard`, energies do not.
///
/// What every implementer keeps is what `testing::contract::language_model` checks. A `&dyn LanguageModel` is a
/// `&dyn Any` too, for what only some architectures can do.
pub trait LanguageModel: Any + Send {
    /// Another handle over the same weights and sites.
    fn handle(&self) -> Box<dyn LanguageModel>;

    /// What is known of it.
    fn spec(&self) -> &LmSpec;

    /// Where controls may act.
    fn sites(&self) -> &SiteMap;

    /// The table of token embeddings, `[V, D]`.
    fn embeddings(&self) -> &Tensor;

    /// A state that has read nothing.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a source that the model has no use for.
    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State>;

    /// Reads tokens, and gives the logits of what follows each.
    ///
    /// # Errors
    /// Those of [`LmInput::validate`]; [`Error::Context`] past the last position; [`Error::ForeignState`];
    /// [`Error::ForeignSites`]; the controls'.
    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput>;

    /// A handle in which the weights and biases that `f` answers for are replaced and all others shared. Dropping it undoes
    /// the change, to the bit.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>>;
}

impl<M: LanguageModel + ?Sized> LanguageModel for Box<M> {
    fn handle(&self) -> Box<dyn LanguageModel> {
        (**self).handle()
    }
    fn spec(&self) -> &LmSpec {
        (**self).spec()
    }
    fn sites(&self) -> &SiteMap {
        (**self).sites()
    }
    fn embeddings(&self) -> &Tensor {
        (**self).embeddings()
    }
    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        (**self).start(source, pass)
    }
    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        (**self).forward(input, state, pass)
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        (**self).map_weights(f)
    }
}
