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
mod denoiser;
mod energy;
mod guidance;
mod language_model;
mod probe;
mod token_control;

pub use guidance::GuidanceCase;

use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::energy::{Energy, Image, Point};
use crate::noise::Noise;
use crate::{
    Adapter, Condition, Denoiser, EnergyFn, Error, Guidance, LanguageModel, Result, Rows, TokenControl,
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
    ]
}

/// Checks a language model that starts from [`Source::Rows`](crate::Source::Rows).
///
/// | clause | what holds |
/// |---|---|
/// | `spec` | the table of embeddings and the logits have the shapes that `spec` tells; special tokens are tokens |
/// | `start` | a new state is empty and has the rows asked for; no rows are refused, as is an encoder's input |
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
/// | `map_weights` | it offers every linear site's weight; without an answer nothing changes, to the bit; with one the original stays; another shape is refused |
/// | `failing control` | an error of a control is passed on, and the state is as before |
/// | `foreign sites` | controls bound to another model are refused |
/// | `foreign state` | a state of another kind is refused |
/// | `lanes` | lanes that are not one a row are refused |
/// | `bad input` | token ids that are none, wrong types and shapes are refused by type, and the state is as before |
/// | `context` | positions past the last are refused, naming the limit, and the state is as before; a context of up to 256 can be filled |
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
/// | `merged` | the merged model does what the control does, or merging is refused as [`Error::Unsupported`] |
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

