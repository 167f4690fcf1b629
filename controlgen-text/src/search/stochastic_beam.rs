//! Stochastic beam search: sequences drawn without replacement.

use std::iter;

use controlgen_core::noise::Stream;
use controlgen_core::progress::Flow;
use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::{Device, Kind, Tensor};

use super::{After, Chosen, Finish, Hypothesis, Listener, Live, Search, Task, rows_of};
use crate::controls::{dims, to_vec};

/// Draws `num_beams` different completions of each prompt without replacement: the first from the distribution that
/// sampling draws from, each further one from the same distribution without those before.
///
/// Every completion x has a perturbed log-probability G(x) = φ(x) + Gumbel noise, φ being log p under the model and its
/// controls; the k largest are a sample without replacement (the Gumbel-top-k trick). They are found without looking at
/// all: that of a prefix is the largest of what may follow it, so that the k prefixes with the largest go on. Of the
/// children v of a prefix with φ and G, noise is drawn under the condition that their largest is G:
///
/// ```text
/// φᵥ = φ + log p(v | prefix),  G̃ᵥ = φᵥ + gumbel,  Z = maxᵥ G̃ᵥ,  Gᵥ = −log(exp(−G) − exp(−Z) + exp(−G̃ᵥ))
/// ```
///
/// What has ended stays among the k by its G. Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them: The
/// Gumbel-Top-k Trick for Sampling Sequences Without Replacement" (ICML 2019), algorithm 1 and appendix B.3.
///
/// As a search it gives the `task.n` with the largest G, largest first; [`Hypothesis::score`] is what it is in sampling.
/// [`StochasticBeamSearch::draw`] gives φ, G and the inclusion probability of all. Where all together say fewer
/// sequences than `num_beams`, all are given.
///
/// *Cost*: one pass of the model with up to `num_beams` rows a prompt each step, as many uniform numbers as the
/// vocabulary has tokens for each row (8 ns each), some ten operations in f64 on `[rows, V]`, and, where a hypothesis is
/// forked or dropped, one copy of the model's cache.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, search::StochasticBeamSearch};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let start = model.generate("The capital of France is").max_new_tokens(3);
/// let done = start.search(StochasticBeamSearch::new(4, 1)?).n(4).run()?;
/// // -1.66 " Paris.\n"   -3.65 " Paris, which"   -3.14 " Paris, and"   -4.34 " Paris. In"
/// done.completions.iter().for_each(|c| print!("{:.2} {:?}   ", c.score, c.text));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StochasticBeamSearch {
    num_beams: usize,
    seed: u64,
}

/// One of a sample without replacement.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// What it says. [`Hypothesis::sample`] is its place, largest G first.
    pub hypothesis: Hypothesis,
    /// φ: log p under the model and its controls, the ending token's included.
    pub log_prob: f64,
    /// G.
    pub perturbed: f64,
    /// log P(G > κ) = log(1 − exp(−exp(φ − κ))), κ being the largest G that was left out: 0 where none was. For any f,
    /// Σ f(x) exp(φ − this) over the sample estimates E f without bias (section 4.2).
    pub log_inclusion: f64,
}

impl StochasticBeamSearch {
    /// A sample of `num_beams` of at least 1. All prompts draw from stream 0 of the seed, each by itself.
    ///
    /// # Errors
    /// [`Error::Value`] for no beams.
    pub fn new(num_beams: usize, seed: u64) -> Result<Self> {
        if num_beams == 0 {
            return Err(Error::value("num_beams", "at least 1", 0));
        }
        Ok(Self { num_beams, seed })
    }

