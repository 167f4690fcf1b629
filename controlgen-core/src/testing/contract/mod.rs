//! Contracts: what every implementer of a trait must keep, ours or anybody's, as one call in a test.
//!
//! ```
//! use controlgen_core::testing::{TableLm, contract};
//!
//! let model = TableLm::random(5, 0)?;
//! contract::language_model(&model).unwrap();
//! # Ok::<(), controlgen_core::Error>(())
//! ```
//!
//! A contract is a list of clauses ([`clauses`]), checked in order; the first that is broken is returned as a
//! [`Violation`], which says what was expected and found. Inputs are drawn from a seed, so a violation comes back.
//! What a contract cannot know is whether the numbers are right: that takes a reference. It knows when they
//! contradict each other.

mod adapter;
mod clause;
mod denoiser;
mod encoder;
mod energy;
mod guidance;
mod language_model;
mod probe;
mod token_control;

use std::fmt;

use tch::Kind;

use clause::{
    Breach, Check, Clause, breach, by_differences, check, close, demand, different, equal, finite, noise,
    on_thread, recording, refused, sized,
};
pub use guidance::GuidanceCase;

use crate::energy::{Energy, Image, Point};
use crate::{
    Adapter, Condition, Denoiser, Encoder, EnergyFn, Guidance, LanguageModel, Result, Rows, TokenControl,
    TokenControls,
};

/// A clause that does not hold.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("contract `{contract}`, clause `{clause}`: expected {expected}; found {found}")]
pub struct Violation {
    /// The contract: the name of its function here.
    pub contract: &'static str,
    /// The clause, as [`clauses`] lists it.
    pub clause: &'static str,
    /// What should hold.
    pub expected: String,
    /// What was seen.
    pub found: String,
}

/// The sentence, as `unwrap` prints it.
impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How contracts are checked. The functions of this module check with the defaults; the methods of the same names
/// with what is set here.
#[derive(Clone, Debug)]
pub struct Options {
    /// How far two computations of the same number may lie apart, as a part of the largest or, below 1, absolutely.
    /// Where `None`: 1e-9 in f64, 1e-4 in f32, 2e-2 in f16, 1e-1 in bf16.
    pub tolerance: Option<f64>,
    /// What the inputs are drawn from.
    pub seed: u64,
    /// Whether an adapter that was just made must be the identity, to the bit. A prefix is not.
    pub identity: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { tolerance: None, seed: 0, identity: true }
    }
}

impl Options {
    fn tolerance(&self, kind: Kind) -> f64 {
        self.tolerance.unwrap_or(match kind {
            Kind::Double => 1e-9,
            Kind::Half => 2e-2,
            Kind::BFloat16 => 1e-1,
            _ => 1e-4,
        })
    }
}

/// Every contract, and the names of its clauses in the order in which they are checked.
pub fn clauses() -> Vec<(&'static str, Vec<&'static str>)> {
    fn names<C>(clauses: &[Clause<C>]) -> Vec<&'static str> {
        clauses.iter().map(|clause| clause.0).collect()
    }
    vec![
        ("language_model", names(&language_model::clauses())),
        ("token_control", names(&token_control::clauses::<TokenControls>())),
        ("adapter", names(&adapter::clauses())),
        ("energy", names(&energy::clauses::<Image, Energy<Image>>())),
        ("denoiser", names(&denoiser::clauses())),
        ("guidance", names(&guidance::clauses())),
        ("encoder", names(&encoder::clauses())),
    ]
}

