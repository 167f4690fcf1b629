//! FUDGE: a discriminator that looks ahead.

use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::{Kind, Tensor};

use super::check;
use super::scores;

/// Tells from the beginning of a text how probable it is that the whole text, once it is written, will have an
/// attribute: a *future discriminator*.
///
/// A discriminator is asked of every row's candidates at once, so that one with a model of its own runs rows times
/// candidates as one batch, over a fork of what it remembers.
pub trait FutureDiscriminator: Clone + Send + 'static {
    /// What it remembers of each row.
    type State: Rows;

    /// V: how many tokens it knows, which must be the model's.
    fn vocab(&self) -> i64;

    /// The state for these prompts, token ids without padding, one row each.
    ///
    /// # Errors
    /// The discriminator's own.
    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State>;

    /// log p(attribute | text so far, v) of each row's candidates v, int64 `[B, k]`: floats `[B, k]`, none above 0; −∞
    /// where the attribute can no longer come about. Candidates of a row differ, and are in no order. Asking changes
    /// nothing of what a later call answers.
    ///
    /// # Errors
    /// The discriminator's own.
    fn log_probs(&self, state: &mut Self::State, candidates: &Tensor) -> Result<Tensor>;

    /// Takes note of the token that each row chose, which need not be a candidate that was asked for.
    ///
    /// # Errors
    /// The discriminator's own.
    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()>;
}

/// Leads a text to an attribute by a discriminator of its beginning: Yang and Klein, "FUDGE: Controlled Text Generation
/// With Future Discriminators" (NAACL 2021), equation 2. Of each row the k best tokens are weighed, and all others banned:
///
/// ```text
/// p(v | x, a)  ∝  p(v | x) · p(a | x, v)^λ
/// ```
///
/// With λ = 1, all tokens weighed and the exact p(a | x, v), texts are samples of the posterior p(text | a). What is added
/// to a token's score is λ (log p(a | x, v) − log p(a | x)), of which the second is the same for all tokens: so over a text
/// of which the model says log p the sum is log p + λ log p(a | text), under any search. The first x is the prompt, whose
/// share is left in.
///
/// *Cost*: the k best of `[B, V]`, and the discriminator on `[B, k]` candidates at each step.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::controls::{Fudge, FutureDiscriminator};
/// use tch::Tensor;
///
/// /// Expects no text without the letter e once there is one: which tokens have it.
/// #[derive(Clone)]
/// struct Lipogram(Arc<Vec<bool>>);
///
/// impl FutureDiscriminator for Lipogram {
///     type State = ();
///     fn vocab(&self) -> i64 {
///         self.0.len() as i64
///     }
///     fn start(&self, _prompts: &[Vec<i64>]) -> Result<()> {
///         Ok(())
///     }
///     fn log_probs(&self, _state: &mut (), candidates: &Tensor) -> Result<Tensor> {
///         let ids: Vec<i64> = Vec::try_from(candidates.f_reshape([-1])?)?;
///         let log_p: Vec<f32> = ids.iter().map(|&id| if self.0[id as usize] { -6.0 } else { -0.1 }).collect();
///         Ok(Tensor::f_from_slice(&log_p)?.f_view_as(candidates)?)
///     }
///     fn advance(&self, _state: &mut (), _tokens: &[i64]) -> Result<()> {
///         Ok(())
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let has_e = |id| model.tokenizer().token_bytes(id).is_some_and(|bytes| bytes.contains(&b'e'));
/// let lipogram = Lipogram(Arc::new((0..model.lm().spec().vocab).map(has_e).collect()));
/// let fudge = Fudge::new(lipogram, 1.0, 50)?;
/// let done = model.generate("The film was").with(fudge).max_new_tokens(16).run()?;
/// // " a film about a young woman who is a spy. In it, a woman", where the model says
/// // " a film about a young woman named Aria who is a 17-"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Fudge<D> {
    discriminator: D,
    weight: f64,
    top_k: usize,
}

impl<D: FutureDiscriminator> Fudge<D> {
    /// λ = `weight` above 0; `top_k` of at least 1, as many as there are tokens weighs all. The paper's are 1 and 200.
    ///
    /// # Errors
    /// [`Error::Value`] outside those ranges, and for NaN.
    pub fn new(discriminator: D, weight: f64, top_k: usize) -> Result<Self> {
        let holds = weight > 0.0 && weight.is_finite();
        let weight = check::number("FUDGE's weight", "a number above 0", weight, holds)?;
        Ok(Self { discriminator, weight, top_k: check::count("FUDGE's top_k", top_k)? })
    }

