//! Controls over the next token: place 4 of text.

use tch::Tensor;

use crate::{BoxRows, Error, Result, Rows};

/// What a control's scores mean to a sampler that corrects for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Part of the target p(x)·exp(−E(x)): sequential Monte Carlo counts log Zₜ = logsumexp of the scored
    /// log-probabilities in the weights.
    #[default]
    Potential,
    /// Shapes the proposal only, as temperature and top-p do; the weights are corrected for it.
    Proposal,
}

/// Which tokens a control may ban: what decides whether a token that another control forces can be taken without
/// asking this one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bans {
    /// None: it only moves finite scores.
    Nothing,
    /// Any but the last one left, as top-p does.
    NotTheLast,
    /// Any.
    #[default]
    Any,
}

/// A control over the next token, for a whole batch.
///
/// A search calls `start` once with the prompts, then in each step `score` and, once tokens are chosen, `advance`.
/// Between the two it may reorder rows: the state follows its rows ([`Rows`]), which is why one control works in
/// sampling, n > 1, beams, sequential Monte Carlo and Markov chains alike.
///
/// A control that thinks of one hypothesis at a time implements [`RowControl`] and is lifted by [`PerRow`].
pub trait TokenControl: Clone + Send + 'static {
    /// What it remembers of each row.
    type State: Rows;

    /// The state for these prompts, one row each; the prompts are token ids, without padding.
    ///
    /// # Errors
    /// The control's own.
    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State>;

    /// Changes the next token's scores `[B, V]`, f32 and contiguous: unnormalised log-probabilities, −∞ for a token
    /// that is banned. The tensor is the control's to overwrite.
    ///
    /// A token at −∞ stays there, a finite score becomes a number or −∞, rows have no part in each other, and scoring
    /// twice is scoring once (`testing::contract::token_control` checks it).
    ///
    /// # Errors
    /// The control's own.
    fn score(&self, state: &mut Self::State, logits: Tensor) -> Result<Tensor>;

    /// Takes note of the token that each row chose.
    ///
    /// # Errors
    /// The control's own.
    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()>;

    /// A log-weight for the finished row, added to its score by searches that rank or resample.
    ///
    /// # Errors
    /// The control's own.
    fn finish(&self, state: &Self::State, row: usize) -> Result<f64> {
        let _ = (state, row);
        Ok(0.0)
    }

    /// What its scores mean to a sampler that corrects for them.
    fn role(&self) -> Role {
        Role::Potential
    }

    /// The only token that `score` would leave in this row, whatever the logits, where that is known without them:
    /// then a search may take the token without asking the model. `None` promises nothing.
    ///
    /// # Errors
    /// The control's own.
    fn forced(&self, state: &mut Self::State, row: usize) -> Result<Option<i64>> {
        let _ = (state, row);
        Ok(None)
    }

    /// Which tokens it may ban.
    fn bans(&self) -> Bans {
        Bans::Any
    }
}

/// A control that thinks of one hypothesis at a time: its state is a value that can be cloned.
pub trait RowControl: Clone + Send + 'static {
    /// What it remembers of the hypothesis.
    type State: Clone + Send + 'static;

    /// The state for this prompt, token ids without padding.
    ///
    /// # Errors
    /// The control's own.
    fn start(&self, prompt: &[i64]) -> Result<Self::State>;

    /// Changes the next token's scores in place: `row` `[V]`, f32, a view of the batch's.
    ///
    /// # Errors
    /// The control's own.
    fn score(&self, state: &Self::State, row: &mut Tensor) -> Result<()>;

    /// Takes note of the token chosen.
    ///
    /// # Errors
    /// The control's own.
    fn advance(&self, state: &mut Self::State, token: i64) -> Result<()>;

    /// A log-weight for the finished hypothesis.
    ///
    /// # Errors
    /// The control's own.
    fn finish(&self, state: &Self::State) -> Result<f64> {
        let _ = state;
        Ok(0.0)
    }

    /// What its scores mean to a sampler that corrects for them.
    fn role(&self) -> Role {
        Role::Potential
    }

    /// Which tokens it may ban.
    fn bans(&self) -> Bans {
        Bans::Any
    }
}

/// Lifts a [`RowControl`] to batches.
#[derive(Clone, Debug)]
pub struct PerRow<C>(pub C);

impl<C: RowControl> TokenControl for PerRow<C> {
    type State = Vec<C::State>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        prompts.iter().map(|prompt| self.0.start(prompt)).collect()
    }

    fn score(&self, state: &mut Self::State, logits: Tensor) -> Result<Tensor> {
        for (i, state) in (0i64..).zip(state.iter()) {
            self.0.score(state, &mut logits.f_select(0, i)?)?;
        }
        Ok(logits)
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        if tokens.len() != state.len() {
            return Err(Error::value("tokens", format!("{}, one a row", state.len()), tokens.len()));
        }
        state.iter_mut().zip(tokens).try_for_each(|(state, &token)| self.0.advance(state, token))
    }

    fn finish(&self, state: &Self::State, row: usize) -> Result<f64> {
        state.get(row).map_or(Ok(0.0), |state| self.0.finish(state))
    }

    fn role(&self) -> Role {
        self.0.role()
    }

    fn bans(&self) -> Bans {
        self.0.bans()
    }
}

