//! ContrastiveSearch search: probable tokens that do not say again what was said.

use std::iter;

use controlgen_core::progress::Flow;
use controlgen_core::{Error, LmInput, Pass, Result, Rows, TokenControl};
use tch::{Kind, Tensor};

use super::hidden::{self, Said};
use super::{
    After, Begun, Chosen, Finish, Hypothesis, Listener, Live, Search, Task, begin, next_logits, rows_of,
};
use crate::controls::to_vec;
use crate::sample;

/// Takes, of the `top_k` most probable tokens v, the one with the largest
///
/// ```text
/// (1 − α) p(v | x) − α maxⱼ cos(h_v, h_j)
/// ```
///
/// h_v being the model's last hidden state when it reads v after the text x, and h_j those of all tokens of x, the
/// prompt's included. α = 0 is greedy search. Su, Lan, Wang, Yogatama, Kong and Collier, "A ContrastiveSearch Framework for
/// Neural Text Generation" (NeurIPS 2022), equation 5; they take k from 3 to 10 and α around 0.6. It is what transformers
/// did with `penalty_alpha` and `top_k` until 4.56, but for one thing: a token that the controls ban is no candidate, where
/// that took it if fewer than k were left.
///
/// p is the softmax of the scores under the controls. The last hidden state is what the output product reads, at any
/// model whose last linear site is that product. Of tied candidates the more probable is taken. It is deterministic: one
/// completion a prompt.
///
/// *Cost*: one pass of the model with `top_k` rows a prompt each step, two copies of the model's cache, and `top_k` products
/// of a vector with the hidden states of the text, which are kept. The prompt's pass computes the logits of all its
/// positions. A text ends one token before the model's last position, since each candidate is read.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, search::ContrastiveSearch};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let done = model.generate("The old library").search(ContrastiveSearch::new(0.6, 4)?).max_new_tokens(32).run()?;
/// // ". I'm going to take a walk through the archives, see what I can find. (pauses to examine a crate of
/// // ancient artifacts) Ah,", where greedy search says
/// // ", a place where the past is preserved, where the past is lived in.\n\nThe old library was a place where the
/// // past was lived in, a"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ContrastiveSearch {
    penalty_alpha: f64,
    top_k: usize,
}

impl ContrastiveSearch {
    /// `penalty_alpha` in 0 ..= 1, and `top_k` of at least 1.
    ///
    /// # Errors
    /// [`Error::Value`] outside these ranges, and for NaN.
    pub fn new(penalty_alpha: f64, top_k: usize) -> Result<Self> {
        if !(0.0..=1.0).contains(&penalty_alpha) {
            return Err(Error::value("penalty_alpha", "0 ..= 1", penalty_alpha));
        }
        if top_k == 0 {
            return Err(Error::value("top_k", "at least 1", 0));
        }
        Ok(Self { penalty_alpha, top_k })
    }
}

/// One completion a prompt. The errors beside those of greedy search: [`Error::Value`] for more; [`Error::Unsupported`] for a
/// model whose last linear site is not the output product.
impl Search for ContrastiveSearch {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        let _guard = tch::no_grad_guard();
        task.validate()?;
        if task.n != 1 {
            let expected = "1, a contrastive search having one for each";
            return Err(Error::value("n, completions of each prompt", expected, task.n));
        }
        rows_of("top_k", task.prompts.len(), self.top_k)?;
        let stack = hidden::tapped(task.lm, task.pass.controls)?;
        let task = &Task { pass: Pass { controls: Some(&stack), ..task.pass }, ..*task };
        let (mut live, mut said) = read_prompts(task)?;
        let mut hypotheses: Vec<Hypothesis> =
            (0..task.prompts.len()).map(|prompt| Hypothesis::empty(prompt, 0)).collect();
        // Which hypothesis each row of the batch is.
        let mut rows: Vec<usize> = (0..hypotheses.len()).collect();
        let room = usize::try_from(live.room(task)?).unwrap_or(0);
        let longest = task.max_new_tokens.min(room);
        let end = if longest < task.max_new_tokens { Finish::Context } else { Finish::Length };