    /// The sample of each prompt, largest G first.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Context`] for what cannot be run; [`Error::AllBanned`] where the controls leave no
    /// token after a prefix, naming the prompt as the row; [`Error::NotFinite`] for NaN logits; the model's, the
    /// controls' and the listener's.
    pub fn draw(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Vec<Drawn>>> {
        let _guard = tch::no_grad_guard();
        task.validate()?;
        rows_of("num_beams", task.prompts.len(), self.num_beams)?;
        let mut live = Live::start(task)?;
        let mut sets: Vec<Beams> = (0..task.prompts.len()).map(|prompt| Beams::new(self, prompt)).collect();
        let room = usize::try_from(live.room(task)?).unwrap_or(0);
        let longest = task.max_new_tokens.min(room + 1);
        let end = if longest < task.max_new_tokens { Finish::Context } else { Finish::Length };

        for step in 0..longest {
            let best = Best::of(self, task, &mut live, &mut sets, step)?;
            // The rows that tokens come after, and the tokens, in the order of the beams' new rows.
            let (mut parents, mut tokens) = (Vec::new(), Vec::new());
            for set in &mut sets {
                set.choose(self, task, &best, &mut parents, &mut tokens);
            }
            live.controls.reorder(&parents)?;
            task.controls.advance(&mut live.controls, &tokens)?;
            listener.reorder(&parents)?;
            for beam in sets.iter_mut().flat_map(|set| &mut set.beams) {
                let Some(row) = beam.row else { continue };
                if !matches!(beam.so_far.finish, Finish::Eos(_)) {
                    let chosen = Chosen { so_far: &beam.so_far, token: tokens[row], row };
                    if listener.token(chosen)? == After::Continue {
                        continue;
                    }
                    beam.so_far.finish = Finish::Stopped;
                }
                beam.end(task, &live)?;
            }
            let cancelled = listener.step(tokens.len() as u64) == Flow::Stop;
            if cancelled || step + 1 == longest {
                for beam in sets.iter_mut().flat_map(|set| &mut set.beams).filter(|beam| beam.row.is_some()) {
                    beam.so_far.finish = if cancelled { Finish::Cancelled } else { end.clone() };
                    beam.end(task, &live)?;
                }
            }
            let mut kept = Vec::with_capacity(parents.len());
            for row in sets.iter_mut().flat_map(|set| &mut set.beams).filter_map(|beam| beam.row.as_mut()) {
                kept.push(std::mem::replace(row, kept.len()));
            }
            if kept.is_empty() {
                break;
            }
            let rows: Vec<i64> = kept.iter().map(|&row| row as i64).collect();
            live.controls.reorder(&rows)?;
            listener.reorder(&rows)?;
            live.reorder_read(&kept.iter().map(|&row| parents[row]).collect::<Vec<_>>())?;
            live.extend(task, &kept.iter().map(|&row| tokens[row]).collect::<Vec<_>>())?;
        }
        Ok(sets.into_iter().map(Beams::into_drawn).collect())
    }
}

/// The errors are those of [`StochasticBeamSearch::draw`], and [`Error::Value`] for more completions than beams.
impl Search for StochasticBeamSearch {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        if task.n > self.num_beams {
            let expected = format!("at most num_beams = {}", self.num_beams);
            return Err(Error::value("n, completions of each prompt", expected, task.n));
        }
        let drawn = self.draw(task, listener)?.into_iter();
        Ok(drawn.flat_map(|of_prompt| of_prompt.into_iter().take(task.n)).map(|d| d.hypothesis).collect())
    }
}

/// A hypothesis among those with the largest G.
struct Beam {
    so_far: Hypothesis,
    /// φ
    log_prob: f64,
    /// G
    perturbed: f64,
    /// Its row of the batch; none once it has ended.
    row: Option<usize>,
}

impl Beam {
    fn end(&mut self, task: &Task<'_>, live: &Live) -> Result<()> {
        if let Some(row) = self.row.take() {
            self.so_far.score += task.controls.finish(&live.controls, row)?;
        }
        Ok(())
    }
}

/// A prompt's beams, largest G first.
struct Beams {
    beams: Vec<Beam>,
    /// κ
    left_out: f64,
    stream: Stream,
}

impl Beams {
    /// Nothing said yet, in the prompt's row.
    fn new(search: &StochasticBeamSearch, prompt: usize) -> Self {
        let mut stream = Stream::new(search.seed, 0);
        // The largest of all: Gumbel noise around log 1.
        let perturbed = -(-uniform(&mut stream).ln()).ln();
        let root = Beam { so_far: Hypothesis::empty(prompt, 0), log_prob: 0.0, perturbed, row: Some(prompt) };
        Self { beams: vec![root], left_out: f64::NEG_INFINITY, stream }
    }

    /// Takes the largest G of all that has ended and all that may follow the rest. What follows has, as its row, its
    /// place in `parents` and `tokens`, which grow by it.
    fn choose(
        &mut self,
        search: &StochasticBeamSearch,
        task: &Task<'_>,
        best: &Best,
        parents: &mut Vec<i64>,
        tokens: &mut Vec<i64>,
    ) {
        // G, the beam, and where in `best` the token is that follows it.
        let mut candidates: Vec<(f64, usize, Option<usize>)> = Vec::new();
        for (i, beam) in self.beams.iter().enumerate() {
            match beam.row {
                None => candidates.push((beam.perturbed, i, None)),
                Some(row) => {
                    let of_row =
                        (row * best.k..(row + 1) * best.k).map(|at| (best.perturbed[at], i, Some(at)));
                    candidates.extend(of_row.filter(|candidate| candidate.0 > f64::NEG_INFINITY));
                }
            }
        }
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        let left_out = candidates.get(search.num_beams).map_or(f64::NEG_INFINITY, |candidate| candidate.0);
        self.left_out = self.left_out.max(left_out);
        candidates.truncate(search.num_beams);
        let chosen = candidates.into_iter().map(|(perturbed, i, next)| {
            let Beam { so_far, log_prob, row, .. } = &self.beams[i];
            let mut so_far = so_far.clone();
            let (Some(at), Some(row)) = (next, row) else {
                return Beam { so_far, log_prob: *log_prob, perturbed, row: None };
            };
            let token = best.tokens[at];
            so_far.score += best.log_q[at];
            if task.eos.contains(&token) {
                so_far.finish = Finish::Eos(token);
            } else {
                so_far.ids.push(token);
                so_far.logprobs.push(best.own[at]);
            }
            parents.push(*row as i64);
            tokens.push(token);
            Beam { so_far, log_prob: log_prob + best.log_q[at], perturbed, row: Some(tokens.len() - 1) }
        });
        self.beams = chosen.collect();
    }