/// [`TokenControl`] with its state erased.
trait AnyTokenControl: Send {
    fn handle(&self) -> Box<dyn AnyTokenControl>;
    fn start(&self, prompts: &[Vec<i64>]) -> Result<BoxRows>;
    fn score(&self, state: &mut BoxRows, logits: Tensor) -> Result<Tensor>;
    fn advance(&self, state: &mut BoxRows, tokens: &[i64]) -> Result<()>;
    fn finish(&self, state: &BoxRows, row: usize) -> Result<f64>;
    fn role(&self) -> Role;
    fn forced(&self, state: &mut BoxRows, row: usize) -> Result<Option<i64>>;
    fn bans(&self) -> Bans;
}

impl<C: TokenControl> AnyTokenControl for C {
    fn handle(&self) -> Box<dyn AnyTokenControl> {
        Box::new(self.clone())
    }
    fn start(&self, prompts: &[Vec<i64>]) -> Result<BoxRows> {
        Ok(BoxRows::new(TokenControl::start(self, prompts)?))
    }
    fn score(&self, state: &mut BoxRows, logits: Tensor) -> Result<Tensor> {
        TokenControl::score(self, state.expect_mut()?, logits)
    }
    fn advance(&self, state: &mut BoxRows, tokens: &[i64]) -> Result<()> {
        TokenControl::advance(self, state.expect_mut()?, tokens)
    }
    fn finish(&self, state: &BoxRows, row: usize) -> Result<f64> {
        TokenControl::finish(self, state.expect()?, row)
    }
    fn role(&self) -> Role {
        TokenControl::role(self)
    }
    fn forced(&self, state: &mut BoxRows, row: usize) -> Result<Option<i64>> {
        TokenControl::forced(self, state.expect_mut()?, row)
    }
    fn bans(&self) -> Bans {
        TokenControl::bans(self)
    }
}

/// Token controls that act one after the other; itself a [`TokenControl`].
#[derive(Default)]
pub struct TokenControls {
    controls: Vec<Box<dyn AnyTokenControl>>,
}

impl Clone for TokenControls {
    fn clone(&self) -> Self {
        Self { controls: self.controls.iter().map(|control| (**control).handle()).collect() }
    }
}

impl TokenControls {
    /// An empty stack: the model's own distribution.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a control that acts after those already there.
    #[must_use]
    pub fn with(mut self, control: impl TokenControl) -> Self {
        self.push(control);
        self
    }

    /// Adds a control that acts after those already there.
    pub fn push(&mut self, control: impl TokenControl) {
        self.controls.push(Box::new(control));
    }

    /// How many controls there are.
    pub fn len(&self) -> usize {
        self.controls.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.controls.is_empty()
    }

    /// Whether any control shapes the proposal only: then [`TokenControls::score_potentials`] and
    /// [`TokenControl::score`] differ.
    pub fn shapes_proposal(&self) -> bool {
        self.controls.iter().any(|control| (**control).role() == Role::Proposal)
    }

    /// What [`TokenControl::score`] gives without the controls that shape the proposal only: log p + Σ potentials, not
    /// normalised, of log p. It changes nothing of what they remember, so that both may be asked in one step.
    ///
    /// # Errors
    /// The controls'.
    pub fn score_potentials(&self, state: &mut TokenControlsState, mut logits: Tensor) -> Result<Tensor> {
        for (control, state) in self.controls.iter().zip(&mut state.0) {
            if (**control).role() == Role::Potential {
                logits = (**control).score(state, logits)?;
            }
        }
        Ok(logits)
    }
}

/// The state of a stack.
pub struct TokenControlsState(Vec<BoxRows>);

impl Rows for TokenControlsState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.iter_mut().try_for_each(|state| state.reorder(rows))
    }
}

impl TokenControl for TokenControls {
    type State = TokenControlsState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        let states = self.controls.iter().map(|control| (**control).start(prompts));
        Ok(TokenControlsState(states.collect::<Result<_>>()?))
    }

    fn score(&self, state: &mut Self::State, mut logits: Tensor) -> Result<Tensor> {
        for (control, state) in self.controls.iter().zip(&mut state.0) {
            logits = (**control).score(state, logits)?;
        }
        Ok(logits)
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        self.controls
            .iter()
            .zip(&mut state.0)
            .try_for_each(|(control, state)| (**control).advance(state, tokens))
    }

    /// The sum of the controls' log-weights.
    fn finish(&self, state: &Self::State, row: usize) -> Result<f64> {
        self.controls.iter().zip(&state.0).map(|(control, state)| (**control).finish(state, row)).sum()
    }

    /// A potential, unless every control shapes the proposal only.
    fn role(&self) -> Role {
        if !self.controls.is_empty() && self.controls.iter().all(|c| (**c).role() == Role::Proposal) {
            Role::Proposal
        } else {
            Role::Potential
        }
    }

    /// What one of the controls forces, if those before it ban nothing and those after it keep the last one left.
    fn forced(&self, state: &mut Self::State, row: usize) -> Result<Option<i64>> {
        let mut before = Bans::Nothing;
        for (i, (control, state)) in self.controls.iter().zip(&mut state.0).enumerate() {
            if before != Bans::Nothing {
                return Ok(None);
            }
            if let Some(token) = (**control).forced(state, row)? {
                let after = self.controls[i + 1..].iter().map(|control| (**control).bans());
                return Ok(Some(token).filter(|_| after.max() != Some(Bans::Any)));
            }
            before = (**control).bans();
        }
        Ok(None)
    }

    /// The most that one of the controls may ban.
    fn bans(&self) -> Bans {
        self.controls.iter().map(|control| (**control).bans()).max().unwrap_or(Bans::Nothing)
    }
}