        for step in 0..longest {
            let located = |error: Error| match sample::at_step(error, step) {
                Error::AllBanned { row, step } => Error::AllBanned { row: rows[row], step },
                other => other,
            };
            let mut scores = live.logits.shallow_clone();
            if !task.controls.is_empty() {
                scores = task.controls.score(&mut live.controls, scores.f_detach_copy()?)?;
            }
            // The best tells what is wrong with a row that has none.
            sample::greedy(&scores).map_err(located)?;
            let k = i64::try_from(self.top_k).unwrap_or(i64::MAX).min(scores.size()[1]);
            let (p, candidates) = scores.f_softmax(-1, Kind::Float)?.f_topk(k, -1, true, true)?; // (R, k)

            let own = live.logits.shallow_clone();
            let mut hidden = read_candidates(task, &mut live, &candidates)?; // (R · k, 1, D)
            let similarity = said.similarity(&hidden.f_view([rows.len() as i64, k, -1])?)?; // (R, k)
            let alpha = self.penalty_alpha;
            let value = p.f_mul_scalar(1.0 - alpha)?.f_sub(&similarity.f_mul_scalar(alpha)?)?;
            let value = value.f_masked_fill(&p.f_eq(0.0)?, f64::NEG_INFINITY)?;
            check(&value, &rows, step)?;
            let place = value.f_argmax(-1, true)?; // (R, 1); the first of several
            let tokens: Vec<i64> = Vec::try_from(candidates.f_gather(1, &place, false)?.f_view([-1])?)?;
            let places: Vec<i64> = Vec::try_from(place.f_view([-1])?)?;

            let logprobs = sample::log_prob_of(&own, &tokens)?;
            let scored = sample::log_prob_of(&scores, &tokens)?;
            task.controls.advance(&mut live.controls, &tokens)?;
            let mut going = Vec::with_capacity(rows.len());
            for (i, (&row, &token)) in iter::zip(&rows, &tokens).enumerate() {
                let so_far = &mut hypotheses[row];
                so_far.score += scored[i];
                if task.eos.contains(&token) {
                    so_far.finish = Finish::Eos(token);
                } else {
                    so_far.ids.push(token);
                    so_far.logprobs.push(logprobs[i]);
                    if listener.token(Chosen { so_far, token, row })? == After::Continue {
                        going.push(i);
                        continue;
                    }
                    so_far.finish = Finish::Stopped;
                }
                so_far.score += task.controls.finish(&live.controls, i)?;
            }
            let cancelled = listener.step(tokens.len() as u64) == Flow::Stop;
            if cancelled || step + 1 == longest {
                for &i in &going {
                    hypotheses[rows[i]].finish = if cancelled { Finish::Cancelled } else { end.clone() };
                    hypotheses[rows[i]].score += task.controls.finish(&live.controls, i)?;
                }
                break;
            }
            if going.is_empty() {
                break;
            }
            // The candidates that were taken go on; their logits are there already.
            let taken: Vec<i64> = going.iter().map(|&i| i as i64 * k + places[i]).collect();
            let kept: Vec<i64> = going.iter().map(|&i| i as i64).collect();
            live.reorder_read(&taken)?;
            live.logits.reorder(&taken)?;
            live.controls.reorder(&kept)?;
            hidden.reorder(&taken)?;
            said.follow(&kept, &hidden)?;
            rows = going.iter().map(|&i| rows[i]).collect();
        }
        if longest == 0 && task.max_new_tokens > 0 {
            hypotheses.iter_mut().for_each(|hypothesis| hypothesis.finish = end.clone());
        }
        Ok(hypotheses)
    }

    fn takes_back(&self) -> bool {
        false
    }
}

/// Reads the prompts, one row each, and their hidden states.
fn read_prompts(task: &Task<'_>) -> Result<(Live, Said)> {
    let ((state, logits, keep), hidden) = hidden::forward(task.lm, &task.pass, |pass| {
        let Begun { mut state, ids, keep } = begin(task.lm, task.prompts, pass, task.max_new_tokens)?;
        let output = task.lm.forward(LmInput::ids(&ids).keep(keep.as_ref()), &mut state, pass)?;
        Ok((state, next_logits(&output.logits)?, keep))
    })?;
    let controls = task.controls.start(&task.openings())?;
    let lanes = task.pass.lanes.cloned();
    Ok((Live { state, controls, logits, lanes }, Said::new(&hidden, keep)?))
}

/// Reads each row's candidates `[R, k]` in a row of its own: their hidden states `[R · k, 1, D]`, while `live` has their
/// states and logits.
fn read_candidates(task: &Task<'_>, live: &mut Live, candidates: &Tensor) -> Result<Tensor> {
    let (rows, k) = (candidates.size()[0], candidates.size()[1]);
    let forks: Vec<i64> = (0..rows).flat_map(|row| iter::repeat_n(row, k as usize)).collect();
    live.reorder_read(&forks)?;
    let ids = candidates.f_reshape([-1, 1])?;
    let pass = Pass { lanes: live.lanes.as_ref(), ..task.pass };
    let state = &mut live.state;
    let (logits, hidden) = hidden::forward(task.lm, &pass, |pass| {
        next_logits(&task.lm.forward(LmInput::ids(&ids).last(), state, pass)?.logits)
    })?;
    live.logits = logits;
    Ok(hidden)
}

/// Refuses values `[R, k]` that are no numbers.
fn check(values: &Tensor, rows: &[usize], step: usize) -> Result<()> {
    let best = to_vec(&values.f_amax([-1].as_slice(), false)?)?;
    match iter::zip(rows, best).find(|(_, best)| best.is_nan()) {
        None => Ok(()),
        Some((prompt, _)) => {
            let at = format!("prompt {prompt}, step {step}");
            Err(Error::NotFinite { what: "hidden states".into(), at, found: "NaN".into() })
        }
    }
}
