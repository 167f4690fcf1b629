//! GeDi: class-conditional language models as discriminators.

use controlgen_core::{Bans, Error, LmInput, Pass, Result, Rows, Source, TokenControl};
use tch::{Kind, Tensor};

use super::check;
use super::scores;
use crate::arithmetic::{Readings, ReadingsState, Term};
use crate::search::padded;

/// Leads a text to a class that language models of the classes tell apart: Krause, Gotmare, McCann, Keskar, Joty, Socher and
/// Rajani, "GeDi: Generative Discriminator Guided Sequence Generation" (Findings of EMNLP 2021), equations 2 to 7. By Bayes'
/// rule they say for every token v at once how probable the class c would be after it; with t tokens generated, v among them,
///
/// ```text
/// p(v | x, c)   ∝  p(v | x) · P(c | x, v)^ω
/// P(c | x, v)   ∝  exp(b_c) · (Π p(xᵢ | x₁ … xᵢ₋₁, c) · p(v | x, c))^(α / t)
/// ```
///
/// The classes' models are [`Term`]s: the same model under a text for each class ([`Term::after`]), in one batched call, or
/// models of their own. What is added to a token's score is ω (log P(c | x, v) − log P(c | x)), of which the second is the same
/// for all tokens: so over a text the sum is ω log P(c | text), under any search. The prompt is read and not judged. The
/// classes' models are decoder-only; the model that they lead may be any.
///
/// *Cost*: a call of the classes' models a step, of classes × rows rows; a normalisation of each of `[B, V]`.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::TextModel;
/// use controlgen_text::controls::{Gedi, TopP};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let terms = model.terms();
/// let classes = [terms.after("A review of a wonderful film: ")?, terms.after("A review of a terrible film: ")?];
/// for desired in [0, 1] {
///     let gedi = Gedi::new(&classes, desired, 30.0)?.filter(0.2, 0.8)?;
///     let film = model.generate("The film").with(gedi).with(TopP::new(0.9)?);
///     println!("{:?}", film.sample(4).max_new_tokens(20).run()?.text());
/// }
/// // " Family provides a unique perspective into the lives of individuals with extraordinary experiences that touch
/// // various aspects of life."
/// // " that killed ten million people already portrayed.\n\n7. Criminalization: All racial minorities are born with"
/// # Ok(())
/// # }
/// ```
pub struct Gedi {
    readings: Readings,
    classes: Vec<Class>,
    desired: i64,
    weight: f64,
    /// α, and whether it is divided by the length.
    scale: (f64, bool),
    filter: Option<Filter>,
}

#[derive(Clone, Copy)]
struct Class {
    reading: usize,
    temperature: f64,
    bias: f64,
}

#[derive(Clone, Copy)]
struct Filter {
    rho: f64,
    log_tau: f64,
}

impl Filter {
    /// Bans what it does not leave, of scores and log P(c | x, v), `[B, V]` both.
    fn ban(self, logits: &mut Tensor, posterior: &Tensor) -> Result<()> {
        let (sorted, order) = posterior.f_sort(-1, true)?;
        let p = logits.f_softmax(-1, Kind::Double)?.f_gather(1, &order, false)?;
        let before = p.f_cumsum(-1, Kind::Double)?.f_sub(&p)?;
        let out = before.f_ge(self.rho)?.f_logical_and(&sorted.f_le(self.log_tau)?)?;
        let banned = out.f_zeros_like()?.f_scatter(1, &order, &out)?;
        scores::ban_where(logits, &banned)
    }
}

impl Clone for Gedi {
    fn clone(&self) -> Self {
        Self { readings: self.readings.handle(), classes: self.classes.clone(), ..*self }
    }
}

impl Gedi {
    /// `classes` of at least 2, the index of the one `desired`, and ω = `weight` above 0; the paper's is 30. α is 1, and the
    /// biases are 0.
    ///
    /// # Errors
    /// [`Error::Value`] outside these ranges, and for a term that cannot be read, as
    /// [`ModelArithmetic::new`](crate::arithmetic::ModelArithmetic::new) has it.
    pub fn new(classes: &[Term], desired: usize, weight: f64) -> Result<Self> {
        if classes.len() < 2 {
            return Err(Error::value("classes", "at least 2", classes.len()));
        }
        if desired >= classes.len() {
            return Err(Error::value("the desired class", format!("0 .. {}", classes.len()), desired));
        }
        let holds = weight > 0.0 && weight.is_finite();
        let weight = check::number("GeDi's weight", "a number above 0", weight, holds)?;
        let mut readings = Readings::new();
        let class = |term: &Term| -> Result<Class> {
            Ok(Class { reading: readings.add(term)?, temperature: term.tau(), bias: 0.0 })
        };
        let classes = classes.iter().map(class).collect::<Result<_>>()?;
        Ok(Self { readings, classes, desired: desired as i64, weight, scale: (1.0, true), filter: None })
    }