    /// What the discriminator says of candidates `[B, k]`, f32, if that can be.
    fn ask(&self, state: &mut D::State, candidates: &Tensor) -> Result<Tensor> {
        let told = self.discriminator.log_probs(state, candidates)?;
        if told.size() != candidates.size() {
            let expected = format!("{:?}, one a candidate", candidates.size());
            return Err(Error::shape("log-probabilities of a discriminator", expected, &told.size()));
        }
        if !told.is_floating_point() {
            let found = format!("{:?}", told.f_kind()?);
            let what = "log-probabilities of a discriminator".into();
            return Err(Error::Kind { what, expected: "a floating-point type".into(), found });
        }
        let told = told.f_to_kind(Kind::Float)?.f_to_device(candidates.device())?;
        let worst = told.f_max()?.f_double_value(&[])?; // NaN, if there is one
        if worst.is_nan() {
            let (what, at) = ("log-probabilities of a discriminator".into(), "a candidate".into());
            return Err(Error::NotFinite { what, at, found: "NaN".into() });
        }
        // Roundings may lift a sure thing a little above 0.
        if worst > 1e-3 {
            return Err(Error::value("log-probability of a discriminator", "at most 0", worst));
        }
        Ok(told)
    }
}

/// What [`Fudge`] remembers.
pub struct FudgeState<S> {
    inner: S,
    /// log p(a | text so far) `[B, 1]`, f32; 0 at the prompt.
    told: Tensor,
    /// The last candidates `[B, k]`, and what was said of them.
    asked: Option<(Tensor, Tensor)>,
}

impl<S: Rows> Rows for FudgeState<S> {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.inner.reorder(rows)?;
        self.told.reorder(rows)?;
        let Some((candidates, told)) = &mut self.asked else { return Ok(()) };
        candidates.reorder(rows)?;
        told.reorder(rows)
    }
}

impl<D: FutureDiscriminator> TokenControl for Fudge<D> {
    type State = FudgeState<D::State>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        let rows = prompts.len() as i64;
        let told = Tensor::f_zeros([rows, 1], (Kind::Float, tch::Device::Cpu))?;
        Ok(FudgeState { inner: self.discriminator.start(prompts)?, told, asked: None })
    }

    fn score(&self, state: &mut Self::State, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.told.size()[0] as usize)?;
        if vocab != self.discriminator.vocab() {
            let expected = format!("{vocab} tokens, as the model has");
            return Err(Error::value("vocabulary of a discriminator", expected, self.discriminator.vocab()));
        }
        let k = i64::try_from(self.top_k).unwrap_or(vocab).min(vocab);
        let (best, candidates) = logits.f_topk(k, -1, true, false)?; // (B, k)
        let told = self.ask(&mut state.inner, &candidates)?;
        let change = told.f_sub(&state.told.f_to_device(told.device())?)?.f_mul_scalar(self.weight)?;
        let _ = logits.f_fill_(f64::NEG_INFINITY)?;
        let _ = logits.f_scatter_(1, &candidates, &best.f_add(&change)?)?;
        state.asked = Some((candidates, told));
        Ok(logits)
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        let rows = state.told.size()[0];
        check::rows("tokens", rows as usize, tokens.len())?;
        let chosen = Tensor::f_from_slice(tokens)?.f_unsqueeze(1)?; // (B, 1)
        let known = match state.asked.take() {
            None => None,
            Some((candidates, told)) => {
                let at = candidates.f_eq_tensor(&chosen.f_to_device(candidates.device())?)?; // (B, k)
                let (found, place) = at.f_to_kind(Kind::Int64)?.f_max_dim(1, true)?;
                let all = found.f_min()?.f_int64_value(&[])? == 1;
                if all { Some(told.f_gather(1, &place, false)?) } else { None }
            }
        };
        let told = match known {
            Some(told) => told,
            // Another control forced a token that was not weighed.
            None => self.ask(&mut state.inner, &chosen)?,
        };
        // A text that has lost the attribute can lose nothing more.
        state.told = told.f_masked_fill(&told.f_isneginf()?, 0.0)?;
        self.discriminator.advance(&mut state.inner, tokens)
    }
}