    fn into_drawn(self) -> Vec<Drawn> {
        let drawn = |(sample, beam): (usize, Beam)| Drawn {
            hypothesis: Hypothesis { sample, ..beam.so_far },
            log_prob: beam.log_prob,
            perturbed: beam.perturbed,
            // log(1 − exp(−x)) of x = exp(φ − κ), which is ∞ where nothing was left out
            log_inclusion: (-(-(beam.log_prob - self.left_out).exp()).exp_m1()).ln(),
        };
        self.beams.into_iter().enumerate().map(drawn).collect()
    }
}

/// The tokens with the largest G of each row, k of the first row coming first.
struct Best {
    k: usize,
    tokens: Vec<i64>,
    perturbed: Vec<f64>,
    /// log p under the model and its controls.
    log_q: Vec<f64>,
    /// log p under the model alone.
    own: Vec<f64>,
}

impl Best {
    fn of(
        search: &StochasticBeamSearch,
        task: &Task<'_>,
        live: &mut Live,
        sets: &mut [Beams],
        step: usize,
    ) -> Result<Self> {
        let mut scores = live.logits.shallow_clone();
        if !task.controls.is_empty() {
            scores = task.controls.score(&mut live.controls, scores.f_detach_copy()?)?;
        }
        let (rows, vocab) = dims(&scores)?;
        let (mut noise, mut phi, mut of_rows) = (Vec::new(), Vec::new(), Vec::new());
        for set in sets {
            for beam in set.beams.iter().filter(|beam| beam.row.is_some()) {
                phi.push(beam.log_prob);
                of_rows.push((beam.perturbed, beam.so_far.prompt));
                noise.extend((0..vocab).map(|_| uniform(&mut set.stream)));
            }
        }
        for (&best, &(_, row)) in iter::zip(&to_vec(&scores.f_amax([-1].as_slice(), false)?)?, &of_rows) {
            if best == f32::NEG_INFINITY {
                return Err(Error::AllBanned { row, step });
            }
            if !best.is_finite() {
                let found = if best.is_nan() { "NaN" } else { "infinity" };
                let at = format!("prompt {row}, step {step}");
                return Err(Error::NotFinite { what: "logits".into(), at, found: found.into() });
            }
        }
        let device = scores.device();
        let column = |values: &[f64]| Tensor::f_from_slice(values)?.f_view([-1, 1])?.f_to_device(device);
        let limit = column(&of_rows.iter().map(|row| row.0).collect::<Vec<_>>())?; // G: (R, 1)
        let mut gumbel = Tensor::f_from_slice(&noise)?.f_view([rows, vocab])?.f_to_device(device)?;
        let _ = gumbel.f_log_()?.f_neg_()?.f_log_()?.f_neg_()?;
        let log_q = scores.f_log_softmax(-1, Kind::Double)?; // (R, V)
        let free = log_q.f_add(&column(&phi)?)?.f_add(&gumbel)?; // G̃
        let largest = free.f_amax([-1].as_slice(), true)?; // Z
        // v = G − G̃ + log(1 − exp(G̃ − Z)); the G of each is G − max(0, v) − log(1 + exp(−|v|))
        let v = free.f_sub(&largest)?.f_exp()?.f_neg()?.f_log1p()?.f_add(&limit)?.f_sub(&free)?;
        let rest = v.f_abs()?.f_neg()?.f_exp()?.f_log1p()?;
        let perturbed = limit.f_sub(&v.f_clamp_min(0.0)?)?.f_sub(&rest)?;

        let k = i64::try_from(search.num_beams).unwrap_or(vocab).saturating_add(1).min(vocab);
        let (perturbed, tokens) = perturbed.f_topk(k, -1, true, true)?; // (R, k)
        let own = live.logits.f_log_softmax(-1, Kind::Double)?.f_gather(1, &tokens, false)?;
        let list = |t: &Tensor| Vec::<f64>::try_from(t.f_flatten(0, -1)?.f_to_device(Device::Cpu)?);
        Ok(Self {
            k: usize::try_from(k).unwrap_or(0),
            perturbed: list(&perturbed)?,
            log_q: list(&log_q.f_gather(1, &tokens, false)?)?,
            own: list(&own)?,
            tokens: Vec::try_from(tokens.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?,
        })
    }
}

/// In (0, 1).
fn uniform(stream: &mut Stream) -> f64 {
    stream.uniform().max(f64::MIN_POSITIVE)
}
