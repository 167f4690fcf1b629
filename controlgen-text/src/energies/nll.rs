//! The negative log-likelihood of a text under a language model.

use controlgen_core::energy::{EnergyFn, Text};
use controlgen_core::{Controls, Error, LanguageModel, LmInput, Pass, Result, Rows, Tokens};
use tch::{Kind, Tensor};

use crate::search::{Begun, begin};

/// E(x) = −Σₜ log p(xₜ | prompt, x₍<t₎), `[B]`, in nats.
///
/// Of soft tokens π it is the expected cross-entropy −Σₜ Σᵥ πₜ(v) log p(v | prompt, e(π₍<t₎)): expected embeddings
/// e(πₜ) = Σᵥ πₜ(v) eᵥ go in, as in MuCoLa (Kumar, Paria & Tsvetkov 2022) and COLD (Qin et al. 2022). The gradient
/// flows through both places where π stands. COLD's fluency term is the cross-entropy the other way round, of π
/// under p, with p detached; that one is no likelihood where π is one-hot. This one is.
///
/// Padding is neither scored nor seen: a token after it is predicted from the last kept one before. A row of
/// padding alone has an energy of 0.
///
/// *Cost*: one pass over the text, and one over the prompt, which is read once for all rows.
pub struct Nll {
    lm: Box<dyn LanguageModel>,
    prompt: Vec<i64>,
    controls: Option<Controls>,
}

/// By another handle.
impl Clone for Nll {
    fn clone(&self) -> Self {
        let controls = self.controls.as_ref().map(Controls::handle);
        Self { lm: (*self.lm).handle(), prompt: self.prompt.clone(), controls }
    }
}

impl Nll {
    /// Of whole texts: the first token is predicted from the model's `bos`.
    ///
    /// # Errors
    /// [`Error::Value`] for a model without one.
    pub fn new(lm: &dyn LanguageModel) -> Result<Self> {
        let bos = lm.spec().bos.ok_or_else(|| Error::value("bos", "a token that starts texts", "none"))?;
        Self::after(lm, &[bos])
    }

    /// Of continuations of a prompt, which is not scored; an encoder–decoder's encoder reads it.
    ///
    /// # Errors
    /// [`Error::Value`] for an empty prompt or a token id that is none; [`Error::Context`] for one that leaves no room.
    pub fn after(lm: &dyn LanguageModel, prompt: &[i64]) -> Result<Self> {
        let spec = lm.spec();
        if prompt.is_empty() {
            return Err(Error::value("prompt", "at least one token", "none"));
        }
        if let Some(token) = prompt.iter().find(|token| !(0..spec.vocab).contains(token)) {
            return Err(Error::value("token id", format!("0 .. {}", spec.vocab), token));
        }
        let needed = i64::try_from(prompt.len()).unwrap_or(i64::MAX);
        if needed > spec.context {
            return Err(Error::Context { limit: spec.context, needed });
        }
        Ok(Self { lm: lm.handle(), prompt: prompt.to_vec(), controls: None })
    }

    /// Under controls at the model's sites: the likelihood of an adapted model.
    ///
    /// # Errors
    /// [`Error::ForeignSites`].
    pub fn under(mut self, controls: Controls) -> Result<Self> {
        Pass::with_controls(&controls).check_sites(self.lm.sites())?;
        self.controls = Some(controls);
        Ok(self)
    }