/// Checks a language model: one that starts from [`Source::Rows`](crate::Source::Rows), or an encoder–decoder, whose encoder
/// then reads the same text in every row.
///
/// | clause | what holds |
/// |---|---|
/// | `spec` | the table of embeddings and the logits have the shapes that `spec` tells; special tokens are tokens |
/// | `start` | a new state is empty and has the rows asked for; no rows are refused, as is an encoder's input; by an encoder–decoder, rows without one |
/// | `repeatable` | equal inputs to new states give equal logits, to the bit |
/// | `cached` | reading in pieces gives what reading at once gives |
/// | `last` | [`Logits::Last`](crate::Logits::Last) is the last of all |
/// | `fork` | a fork and its original know nothing of each other |
/// | `truncate` | what was cut off is forgotten |
/// | `reorder` | reordered rows go on as themselves |
/// | `embeddings` | rows of the table of embeddings do what their tokens do |
/// | `rows` | a row of a batch gives what it gives alone |
/// | `padding` | so does a row that is padded, on either side, whatever it is padded with |
/// | `positions` | the positions that are counted where none are given do what they do when given |
/// | `gradients` | those with respect to embeddings, through the cache, are those of finite differences (f32 and f64); those of what comes later are zero |
/// | `no gradients` | where the caller turned gradients off, nothing is recorded |
/// | `handle` | a handle does the same, with the same states, on another thread too |
/// | `sites` | of one kind no two have a name or alias in common |
/// | `hooks` | a pass comes by every declared site, with values of the declared dimensions |
/// | `identity control` | a control that does nothing at every site changes nothing, to the bit |
/// | `effect` | what a control changes at a site changes the logits |
/// | `map_weights` | it offers every linear site's weight, and after it the bias if there is one; without an answer nothing changes, to the bit; with one the original stays; another shape is refused |
/// | `failing control` | an error of a control is passed on, and the state is as before |
/// | `foreign sites` | controls bound to another model are refused |
/// | `foreign state` | a state of another kind is refused |
/// | `lanes` | lanes that are not one a row are refused |
/// | `bad input` | token ids that are none, wrong types and shapes are refused by type, and the state is as before |
/// | `context` | positions past the last are refused, naming the limit, and the state is as before; a context of up to 256 can be filled; one of 2²⁴ or more is none |
///
/// It takes a few hundred passes over a few tokens, one or two for each site among them, and a model with room for
/// 8 positions.
///
/// # Errors
/// The first clause that does not hold.
pub fn language_model(lm: &dyn LanguageModel) -> Result<(), Violation> {
    Options::default().language_model(lm)
}

/// Checks a control over the next token, of `vocab` tokens: three prompts of different lengths, each continued by
/// eight tokens that the control lets pass.
///
/// | clause | what holds |
/// |---|---|
/// | `shape` | scores are f32 `[B, V]` |
/// | `finite` | finite scores become numbers or −∞: no NaN, no +∞ |
/// | `bans` | a token at −∞ stays there |
/// | `twice` | scoring twice is scoring once |
/// | `start` | two runs of one control know nothing of each other |
/// | `rows` | a row of a batch has the scores that it has alone |
/// | `reorder` | reordered rows go on as themselves: as a fresh run with their history |
/// | `fork` | a row that was taken twice and goes on with different tokens has the scores of each: nothing of what the other took |
/// | `clone` | a clone has the same role and scores, on another thread too |
/// | `finish` | log-weights are numbers or −∞, and follow their rows |
///
/// # Errors
/// The first clause that does not hold.
pub fn token_control<C: TokenControl>(control: &C, vocab: i64) -> Result<(), Violation> {
    Options::default().token_control(control, vocab)
}

/// Checks an adapter, of which `make` gives a new one, on a model whose sites it has.
///
/// | clause | what holds |
/// |---|---|
/// | `parameters` | there are some, of different names in a stable order; they are f32 leaves, and handles share them |
/// | `identity` | just made it changes nothing, to the bit ([`Options::identity`]) |
/// | `effect` | trained it changes something, and nothing once it is gone |
/// | `gradients` | those of logits reach every parameter |
/// | `handle` | a handle does the same, on another thread too |
/// | `bind` | a model that has none of its sites is refused |
/// | `save and load` | another one that loads what it saved is the same, to the bit, through all handles |
/// | `damaged` | loading from a damaged folder gives an error and changes nothing |
/// | `merged` | the merged model does what the control does, or merging is refused as [`Error::Unsupported`](crate::Error::Unsupported) |
/// | `unmerged` | dropping the merged model leaves model and adapter as they were, to the bit |
///
/// # Errors
/// The first clause that does not hold.
pub fn adapter(lm: &dyn LanguageModel, make: impl Fn() -> Result<Box<dyn Adapter>>) -> Result<(), Violation> {
    Options::default().adapter(lm, make)
}

/// Checks an energy at a point of at least two rows; in f64, where gradients are to be held to many digits.
///
/// | clause | what holds |
/// |---|---|
/// | `shape` | one floating-point number a row, for any rows, and no NaN |
/// | `repeatable` | the second time it is the same to the bit, and the point as before |
/// | `rows` | a row of a batch has the energy that it has alone |
/// | `gradient` | it is that of finite differences (not for token ids, which have none) |
/// | `gradient mode` | nothing is recorded where the caller turned gradients off, and the caller's mode is left as it was |
/// | `clone` | a clone gives the same on another thread |
///
/// # Errors
/// The first clause that does not hold.
pub fn energy<X, E>(energy: &E, x: &X) -> Result<(), Violation>
where
    X: Point + Rows + Clone,
    E: EnergyFn<X> + Clone + Send + 'static,
{
    Options::default().energy(energy, x)
}

