//! Regularised decoding: surprisal spread evenly.

use controlgen_core::{Error, Result, Rows, TokenControl};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::check;
use super::scores;

/// A measure R(x) of how unevenly a text spreads its surprisal. With uₜ(v) = −log p(v | y, x₁ … xₜ₋₁), uₜ = uₜ(xₜ),
/// u₀ = 0 and n tokens, the one that ends the text included:
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Regulariser {
    /// Σₜ (uₜ − minᵥ uₜ(v))²: how far each token is from the most probable one. With λ → ∞, greedy search; with beams
    /// between, what beam search does to the most probable text.
    Greedy,
    /// (1/n) Σₜ (uₜ − ū)², ū the mean of u₁ … uₙ.
    Variance,
    /// (1/n) Σₜ (uₜ − uₜ₋₁)², the first token against 0: "local consistency".
    Local,
    /// maxₜ uₜ.
    Max,
    /// Σₜ uₜ².
    Squared,
}

/// Decodes for Σₜ log p(xₜ | y, x₁ … xₜ₋₁) − λ R(x), with R one of [`Regulariser`]. Meister, Vieira and Cotterell, "If beam
/// search is the answer, what was the question?" (EMNLP 2020), sections 4 and 5.
///
/// Each token's score gets −λ times what the token changes of R, so that the sum over a text is the objective above,
/// whatever the search: beams as wide as all texts give its maximum. p is the distribution that reaches the control,
/// normalised: put it before others if it is to be the model's own.
///
/// The variance, and "local", may *fall* as a text goes on, so a score may be positive and the best may come late: with
/// these a search by beams goes on to the end
/// ([`EarlyStopping::Exhausted`](crate::search::EarlyStopping::Exhausted)). The objective is a sum: a length penalty
/// of 0.
///
/// *Cost*: a log-sum-exp and about five passes over `[B, V]`, and one buffer of that size kept until the next step.
///
/// ```no_run
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::controls::{MinLength, Regularised, Regulariser};
/// use controlgen_text::search::{BeamSearch, EarlyStopping};
///
/// # fn main() -> Result<()> {
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let beams = BeamSearch::new(10)?.length_penalty(0.0)?.early_stopping(EarlyStopping::Exhausted);
/// for weight in [0.0, 1.0] {
///     let generation = model
///         .generate("Once upon a time,")
///         .with(Regularised::new(Regulariser::Greedy, weight)?)
///         .with(MinLength::new(28, model.eos().to_vec())?)
///         .search(beams)
///         .max_new_tokens(28)
///         .run()?;
///     println!("{weight}:{}", generation.text());
/// }
/// // 0: in a land far, far away, there was a kingdom called Eridus. Eridus was ruled by a king named Aeth
/// // 1: there was a small town nestled in the heart of a bustling city. The town was called Ravenscroft, and it was
/// //    famous for
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regularised {
    regulariser: Regulariser,
    weight: f64,
}

impl Regularised {
    /// `weight`, the paper's λ, in 0 ..= 1e6; 0 changes nothing.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn new(regulariser: Regulariser, weight: f64) -> Result<Self> {
        let holds = (0.0..=1e6).contains(&weight);
        Ok(Self { regulariser, weight: check::number("regularizer_weight", "0 ..= 1e6", weight, holds)? })
    }
}

/// What a row's regulariser has come to.
#[derive(Clone, Copy, Debug, Default)]
struct SoFar {
    /// Tokens chosen.
    tokens: f64,
    /// Variance: the mean of u.
    mean: f64,
    /// Variance: Σ (u − mean)². Local: Σ of squared differences.
    squares: f64,
    /// Local: the last u. Max: the greatest.
    surprisal: f64,
}

/// The change of R that a token of surprisal u makes: `constant` + `factor` · (u − `centre`)².
struct Change {
    constant: f64,
    factor: f64,
    centre: f64,
}

impl SoFar {
    /// All regularisers but the greatest change by a square; the greedy one's centre is the row's own minimum.
    fn change(&self, regulariser: Regulariser) -> Change {
        let (n, next) = (self.tokens, self.tokens + 1.0);
        // What a mean of n squares loses by being one of n + 1.
        let diluted = if n > 0.0 { -self.squares / (n * next) } else { 0.0 };
        match regulariser {
            Regulariser::Greedy | Regulariser::Max | Regulariser::Squared => {
                Change { constant: 0.0, factor: 1.0, centre: 0.0 }
            }
            // Welford: Σ (u − mean)² grows by (u − mean)² n / (n + 1).
            Regulariser::Variance => {
                Change { constant: diluted, factor: n / (next * next), centre: self.mean }
            }
            Regulariser::Local => Change { constant: diluted, factor: 1.0 / next, centre: self.surprisal },
        }
    }