    /// α, above 0; the paper learns it.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn length_scale(mut self, alpha: f64) -> Result<Self> {
        let holds = alpha > 0.0 && alpha.is_finite();
        self.scale.0 = check::number("GeDi's alpha", "a number above 0", alpha, holds)?;
        Ok(self)
    }

    /// The exponent is α whatever the length: with α = 1 it is Bayes' rule as it is.
    #[must_use]
    pub fn whole_likelihood(mut self) -> Self {
        self.scale.1 = false;
        self
    }

    /// The classes' biases b_c, one each: logarithms of their prior odds.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of them; [`Error::NotFinite`].
    pub fn biases(mut self, biases: &[f64]) -> Result<Self> {
        if biases.len() != self.classes.len() {
            return Err(Error::value("biases", format!("{}, one a class", self.classes.len()), biases.len()));
        }
        for (class, bias) in self.classes.iter_mut().zip(biases) {
            if !bias.is_finite() {
                let at = "a class".to_owned();
                return Err(Error::NotFinite { what: "bias".into(), at, found: bias.to_string() });
            }
            class.bias = *bias;
        }
        Ok(self)
    }

    /// Leaves the tokens for which P(c | x, v) is above τ, and, in the order of P(c | x, v), the fewest whose probability,
    /// class and all, reaches ρ (section 3.1 of the paper, which takes ρ = 0.2 and τ = 0.8).
    ///
    /// # Errors
    /// [`Error::Value`] for ρ outside (0, 1] or τ outside 0 ..= 1.
    pub fn filter(mut self, rho: f64, tau: f64) -> Result<Self> {
        let rho = check::number("GeDi's rho", "above 0 and at most 1", rho, rho > 0.0 && rho <= 1.0)?;
        let tau = check::number("GeDi's tau", "0 ..= 1", tau, (0.0..=1.0).contains(&tau))?;
        self.filter = Some(Filter { rho, log_tau: tau.ln() });
        Ok(self)
    }

    /// log P(c | …) `[B]` or `[B, V]` of log-likelihoods `[B, C]` or `[B, C, V]` of `len` tokens.
    fn log_posterior(&self, log_likelihood: &Tensor, len: usize) -> Result<Tensor> {
        let (alpha, by_length) = self.scale;
        let exponent = if by_length { alpha / len.max(1) as f64 } else { alpha };
        let mut shape = vec![1; log_likelihood.dim()];
        shape[1] = self.classes.len() as i64;
        let biases: Vec<f64> = self.classes.iter().map(|class| class.bias).collect();
        let biases =
            Tensor::f_from_slice(&biases)?.f_view(&shape[..])?.f_to_device(log_likelihood.device())?;
        let scores = log_likelihood.f_mul_scalar(exponent)?.f_add(&biases)?;
        Ok(scores.f_log_softmax(1, Kind::Double)?.f_select(1, self.desired)?)
    }

    /// The classes' log p `[B, C, T, V]` of what the readings said, f32.
    fn log_p(&self, read: &[Tensor]) -> Result<Tensor> {
        let of = |class: &Class| -> Result<Tensor> {
            let logits = read[class.reading].f_to_kind(Kind::Float)?;
            Ok(logits.f_div_scalar(class.temperature)?.f_log_softmax(-1, Kind::Float)?)
        };
        let all = self.classes.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&all, 1)?)
    }

    /// Reads what was chosen since the last time.
    fn catch_up(&self, state: &mut GediState) -> Result<()> {
        let new = state.pending.first().map_or(0, Vec::len);
        if new == 0 {
            return Ok(());
        }
        let device = self.readings.base().spec().placement.device;
        let ids = Tensor::f_from_slice(&state.pending.concat())?.f_view([-1, new as i64])?; // (B, T)
        let ids = ids.f_to_device(device)?;
        let input = if new == 1 { LmInput::ids(&ids).last() } else { LmInput::ids(&ids) };
        let read = self.readings.forward(input, &mut state.read, &Pass::default())?;
        let log_p = self.log_p(&read)?; // (B, C, T, V)
        let before =
            Tensor::f_cat(&[&state.next.f_unsqueeze(2)?, &log_p.f_narrow(2, 0, new as i64 - 1)?], 2)?;
        let index = ids.f_unsqueeze(1)?.f_unsqueeze(-1)?; // (B, 1, T, 1)
        let index = index.f_expand([-1, self.classes.len() as i64, -1, -1], false)?;
        let gained = before.f_gather(-1, &index, false)?.f_to_kind(Kind::Double)?;
        let gained = gained.f_sum_dim_intlist([2, 3].as_slice(), false, None::<Kind>)?; // (B, C)
        state.log_likelihood = state.log_likelihood.f_add(&gained)?;
        state.next = log_p.f_select(2, new as i64 - 1)?;
        state.len += new;
        state.told = self.log_posterior(&state.log_likelihood, state.len)?.f_unsqueeze(1)?;
        state.pending.iter_mut().for_each(Vec::clear);
        Ok(())
    }
}

