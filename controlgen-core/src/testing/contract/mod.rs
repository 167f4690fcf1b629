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

mod language_model;
mod probe;

use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::noise::Noise;
use crate::{Error, LanguageModel, Result};

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
    vec![("language_model", names(&language_model::clauses()))]
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