    fn push(&mut self, regulariser: Regulariser, u: f64) {
        let before = self.tokens;
        self.tokens += 1.0;
        match regulariser {
            Regulariser::Greedy | Regulariser::Squared => {}
            Regulariser::Variance => {
                let apart = u - self.mean;
                self.squares += apart * apart * before / self.tokens;
                self.mean += apart / self.tokens;
            }
            Regulariser::Local => {
                self.squares += (u - self.surprisal).powi(2);
                self.surprisal = u;
            }
            Regulariser::Max => self.surprisal = self.surprisal.max(u),
        }
    }
}

/// The rows' sums, and the surprisals that were last scored.
pub struct RegularisedState {
    rows: Vec<SoFar>,
    last: Option<Surprisals>,
}

/// The surprisal of every token, `[B, V]`, as it was when the rows were scored.
struct Surprisals {
    all: Tensor,
    /// Which of its rows each row is: reordering copies nothing.
    at: Vec<i64>,
}

impl Rows for RegularisedState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        if let Some(last) = &mut self.last {
            last.at.reorder(rows)?;
        }
        self.rows.reorder(rows)
    }
}

/// `[B, 1]` on the device.
fn column(values: impl Iterator<Item = f64>, device: Device) -> Result<Tensor> {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    Ok(Tensor::f_from_slice(&values)?.f_unsqueeze(1)?.f_to_device(device)?)
}

impl TokenControl for Regularised {
    type State = RegularisedState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<RegularisedState> {
        let rows = scores::start_rows(prompts, |_| SoFar::default())?;
        Ok(RegularisedState { rows, last: None })
    }

    fn score(&self, state: &mut RegularisedState, mut logits: Tensor) -> Result<Tensor> {
        scores::vocab(&logits, state.rows.len())?;
        let device = logits.device();
        // A row of which all is banned has a sum of −∞, and u would be NaN.
        let sum = logits.f_logsumexp([-1].as_slice(), true)?.f_clamp_min(f64::from(f32::MIN))?;
        let all = sum.f_sub(&logits)?; // u, (B, V)
        let changes: Vec<Change> = state.rows.iter().map(|row| row.change(self.regulariser)).collect();
        match self.regulariser {
            Regulariser::Max => {
                let greatest = column(state.rows.iter().map(|row| row.surprisal), device)?;
                let mut over = all.f_sub(&greatest)?;
                let _ = over.f_clamp_min_(0.0)?;
                self.subtract(&mut logits, over)?;
            }
            regulariser => {
                let centre = match regulariser {
                    Regulariser::Greedy => all.f_amin([-1].as_slice(), true)?,
                    _ => column(changes.iter().map(|change| change.centre), device)?,
                };
                let mut squares = all.f_sub(&centre)?;
                let _ = squares.f_square_()?;
                if changes.iter().any(|change| change.factor != 1.0) {
                    // ∞ · 0 is NaN: what cannot be said stays far away instead.
                    let _ = squares.f_clamp_max_(f64::from(f32::MAX))?;
                    let _ = squares.f_mul_(&column(changes.iter().map(|change| change.factor), device)?)?;
                }
                self.subtract(&mut logits, squares)?;
                if changes.iter().any(|change| change.constant != 0.0) {
                    let constants = changes.iter().map(|change| -self.weight * change.constant);
                    let _ = logits.f_add_(&column(constants, device)?)?;
                }
            }
        }
        let at = (0..state.rows.len()).map(|row| row as i64).collect();
        state.last = Some(Surprisals { all, at });
        Ok(logits)
    }

    /// # Errors
    /// [`Error::Value`] where the rows were not scored since they last chose a token: its surprisal is not known.
    fn advance(&self, state: &mut RegularisedState, tokens: &[i64]) -> Result<()> {
        check::rows("tokens", state.rows.len(), tokens.len())?;
        check::tokens("chosen tokens", tokens)?;
        let Some(Surprisals { all, at }) = state.last.take() else {
            return Err(Error::value("a regularised token", "rows that were scored before it", "none"));
        };
        let (_, vocab) = scores::dims(&all)?;
        tokens.iter().try_for_each(|&token| scores::in_vocabulary("chosen tokens", token, vocab))?;
        let cells: Vec<i64> = at.iter().zip(tokens).map(|(row, token)| row * vocab + token).collect();
        let index = Tensor::f_from_slice(&cells)?.f_to_device(all.device())?;
        let chosen = scores::to_vec(&all.f_view([-1])?.f_index_select(0, &index)?)?;
        for (row, u) in state.rows.iter_mut().zip(chosen) {
            row.push(self.regulariser, f64::from(u));
        }
        Ok(())
    }
}

impl Regularised {
    /// Subtracts λ times the change. Where λ is 0 an infinite one counts nothing either.
    fn subtract(&self, logits: &mut Tensor, mut change: Tensor) -> Result<()> {
        if self.weight > 0.0 {
            let _ = change.f_mul_scalar_(self.weight)?;
            let _ = logits.f_sub_(&change)?;
        }
        Ok(())
    }
}
