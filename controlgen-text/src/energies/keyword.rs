//! Whether a text says a word.

use controlgen_core::energy::{EnergyFn, Text};
use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

use crate::tokenizer::Tokenizer;

/// The log-probability of a token that has none: COLD's floor.
const FLOOR: f64 = -20.0;

/// How near to certain a window's probability comes, so that the gradient stays a number.
const CERTAIN: f64 = 1.0 - 1e-12;

/// −log of the soft presence of a word, `[B]`: 0 where the text says it.
///
/// A spelling w₁ … wₙ stands at position t of soft tokens π with probability pₜ = Πₖ πₜ₊ₖ(wₖ), and the word is
/// present where it stands anywhere, in any of its spellings, each window taken to be independent:
///
/// E(π) = −log(1 − Πₜ (1 − pₜ))
///
/// Windows that overlap are not independent, so that this is the probability of presence only for π that are nearly
/// one-hot, as at the end of a search. log π is taken to be at least −20. Both are differentiable surrogates of the
/// n-gram match of COLD (Qin et al. 2022, whose log π has that floor, and which draws one position by Gumbel-softmax
/// where this takes all) and of the keyword constraint of MuCoLa (Kumar, Paria & Tsvetkov 2022, by distances of
/// embeddings). At one-hot π it is what the tokens cost: 0, within 1e-11, for a text that says the word, and 20 for
/// each missing token of the best window, less the log of how many windows are as good, for one that does not.
///
/// Windows with padding in them do not count; a row without any other has an energy of +∞. Several words are a sum
/// of energies.
///
/// *Cost*: a few operations on `[B, T]` in f64 for each token of each spelling.
#[derive(Clone, Debug)]
pub struct Keyword {
    spellings: Vec<Vec<i64>>,
}

impl Keyword {
    /// The word in these spellings, token ids: inflections, with and without a space before it.
    ///
    /// # Errors
    /// [`Error::Value`] for no spelling, an empty one, one of more than 30 tokens, or a negative id.
    pub fn new(spellings: impl IntoIterator<Item: AsRef<[i64]>>) -> Result<Self> {
        let spellings: Vec<Vec<i64>> = spellings.into_iter().map(|s| s.as_ref().to_vec()).collect();
        if spellings.is_empty() {
            return Err(Error::value("spellings of a keyword", "at least one", 0));
        }
        for spelling in &spellings {
            // exp(−20 · 30) is still a number in f64.
            if !(1..=30).contains(&spelling.len()) {
                return Err(Error::value("tokens of a keyword", "1 ..= 30", spelling.len()));
            }
            if let Some(token) = spelling.iter().find(|&&token| token < 0) {
                return Err(Error::value("token id of a keyword", ">= 0", token));
            }
        }
        Ok(Self { spellings })
    }

    /// The word in every spelling of [`Tokenizer::spellings`].
    ///
    /// # Errors
    /// As there, and as [`Keyword::new`].
    pub fn spelled(tokenizer: &Tokenizer, word: &str) -> Result<Self> {
        Self::new(tokenizer.spellings(word)?)
    }
}

/// The probability of a token at each position, f64 `[B, T]`.
fn column(x: &Text, token: i64) -> Result<Tensor> {
    match x {
        Text::Hard { ids, .. } => Ok(ids.f_eq(token)?.f_to_kind(Kind::Double)?),
        Text::Soft { probs, .. } => Ok(probs.f_select(-1, token)?.f_to_kind(Kind::Double)?),
    }
}

/// B and T, once the text is one.
fn shape(x: &Text, largest: i64) -> Result<(i64, i64)> {
    let (rows, len) = match x {
        Text::Hard { ids, .. } => {
            let &[rows, len] = ids.size().as_slice() else {
                return Err(Error::shape("token ids", "[B, T]", &ids.size()));
            };
            (rows, len)
        }
        Text::Soft { probs, .. } => {
            let &[rows, len, vocab] = probs.size().as_slice() else {
                return Err(Error::shape("soft tokens", "[B, T, V]", &probs.size()));
            };
            if largest >= vocab {
                return Err(Error::value("token id of a keyword", format!("0 .. {vocab}"), largest));
            }
            (rows, len)
        }
    };
    match x.keep() {
        Some(keep) if keep.size() != [rows, len] => {
            Err(Error::shape("keep", format!("[{rows}, {len}]"), &keep.size()))
        }
        _ => Ok((rows, len)),
    }
}

impl EnergyFn<Text> for Keyword {
    /// In the type of soft tokens; f32 for token ids.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Value`] for a spelling that the vocabulary lacks.
    fn energy(&self, x: &Text) -> Result<Tensor> {
        let (rows, len) = shape(x, self.spellings.iter().flatten().copied().max().unwrap_or(0))?;
        let (device, kind) = match x {
            Text::Hard { ids, .. } => (ids.device(), Kind::Float),
            Text::Soft { probs, .. } => (probs.device(), probs.f_kind()?),
        };
        // Σₜ log(1 − pₜ), over all spellings: (B)
        let mut absent = Tensor::f_zeros([rows], (Kind::Double, device))?;
        for spelling in &self.spellings {
            let n = i64::try_from(spelling.len()).unwrap_or(i64::MAX);
            let windows = len - n + 1;
            if windows < 1 {
                continue;
            }
            let mut log_p = Tensor::f_zeros([rows, windows], (Kind::Double, device))?;
            let mut whole: Option<Tensor> = None;
            for (k, &token) in (0i64..).zip(spelling) {
                let p = column(x, token)?.f_narrow(1, k, windows)?;
                log_p = log_p.f_add(&p.f_clamp_min(FLOOR.exp())?.f_log()?)?;
                if let Some(keep) = x.keep() {
                    let keep = keep.f_narrow(1, k, windows)?;
                    whole = Some(whole.map_or_else(|| Ok(keep.shallow_clone()), |w| w.f_logical_and(&keep))?);
                }
            }
            let p = log_p.f_exp()?.f_clamp_max(CERTAIN)?;
            let p = match whole {
                Some(whole) => p.f_masked_fill(&whole.f_logical_not()?, 0.0)?,
                None => p,
            };
            let each = p.f_neg()?.f_log1p()?;
            absent = absent.f_add(&each.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)?;
        }
        // −log(1 − exp(absent)), without cancellation.
        Ok(absent.f_expm1()?.f_neg()?.f_log()?.f_neg()?.f_to_kind(kind)?)
    }
}