    /// log p(· | prompt, tokens before), `[B, T, V]`, f32 or f64.
    fn log_probs(&self, input: LmInput<'_>, (rows, len): (i64, i64)) -> Result<Tensor> {
        let pass = Pass { controls: self.controls.as_ref(), ..Pass::default() };
        let device = self.lm.spec().placement.device;
        let Begun { mut state, ids, .. } = begin(&*self.lm, std::slice::from_ref(&self.prompt), &pass, 0)?;
        let first = self.lm.forward(LmInput::ids(&ids).last(), &mut state, &pass)?.logits; // (1, 1, V)
        let first = first.f_expand([rows, -1, -1], false)?;
        let logits = match input.keep {
            None if len == 1 => first,
            // What follows the last token is not asked.
            None => {
                state.reorder(&repeated(rows))?;
                let part = match input.tokens {
                    Tokens::Ids(t) | Tokens::Embeds(t) => t.f_narrow(1, 0, len - 1)?,
                };
                let input = match input.tokens {
                    Tokens::Ids(_) => LmInput::ids(&part),
                    Tokens::Embeds(_) => LmInput::embeds(&part),
                };
                let rest = self.lm.forward(input, &mut state, &pass)?.logits;
                Tensor::f_cat(&[&first, &rest], 1)? // (B, T, V)
            }
            Some(keep) => {
                state.reorder(&repeated(rows))?;
                let rest = self.lm.forward(input, &mut state, &pass)?.logits;
                let all = Tensor::f_cat(&[&first, &rest], 1)?; // (B, 1 + T, V): 0 is the prompt, t + 1 position t
                let at = Tensor::f_arange(len, (Kind::Int64, device))?.f_add_scalar(1)?;
                let kept = at.f_unsqueeze(0)?.f_mul(&keep.f_to_kind(Kind::Int64)?)?.f_cummax(1)?.0;
                let zero = Tensor::f_zeros([rows, 1], (Kind::Int64, device))?;
                let before = Tensor::f_cat(&[&zero, &kept.f_narrow(1, 0, len - 1)?], 1)?; // (B, T)
                let index = before.f_unsqueeze(-1)?.f_expand([-1, -1, all.size()[2]], false)?;
                all.f_gather(1, &index, false)?
            }
        };
        let wide = if logits.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
        Ok(logits.f_to_kind(wide)?.f_log_softmax(-1, None)?)
    }
}

fn repeated(rows: i64) -> Vec<i64> {
    (0..rows).map(|_| 0).collect()
}

impl EnergyFn<Text> for Nll {
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`], [`Error::Value`] for a text that is none of this vocabulary;
    /// [`Error::Context`]; the model's.
    fn energy(&self, x: &Text) -> Result<Tensor> {
        let spec = self.lm.spec();
        let (device, kind) = (spec.placement.device, spec.placement.kind);
        let keep = x.keep().map(|keep| keep.f_to_device(device)).transpose()?;
        let each = match x {
            Text::Hard { ids, .. } => {
                let ids = ids.f_to_device(device)?;
                let input = LmInput::ids(&ids).keep(keep.as_ref());
                let shape = input.validate(spec)?;
                let log_probs = self.log_probs(input, shape)?;
                log_probs.f_gather(-1, &ids.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)? // (B, T)
            }
            Text::Soft { probs, .. } => {
                let &[rows, len, vocab] = probs.size().as_slice() else {
                    return Err(Error::shape("soft tokens", "[B, T, V]", &probs.size()));
                };
                if vocab != spec.vocab {
                    let expected = format!("[{rows}, {len}, {}]", spec.vocab);
                    return Err(Error::shape("soft tokens", expected, &probs.size()));
                }
                if !probs.is_floating_point() {
                    let found = format!("{:?}", probs.f_kind()?);
                    let expected = "a floating-point type".to_owned();
                    return Err(Error::Kind { what: "soft tokens".into(), expected, found });
                }
                let probs = probs.f_to_device(device)?;
                let embeds = probs.f_to_kind(kind)?.f_matmul(self.lm.embeddings())?; // (B, T, D)
                let input = LmInput::embeds(&embeds).keep(keep.as_ref());
                let shape = input.validate(spec)?;
                let log_probs = self.log_probs(input, shape)?;
                let probs = probs.f_to_kind(log_probs.f_kind()?)?;
                log_probs.f_mul(&probs)?.f_sum_dim_intlist(&[-1i64][..], false, None::<Kind>)? // (B, T)
            }
        };
        let each = match &keep {
            Some(keep) => each.f_masked_fill(&keep.f_logical_not()?, 0.0)?,
            None => each,
        };
        Ok(each.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?.f_neg()?)
    }
}