/// Checks a denoiser at two different timesteps, under two conditions that give different predictions.
///
/// | clause | what holds |
/// |---|---|
/// | `spec` | predictions are of the shape and type of x, f32 and f64, in the form and with the variance that `spec` tells |
/// | `repeatable` | equal calls give equal predictions, to the bit; x stays as it was |
/// | `rows` | a row of a batch, with a timestep of its own, gives what it gives alone |
/// | `select` | rows of prepared conditions by index are those conditions prepared |
/// | `handle` | a handle does the same, also with what the original prepared, on another thread too |
/// | `gradients` | those at x are those of finite differences |
/// | `no gradients` | where the caller turned gradients off, nothing is recorded |
/// | `conditions` | class −1 is refused |
/// | `prepared` | what another model prepared, or the same under other controls, is refused |
/// | `bad input` | wrong shapes, types and numbers of rows are refused by type |
/// | `lanes` | lanes that are not one a row are refused |
/// | `foreign sites` | controls bound to another model are refused |
/// | `sites` | of one kind no two have a name or alias in common |
/// | `hooks` | preparing and predicting come by every declared site, with values of the declared dimensions |
/// | `identity control` | a control that does nothing at every site changes nothing, to the bit |
/// | `effect` | what a control changes at a site changes the prediction |
/// | `map_weights` | without an answer nothing changes, to the bit; with one the original stays |
///
/// # Errors
/// The first clause that does not hold.
pub fn denoiser(model: &dyn Denoiser, conditions: &[Condition], timesteps: &[f64]) -> Result<(), Violation> {
    Options::default().denoiser(model, conditions, timesteps)
}

/// Checks an encoder of text, of a vocabulary of at least 8 and room for 6 tokens.
///
/// | clause | what holds |
/// |---|---|
/// | `spec` | features and the table of embeddings have the shapes and the type that `spec` tells |
/// | `repeatable` | equal inputs give equal features, to the bit |
/// | `embeddings` | rows of the table of embeddings do what their tokens do |
/// | `rows` | a row of a batch gives what it gives alone |
/// | `padding` | so does a row that is padded on the right, whatever it is padded with |
/// | `gradients` | those with respect to embeddings are those of finite differences (f32 and f64) |
/// | `no gradients` | where the caller turned gradients off, nothing is recorded, and the caller's mode is left as it was |
/// | `handle` | a handle does the same, on another thread |
/// | `sites` | of one kind no two have a name or alias in common |
/// | `hooks` | a pass comes by every declared site, with values of the declared dimensions |
/// | `identity control` | a control that does nothing at every site changes nothing, to the bit |
/// | `effect` | what a control changes at a site changes the features |
/// | `map_weights` | it offers every linear site's weight; without an answer nothing changes, to the bit; with one the features do, and the original stays; another shape is refused |
/// | `failing control` | an error of a control is passed on |
/// | `foreign sites` | controls bound to another model are refused |
/// | `lanes` | lanes that are not one a row are refused |
/// | `bad input` | token ids that are none, wrong types and shapes, a row of padding alone and images are refused by type |
/// | `context` | positions past the last are refused, naming the limit; where there is no last, 700 can be read |
///
/// # Errors
/// The first clause that does not hold.
pub fn encoder(encoder: &dyn Encoder) -> Result<(), Violation> {
    Options::default().encoder(encoder)
}

/// Checks a stage of guidance on predictions that the contract makes itself.
///
/// | clause | what holds |
/// |---|---|
/// | `needs` | it depends on the step alone, and names no branch twice |
/// | `before` | x keeps its shape and type, and its values unless [`GuidanceCase::replaces_x`] |
/// | `declared` | the stage gets by with the branches and gradients that it declared, and asks for none of them late |
/// | `shape` | prediction and shift are finite, of the shape and type of x; the x they are of stays |
/// | `gradient mode` | the caller's mode is left as it was |
/// | `memory` | two runs know nothing of each other |
/// | `rows` | a row of a batch is guided as it is alone |
/// | `forms` | the guided prediction is the same whatever form the model predicts in |
/// | `handle` | a handle does the same on another thread |
/// | `neutral` | [`GuidanceCase::neutral`], if given, leaves the prediction as it was |
///
/// # Errors
/// The first clause that does not hold.
pub fn guidance(stage: &dyn Guidance, case: &GuidanceCase<'_>) -> Result<(), Violation> {
    Options::default().guidance(stage, case)
}