/// What [`Gedi`] remembers.
pub struct GediState {
    read: ReadingsState,
    /// Tokens of each row that are not read yet, as many in each.
    pending: Vec<Vec<i64>>,
    /// The classes' log p of the token after what is read, `[B, C, V]`, f32.
    next: Tensor,
    /// Σ log p of the tokens generated that are read, `[B, C]`, f64.
    log_likelihood: Tensor,
    /// How many they are.
    len: usize,
    /// log P(c | text so far) `[B, 1]`, f64; 0 at the prompt.
    told: Tensor,
}

impl Rows for GediState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.read.reorder(rows)?;
        self.pending.reorder(rows)?;
        self.next.reorder(rows)?;
        self.log_likelihood.reorder(rows)?;
        self.told.reorder(rows)
    }
}

/// The errors, beside those of what is chosen: [`Error::Value`] for scores of another vocabulary than the classes';
/// [`Error::Context`] for a text that is longer than the classes' models hold.
impl TokenControl for Gedi {
    type State = GediState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<GediState> {
        let _guard = tch::no_grad_guard();
        let lm = self.readings.base();
        for (row, prompt) in prompts.iter().enumerate() {
            check::sequence(&format!("prompt {row}"), prompt)?;
        }
        let (ids, keep) = padded(lm, prompts)?;
        let rows = prompts.len() as i64;
        let mut read = self.readings.start(Source::Rows(rows), &Pass::default())?;
        let input = LmInput::ids(&ids).keep(keep.as_ref()).last();
        let next = self.log_p(&self.readings.forward(input, &mut read, &Pass::default())?)?.f_select(2, 0)?;
        let zeros = |width| Tensor::f_zeros([rows, width], (Kind::Double, next.device()));
        let (log_likelihood, told) = (zeros(self.classes.len() as i64)?, zeros(1)?);
        let pending = vec![Vec::new(); prompts.len()];
        Ok(GediState { read, pending, next, log_likelihood, len: 0, told })
    }

    fn score(&self, state: &mut GediState, mut logits: Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let vocab = scores::vocab(&logits, state.pending.len())?;
        let known = self.readings.base().spec().vocab;
        if vocab != known {
            let expected = format!("{vocab} tokens, as the model has");
            return Err(Error::value("vocabulary of GeDi's classes", expected, known));
        }
        self.catch_up(state)?;
        let all = state.next.f_to_kind(Kind::Double)?.f_add(&state.log_likelihood.f_unsqueeze(-1)?)?; // (B, C, V)
        let posterior = self.log_posterior(&all, state.len + 1)?; // (B, V)
        let change = posterior.f_sub(&state.told)?.f_mul_scalar(self.weight)?;
        let change = change.f_to_kind(Kind::Float)?.f_to_device(logits.device())?;
        let _ = logits.f_add_(&change)?;
        if let Some(filter) = self.filter {
            filter.ban(&mut logits, &posterior.f_to_device(change.device())?)?;
        }
        Ok(logits)
    }

    fn advance(&self, state: &mut GediState, tokens: &[i64]) -> Result<()> {
        let vocab = self.readings.base().spec().vocab;
        tokens.iter().try_for_each(|&token| scores::in_vocabulary("chosen token", token, vocab))?;
        scores::advance_rows(&mut state.pending, tokens, Vec::push)
    }

    fn bans(&self) -> Bans {
        if self.filter.is_some() { Bans::NotTheLast } else { Bans::Nothing }
    }
}
