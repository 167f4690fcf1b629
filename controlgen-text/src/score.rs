//! Scoring texts that are given: log-probabilities token by token, and perplexity.

use controlgen_core::{Error, LanguageModel, LmInput, Pass, Result, Rows, Source};
use tch::{Kind, Tensor};

use crate::controls::in_vocabulary;
use crate::search::{Begun, begin};

/// The log-probabilities of one completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// log p(token | tokens before it), of each token of the completion.
    pub logprobs: Vec<f64>,
}

impl Scored {
    /// log p(completion | prompt): the sum.
    pub fn total(&self) -> f64 {
        self.logprobs.iter().sum()
    }

    /// exp of the mean negative log-probability; NaN for an empty completion.
    pub fn perplexity(&self) -> f64 {
        (-self.total() / self.logprobs.len() as f64).exp()
    }
}

/// The log-probabilities of completions of one prompt, in one batch.
///
/// The prompt is read once; an encoder–decoder's encoder reads it. Completions may differ in length; what pads the shorter ones counts nowhere.
///
/// # Errors
/// [`Error::Value`] for an empty prompt or completion; [`Error::Context`] where they do not fit; the model's.
pub fn score_completions(
    lm: &dyn LanguageModel,
    prompt: &[i64],
    completions: &[Vec<i64>],
    pass: &Pass<'_>,
) -> Result<Vec<Scored>> {
    let _guard = tch::no_grad_guard();
    if prompt.is_empty() {
        return Err(Error::value("prompt", "at least one token", "none"));
    }
    let rows = as_i64(completions.len());
    let longest = completions.iter().map(Vec::len).max().unwrap_or(0);
    if longest == 0 || completions.iter().any(Vec::is_empty) {
        return Err(Error::value("completions", "at least one, of at least one token each", "an empty one"));
    }
    // A pass checks the ids that it reads; a completion's last is only scored.
    completions.iter().flatten().try_for_each(|&id| in_vocabulary("token id", id, lm.spec().vocab))?;
    let device = lm.spec().placement.device;
    let Begun { mut state, ids, .. } = begin(lm, &[prompt.to_vec()], pass, longest)?;
    let first = lm.forward(LmInput::ids(&ids).last(), &mut state, pass)?.logits; // (1, 1, V)
    let every = vec![0; completions.len()];
    state.reorder(&every)?;
    let mut lanes = pass.lanes.cloned();
    lanes.as_mut().map_or(Ok(()), |lanes| lanes.reorder(&every))?;
    let pass = &Pass { lanes: lanes.as_ref(), ..*pass };

    // Padded on the right: nothing follows the padding, so no mask is needed.
    let padded: Vec<i64> = completions
        .iter()
        .flat_map(|c| c.iter().copied().chain(std::iter::repeat_n(c[0], longest - c.len())))
        .collect();
    let ids = Tensor::f_from_slice(&padded)?.f_view([rows, as_i64(longest)])?.f_to_device(device)?;
    let mut logits = first.f_expand([rows, -1, -1], false)?;
    if longest > 1 {
        let input = ids.f_narrow(1, 0, as_i64(longest) - 1)?;
        let rest = lm.forward(LmInput::ids(&input), &mut state, pass)?.logits;
        logits = Tensor::f_cat(&[&logits, &rest], 1)?;
    }
    let chosen = token_logprobs(&logits, &ids)?; // (B, T)
    completions
        .iter()
        .enumerate()
        .map(|(i, completion)| {
            let row = chosen.f_get(as_i64(i))?.f_narrow(0, 0, as_i64(completion.len()))?;
            Ok(Scored { logprobs: Vec::try_from(row)? })
        })
        .collect()
}

/// The log-probabilities of a text longer than the context, read in windows.
///
/// Each window overlaps the one before so that every token is predicted from at least `window − stride` tokens
/// before it, save the first. The first token is predicted from nothing, and not scored.
///
/// # Errors
/// [`Error::Value`] for fewer than two tokens, or `stride` outside 1 ..= `window` − 1, or a window that is no part
/// of the context; the model's.
pub fn score_text(
    lm: &dyn LanguageModel,
    ids: &[i64],
    window: usize,
    stride: usize,
    pass: &Pass<'_>,
) -> Result<Scored> {
    let _guard = tch::no_grad_guard();
    let context = usize::try_from(lm.spec().context - pass.position_offset()?.most()).unwrap_or(0);
    if ids.len() < 2 {
        return Err(Error::value("tokens to score", "at least 2", ids.len()));
    }
    if window < 2 || window > context {
        return Err(Error::value("window", format!("2 ..= {context}"), window));
    }
    if stride == 0 || stride >= window {
        return Err(Error::value("stride", format!("1 ..= {}", window - 1), stride));
    }
    let device = lm.spec().placement.device;
    let mut logprobs = Vec::with_capacity(ids.len() - 1);
    let mut start = 0;
    while logprobs.len() + 1 < ids.len() {
        let end = (start + window).min(ids.len());
        let input = Tensor::f_from_slice(&ids[start..end])?.f_unsqueeze(0)?.f_to_device(device)?;
        let mut state = lm.start(Source::Rows(1), pass)?;
        let logits = lm.forward(LmInput::ids(&input), &mut state, pass)?.logits;
        // Scored so far: tokens 1 ..= logprobs.len().
        let new = logprobs.len() + 1 - start;
        let len = as_i64(end - start - new);
        let chosen = token_logprobs(
            &logits.f_narrow(1, as_i64(new) - 1, len)?,
            &input.f_narrow(1, as_i64(new), len)?,
        )?;
        logprobs.extend(Vec::<f64>::try_from(chosen.f_get(0)?)?);
        start += stride;
    }
    Ok(Scored { logprobs })
}

/// log softmax of logits `[B, T, V]` at ids `[B, T]`: f64 `[B, T]` on the CPU.
fn token_logprobs(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let logits = logits.f_to_kind(Kind::Float)?;
    let chosen = logits.f_gather(-1, &ids.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)?;
    let sums = logits.f_logsumexp(&[-1i64][..], false)?;
    let logprobs = chosen.f_sub(&sums)?.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?;
    if !logprobs.f_isfinite()?.f_all()?.f_int64_value(&[])?.eq(&1) {
        let found = "NaN or infinity".to_owned();
        return Err(Error::NotFinite { what: "log-probabilities".into(), at: "a given token".into(), found });
    }
    Ok(logprobs)
}

fn as_i64(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