/// What a clause is called, and how it is checked.
type Clause<C> = (&'static str, fn(&C) -> Check);

type Check = Result<(), Breach>;

/// Why a clause does not hold.
enum Breach {
    Found {
        expected: String,
        found: String,
    },
    /// An error where none is due.
    Failed(Error),
}

impl From<Error> for Breach {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<tch::TchError> for Breach {
    fn from(error: tch::TchError) -> Self {
        Self::Failed(error.into())
    }
}

impl Breach {
    fn in_clause(self, contract: &'static str, clause: &'static str) -> Violation {
        let (expected, found) = match self {
            Self::Found { expected, found } => (expected, found),
            Self::Failed(error) => ("no error".to_owned(), format!("the error \"{error}\"")),
        };
        Violation { contract, clause, expected, found }
    }
}

/// Checks all clauses, in order.
fn check<C>(contract: &'static str, clauses: &[Clause<C>], case: &C) -> Result<(), Violation> {
    clauses.iter().try_for_each(|(name, clause)| clause(case).map_err(|b| b.in_clause(contract, name)))
}

fn breach<T>(expected: impl fmt::Display, found: impl fmt::Display) -> Result<T, Breach> {
    Err(Breach::Found { expected: expected.to_string(), found: found.to_string() })
}

fn demand(holds: bool, expected: impl fmt::Display, found: impl fmt::Display) -> Check {
    if holds { Ok(()) } else { breach(expected, found) }
}

/// Demands an error of a kind.
macro_rules! refused {
    ($what:expr, $result:expr, $pattern:pat) => {
        match $result {
            Err($pattern) => Ok(()),
            Err(error) => crate::testing::contract::breach(
                format!("{} to be refused as {}", $what, stringify!($pattern)),
                format!("the error \"{error}\""),
            ),
            Ok(_) => crate::testing::contract::breach(
                format!("{} to be refused as {}", $what, stringify!($pattern)),
                "no error",
            ),
        }
    };
}
use refused;

fn sized(what: &str, found: &Tensor, expected: &[i64]) -> Check {
    let size = found.size();
    demand(size == expected, format!("{what}: shape {expected:?}"), format!("{size:?}"))
}

/// Equal but for roundings: at most `tolerance` apart, as a part of the largest or, below 1, absolutely. Infinities
/// are equal; NaN is equal to nothing.
fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) -> Check {
    sized(what, found, &expected.size())?;
    let plain = |t: &Tensor| t.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
    let (a, b) = (plain(found)?, plain(expected)?);
    if a.numel() == 0 {
        return Ok(());
    }
    let difference = a.f_sub(&b)?.f_abs()?.f_masked_fill(&a.f_eq_tensor(&b)?, 0.0)?;
    let largest = b.f_abs()?.f_masked_fill(&b.f_isfinite()?.f_logical_not()?, 0.0)?;
    let limit = tolerance * largest.f_max()?.f_double_value(&[])?.max(1.0);
    let worst = difference.f_max()?.f_double_value(&[])?;
    demand(worst <= limit, format!("{what}: a difference of at most {limit:.1e}"), format!("{worst:.3e}"))
}

/// Equal to the bit.
fn equal(what: &str, found: &Tensor, expected: &Tensor) -> Check {
    sized(what, found, &expected.size())?;
    if found.f_equal(expected)? {
        return Ok(());
    }
    let worst = found.f_sub(expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    breach(format!("{what}: the same to the bit"), format!("a difference of up to {worst:.3e}"))
}

/// Demands a difference.
fn different(what: &str, found: &Tensor, from: &Tensor) -> Check {
    let same = found.size() == from.size() && found.f_equal(from)?;
    demand(!same, format!("{what}: a difference"), "the same to the bit")
}

fn finite(what: &str, found: &Tensor) -> Check {
    let fine = found.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
    demand(fine, format!("{what}: finite numbers"), "NaN or infinity")
}

/// Standard normals that depend on the seed and `salt` alone.
fn noise(seed: u64, salt: u64, shape: &[i64], (kind, device): (Kind, Device)) -> Result<Tensor> {
    Ok(Noise::seeded(seed)
        .stream(salt)
        .normal(shape, Kind::Double, Device::Cpu)?
        .f_to_device(device)?
        .f_to_kind(kind)?)
}

/// What `f` gives on another thread, on which gradients are off too.
fn on_thread<R: Send + 'static>(f: impl FnOnce() -> Result<R> + Send + 'static) -> Result<R, Breach> {
    let thread = std::thread::spawn(move || {
        let _no_gradients = tch::no_grad_guard();
        f()
    });
    match thread.join() {
        Ok(result) => Ok(result?),
        Err(_) => breach("the same on another thread", "a panic"),
    }
}

/// Whether gradients are being recorded.
fn recording() -> Result<bool> {
    let leaf = Tensor::f_ones([1], tch::kind::FLOAT_CPU)?.f_set_requires_grad(true)?;
    Ok(leaf.f_mul_scalar(2.0)?.requires_grad())
}

/// Demands that `gradient` be that of f `[B]` at x `[B, ..]`, whose rows are independent: along random directions, by
/// central differences of fourth order. Roundings spoil small steps, and kinks large ones: one must do.
fn by_differences(
    what: &str,
    x: &Tensor,
    gradient: &Tensor,
    seed: u64,
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Check {
    sized(what, gradient, &x.size())?;
    let double = x.f_kind()? == Kind::Double;
    let (steps, tolerance) = if double { ([1e-3, 1e-4, 1e-5], 1e-5) } else { ([2e-2, 5e-3, 1e-3], 5e-2) };
    let scale = x.f_to_kind(Kind::Double)?.f_square()?.f_mean(None::<Kind>)?.f_sqrt()?.f_double_value(&[])?;
    for salt in 1..=3 {
        let u = noise(seed, salt, &x.size(), (x.f_kind()?, x.device()))?.f_mul_scalar(scale.max(1e-3))?;
        let product = gradient.f_mul(&u)?.f_to_kind(Kind::Double)?.f_flatten(1, -1)?;
        let slopes: Vec<f64> = Vec::try_from(product.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)?;
        let mut told = Ok(());
        for h in steps {
            let at = |k: f64| -> Result<Vec<f64>> {
                Ok(Vec::try_from(f(&x.f_add(&u.f_mul_scalar(k * h)?)?)?.f_to_kind(Kind::Double)?)?)
            };
            let (a, b, c, d) = (at(-2.0)?, at(-1.0)?, at(1.0)?, at(2.0)?);
            let slope = |i: usize| (8.0 * (c[i] - b[i]) - (d[i] - a[i])) / (12.0 * h);
            let expected: Vec<f64> = (0..a.len()).map(slope).collect();
            let largest = expected.iter().fold(1e-6f64, |m, x| m.max(x.abs()));
            told = slopes.iter().zip(&expected).enumerate().try_for_each(|(row, (found, expected))| {
                let expect = format!("{what}: a slope of {expected:.6} in row {row}, by finite differences");
                demand((found - expected).abs() <= tolerance * largest, expect, format!("{found:.6}"))
            });
            if told.is_ok() {
                break;
            }
        }
        told?;
    }
    Ok(())
}
