//! Sequential Monte Carlo: weighted particles that follow the product of a model, its controls and an energy.

use std::iter;

use controlgen_core::energy::{Energy, Text};
use controlgen_core::noise::Stream;
use controlgen_core::progress::Flow;
use controlgen_core::{Error, Result, Rows, TokenControl};
use tch::{Kind, Tensor};

use super::energies::energies_of;
use super::resampling::{effective_sample_size, log_sum_exp, systematic};
use super::{After, Chosen, Finish, Hypothesis, Listener, Live, Search, Task, rows_of};
use crate::controls::to_vec;
use crate::sample;

/// The stream that resampling draws from, and the one that completions are drawn from the particles with: no
/// particle's.
const RESAMPLING: u64 = u64::MAX;
const DRAWING: u64 = u64::MAX - 1;

/// Samples whole texts of the distribution that the controls and an energy define, not token by token:
///
/// ```text
/// p*(x) = γ(x) / Z,   γ(x) = Πₜ exp s(xₜ | x₁ … xₜ₋₁) · exp(Σ log-weights of the controls' `finish` − E(x))
/// ```
///
/// with s the scores that the controls of [`Role::Potential`](controlgen_core::Role) leave of log p, not normalised
/// again. Sampling normalises them at each step, which forgets how much of the distribution each step left: a text
/// that was led into a corner is as likely as one that was free all the way. Here each of N particles keeps a weight
/// for it. In a step a particle draws its token from q and multiplies its weight by
///
/// ```text
/// exp s(xₜ | …) / q(xₜ | …),   q = softmax of the scores under all controls
/// ```
///
/// which, where no control shapes the proposal only, is Zₜ = Σᵥ exp s(v | …) whatever token was drawn. Controls of
/// `Role::Proposal` (temperature, top-p) are corrected for; but what they never propose is no part of what is sampled:
/// under top-p the target is p* on the texts that top-p can say. An ended particle takes the last factor of γ, keeps
/// its weight, and takes part in what follows: when the effective sample size (Σw)² / Σw² of a prompt's particles falls
/// below a share of N, they are drawn anew from among themselves by systematic resampling, all with the mean weight.
/// In the end the mean weight is an estimate of Z without bias (Del Moral, "Feynman-Kac Formulae", 2004, theorem
/// 7.4.2), and the weighted particles approximate p*, with an error of order 1/√N.
///
/// Lew, Zhi-Xuan, Grand and Mansinghka, "Sequential Monte Carlo Steering of Large Language Models using Probabilistic
/// Programs" (2023); Loula et al., "Syntactic and Semantic Control of Large Language Models via Sequential Monte Carlo"
/// (ICLR 2025), whose expensive potential is [`Smc::on_prefixes`].
///
/// As a search it gives `task.n` completions of each prompt drawn from the particles by their weights, each by itself,
/// so that one may come twice; [`Hypothesis::score`] is log γ(x). [`Smc::particles`] gives all particles with their
/// weights and log Z. Particle k draws from stream k of the seed.
///
/// *Cost*: one pass of the model with N rows a prompt each step, a log-softmax and a log-sum-exp over each row's
/// vocabulary, the controls once more where some shape the proposal only, and one copy of the model's cache for each
/// resampling or particle that ends.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::{Energy, Placement};
/// use controlgen_text::{TextModel, energies::Keyword, search::Smc};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let storm = Energy::new(Keyword::spelled(model.tokenizer(), "storm")?);
/// let done = model
///     .generate("The ship left the harbour and sailed into a")
///     .search(Smc::new(16, 1)?.energy(storm))
///     .max_new_tokens(10)
///     .run()?;
/// // " storm unto doom. But I will not rest till", of log γ = -25.06
/// println!("{:?}, of log γ = {:.2}", done.text(), done.completions[0].score);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Smc {
    num_particles: usize,
    seed: u64,
    ess_threshold: f64,
    energy: Option<Energy<Text>>,
    on_prefixes: bool,
}

impl Smc {
    /// `num_particles` of at least 1 for each prompt. They are resampled when their effective sample size falls below
    /// half of them.
    ///
    /// # Errors
    /// [`Error::Value`] for no particles.
    pub fn new(num_particles: usize, seed: u64) -> Result<Self> {
        if num_particles == 0 {
            return Err(Error::value("num_particles", "at least 1", 0));
        }
        Ok(Self { num_particles, seed, ess_threshold: 0.5, energy: None, on_prefixes: false })
    }

    /// The share of the particles below which the effective sample size leads to resampling, in 0 ..= 1: 0 never
    /// resamples, which is importance sampling; 1 does wherever weights differ.
    ///
    /// # Errors
    /// [`Error::Value`] outside that range, and for NaN.
    pub fn ess_threshold(self, ess_threshold: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&ess_threshold) {
            return Err(Error::value("ess_threshold", "0 ..= 1", ess_threshold));
        }
        Ok(Self { ess_threshold, ..self })
    }

    /// Multiplies the target by exp(−E(x)), E of the new tokens, without the prompt and the token that ended them.
    /// +∞ is "never".
    #[must_use]
    pub fn energy(self, energy: Energy<Text>) -> Self {
        Self { energy: Some(energy), ..self }
    }

    /// Asks the energy after every token, of what has been said so far, so that particles that go astray are dropped
    /// before the end. Step t then counts E(x₁ … xₜ₋₁) − E(x₁ … xₜ), with 0 for the empty text; what was counted on the
    /// way is taken back at the next step, so that the target stays the same. An energy that is +∞ of some prefix must
    /// be +∞ of all that follow it.
    #[must_use]
    pub fn on_prefixes(self) -> Self {
        Self { on_prefixes: true, ..self }
    }

    /// The weighted particles of each prompt.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Context`] for what cannot be run; [`Error::NoParticles`] where all particles of a
    /// prompt have lost their weight: no token may follow, or nothing that they said is allowed;
    /// [`Error::NotFinite`] for logits, log-weights or energies that are NaN; the model's, the controls', the energy's
    /// and the listener's.
    pub fn particles(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Particles>> {
        let _guard = tch::no_grad_guard();
        task.validate()?;
        rows_of("num_particles", task.prompts.len(), self.num_particles)?;
        let mut live = Live::start(task)?;
        let mut swarm = Swarm::new(self, task);
        let prompts: Vec<i64> = swarm.particles.iter().map(|p| p.so_far.prompt as i64).collect();
        live.reorder(&prompts)?;
        listener.reorder(&prompts)?;
        let room = usize::try_from(live.room(task)?).unwrap_or(0);
        let longest = task.max_new_tokens.min(room + 1);
        let end = if longest < task.max_new_tokens { Finish::Context } else { Finish::Length };

        for step in 0..longest {
            let scores = swarm.score(task, &mut live, listener, step)?;
            if swarm.rows.is_empty() {
                break;
            }
            let tokens = swarm.draw(task, &mut live, &scores)?;
            let mut ended = swarm.say(task, listener, &tokens)?;
            let cancelled = listener.step(tokens.len() as u64) == Flow::Stop;
            if cancelled || step + 1 == longest {
                ended.extend(swarm.end_all(if cancelled { &Finish::Cancelled } else { &end }));
            }
            swarm.weigh(task, &live, &ended, step)?;
            if cancelled {
                break;
            }
            swarm.resample();
            let parents = swarm.renumber();
            if parents.is_empty() {
                break;
            }
            if !(0..tokens.len() as i64).eq(parents.iter().copied()) {
                live.reorder_read(&parents)?;
                live.controls.reorder(&parents)?;
                listener.reorder(&parents)?;
            }
            live.extend(task, &parents.iter().map(|&row| tokens[row as usize]).collect::<Vec<_>>())?;
        }
        if longest == 0 {
            let ended = swarm.end_all(&end);
            swarm.weigh(task, &live, &ended, 0)?;
        }
        Ok(swarm.finish())
    }
}

/// Completes each prompt with `task.n` draws from its particles, by their weights, each by itself. The errors are those of
/// [`Smc::particles`].
impl Search for Smc {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        let mut completions = Vec::with_capacity(task.prompts.len() * task.n);
        for found in self.particles(task, listener)? {
            let mut stream = Stream::new(self.seed, DRAWING);
            for sample in 0..task.n {
                for at in systematic(&found.log_weights, stream.uniform(), 1) {
                    completions.push(Hypothesis { sample, ..found.hypotheses[at].clone() });
                }
            }
        }
        Ok(completions)
    }
}

/// The particles of one prompt.
#[derive(Clone, Debug)]
pub struct Particles {
    /// What they say. [`Hypothesis::sample`] is the particle's number; the score is log γ(x).
    pub hypotheses: Vec<Hypothesis>,
    /// The natural logarithms of their weights, which sum to 1; −∞ for a particle that says what is not allowed.
    pub log_weights: Vec<f64>,
    /// The estimate of log Z, in nats. That of Z has no bias.
    pub log_normaliser: f64,
}

impl Particles {
    /// (Σw)² / Σw², between 1 and the number of particles.
    pub fn effective_sample_size(&self) -> f64 {
        effective_sample_size(&self.log_weights)
    }
}

#[derive(Clone)]
struct Particle {
    so_far: Hypothesis,
    /// Not normalised.
    log_weight: f64,
    /// What the energy of its prefix has counted so far.
    energy: f64,
    /// Its row of the batch; none once it has ended or lost its weight.
    row: Option<usize>,
}

/// Scores `[R, V]` of the next tokens.
struct Scores {
    /// log p under the model alone.
    own: Tensor,
    /// Under the potentials.
    target: Tensor,
    /// Under all controls, where some shape the proposal only.
    proposal: Option<Tensor>,
}

/// All particles; those of a prompt stand together.
struct Swarm<'s> {
    settings: &'s Smc,
    particles: Vec<Particle>,
    /// Which particle each row of the batch is.
    rows: Vec<usize>,
    /// One for each particle's place.
    streams: Vec<Stream>,
    /// One for each prompt.
    resampling: Vec<Stream>,
}

impl<'s> Swarm<'s> {
    fn new(settings: &'s Smc, task: &Task<'_>) -> Self {
        let (n, seed) = (settings.num_particles, settings.seed);
        let places = || (0..task.prompts.len()).flat_map(|prompt| (0..n).map(move |sample| (prompt, sample)));
        let particle = |(row, (prompt, sample))| {
            let so_far = Hypothesis::empty(prompt, sample);
            Particle { so_far, log_weight: 0.0, energy: 0.0, row: Some(row) }
        };
        Self {
            settings,
            particles: places().enumerate().map(particle).collect(),
            rows: (0..task.prompts.len() * n).collect(),
            streams: places().map(|(_, sample)| Stream::new(seed, sample as u64)).collect(),
            resampling: task.prompts.iter().map(|_| Stream::new(seed, RESAMPLING)).collect(),
        }
    }

    /// Scores the next tokens. A particle that nothing may follow loses its weight and its row.
    fn score(
        &mut self,
        task: &Task<'_>,
        live: &mut Live,
        listener: &mut dyn Listener,
        step: usize,
    ) -> Result<Scores> {
        let mut own = live.logits.f_log_softmax(-1, Kind::Float)?; // (R, V)
        let mut target = own.shallow_clone();
        if !task.controls.is_empty() {
            target = task.controls.score_potentials(&mut live.controls, own.f_detach_copy()?)?;
        }
        let mut proposal = None;
        if task.controls.shapes_proposal() {
            proposal = Some(task.controls.score(&mut live.controls, own.f_detach_copy()?)?);
        }
        let best = to_vec(&proposal.as_ref().unwrap_or(&target).f_amax([-1].as_slice(), false)?)?;
        for (&i, &best) in iter::zip(&self.rows, &best) {
            let particle = &mut self.particles[i];
            if best.is_nan() || best == f32::INFINITY {
                let at = format!("prompt {}, step {step}", particle.so_far.prompt);
                return Err(Error::NotFinite { what: "logits".into(), at, found: name(best.into()) });
            }
            if best == f32::NEG_INFINITY {
                (particle.log_weight, particle.so_far.score) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
            }
        }
        if best.contains(&f32::NEG_INFINITY) {
            self.check(step)?;
            let alive = self.renumber();
            live.reorder(&alive)?;
            listener.reorder(&alive)?;
            own.reorder(&alive)?;
            target.reorder(&alive)?;
            proposal.as_mut().map_or(Ok(()), |proposal| proposal.reorder(&alive))?;
        }
        Ok(Scores { own, target, proposal })
    }

    /// Draws a token for each row, and multiplies its particle's weight by exp s / q.
    fn draw(&mut self, task: &Task<'_>, live: &mut Live, scores: &Scores) -> Result<Vec<i64>> {
        let Scores { own, target, proposal } = scores;
        let uniforms: Vec<f64> = self.rows.iter().map(|&i| self.streams[i].uniform()).collect();
        let tokens = sample::categorical(proposal.as_ref().unwrap_or(target), &uniforms)?;
        let index = Tensor::f_from_slice(&tokens)?.f_unsqueeze(1)?.f_to_device(own.device())?;
        let logprobs = to_vec(&own.f_gather(1, &index, false)?)?;
        let scored = to_vec(&target.f_gather(1, &index, false)?)?;
        let increments: Vec<f64> = match proposal {
            Some(proposal) => iter::zip(&scored, sample::log_prob_of(proposal, &tokens)?)
                .map(|(&s, log_q)| f64::from(s) - log_q)
                .collect(),
            // log p alone is normalised.
            None if task.controls.is_empty() => vec![0.0; tokens.len()],
            None => {
                to_vec(&target.f_logsumexp([-1].as_slice(), false)?)?.into_iter().map(f64::from).collect()
            }
        };
        for (row, &i) in self.rows.iter().enumerate() {
            let Particle { so_far, log_weight, .. } = &mut self.particles[i];
            *log_weight += increments[row];
            so_far.score += f64::from(scored[row]);
            if task.eos.contains(&tokens[row]) {
                so_far.finish = Finish::Eos(tokens[row]);
            } else {
                so_far.ids.push(tokens[row]);
                so_far.logprobs.push(logprobs[row].into());
            }
        }
        task.controls.advance(&mut live.controls, &tokens)?;
        Ok(tokens)
    }

    /// Tells the listener. Gives the particles that have ended, with their rows, which they lose.
    fn say(
        &mut self,
        task: &Task<'_>,
        listener: &mut dyn Listener,
        tokens: &[i64],
    ) -> Result<Vec<(usize, usize)>> {
        let mut ended = Vec::new();
        for (row, (&i, &token)) in iter::zip(&self.rows, tokens).enumerate() {
            let so_far = &mut self.particles[i].so_far;
            if !task.eos.contains(&token) {
                if listener.token(Chosen { so_far, token, row })? == After::Continue {
                    continue;
                }
                so_far.finish = Finish::Stopped;
            }
            self.particles[i].row = None;
            ended.push((i, row));
        }
        Ok(ended)
    }

    /// Ends all that go on.
    fn end_all(&mut self, finish: &Finish) -> Vec<(usize, usize)> {
        let end = |(i, particle): (usize, &mut Particle)| {
            let row = particle.row.take()?;
            particle.so_far.finish = finish.clone();
            Some((i, row))
        };
        self.particles.iter_mut().enumerate().filter_map(end).collect()
    }

    /// Weighs what has ended, and, where prefixes have an energy, what has become longer.
    fn weigh(&mut self, task: &Task<'_>, live: &Live, ended: &[(usize, usize)], step: usize) -> Result<()> {
        for &(i, row) in ended {
            let log_weight = task.controls.finish(&live.controls, row)?;
            self.particles[i].log_weight += log_weight;
            self.particles[i].so_far.score += log_weight;
        }
        if let Some(energy) = &self.settings.energy {
            let mut weighed: Vec<usize> = ended.iter().map(|&(i, _)| i).collect();
            if self.settings.on_prefixes {
                weighed.extend((0..self.particles.len()).filter(|&i| self.particles[i].row.is_some()));
            }
            weighed.retain(|&i| self.particles[i].log_weight > f64::NEG_INFINITY);
            let texts: Vec<&[i64]> = weighed.iter().map(|&i| &self.particles[i].so_far.ids[..]).collect();
            for (i, energy) in iter::zip(weighed, energies_of(energy, &texts, task.lm)?) {
                let particle = &mut self.particles[i];
                particle.log_weight -= energy - particle.energy;
                particle.so_far.score -= energy - particle.energy;
                particle.energy = energy;
            }
        }
        self.check(step)
    }

    /// Refuses weights that are no numbers, and prompts without any weight.
    fn check(&self, step: usize) -> Result<()> {
        for (prompt, particles) in self.particles.chunks(self.settings.num_particles).enumerate() {
            let wrong = |w: &f64| w.is_nan() || *w == f64::INFINITY;
            if let Some(found) = particles.iter().map(|particle| particle.log_weight).find(wrong) {
                let at = format!("prompt {prompt}, step {step}");
                return Err(Error::NotFinite { what: "log-weight".into(), at, found: name(found) });
            }
            if particles.iter().all(|particle| particle.log_weight == f64::NEG_INFINITY) {
                return Err(Error::NoParticles { prompt, particles: particles.len(), step });
            }
        }
        Ok(())
    }

    /// Where too few particles of a prompt carry its weight: draws them anew, all with the mean weight.
    fn resample(&mut self) {
        let n = self.settings.num_particles;
        for (particles, stream) in iter::zip(self.particles.chunks_mut(n), &mut self.resampling) {
            let log_weights: Vec<f64> = particles.iter().map(|particle| particle.log_weight).collect();
            let enough = self.settings.ess_threshold * n as f64;
            let going = particles.iter().any(|particle| particle.row.is_some());
            if !going || effective_sample_size(&log_weights) >= enough {
                continue;
            }
            let mean = log_sum_exp(&log_weights) - (n as f64).ln();
            let ancestors = systematic(&log_weights, stream.uniform(), n);
            let drawn = ancestors.iter().enumerate().map(|(sample, &ancestor)| {
                let Particle { so_far, energy, row, .. } = particles[ancestor].clone();
                Particle { so_far: Hypothesis { sample, ..so_far }, log_weight: mean, energy, row }
            });
            let drawn: Vec<Particle> = drawn.collect();
            particles.clone_from_slice(&drawn);
        }
    }

    /// Numbers the particles that go on anew; the rows that they had.
    fn renumber(&mut self) -> Vec<i64> {
        let mut parents = Vec::with_capacity(self.rows.len());
        self.rows.clear();
        for (i, particle) in self.particles.iter_mut().enumerate() {
            let Some(row) = particle.row.take() else { continue };
            if particle.log_weight > f64::NEG_INFINITY {
                particle.row = Some(parents.len());
                self.rows.push(i);
                parents.push(row as i64);
            }
        }
        parents
    }

    fn finish(self) -> Vec<Particles> {
        let of_prompt = |particles: &[Particle]| {
            let log_weights: Vec<f64> = particles.iter().map(|particle| particle.log_weight).collect();
            let sum = log_sum_exp(&log_weights);
            Particles {
                hypotheses: particles.iter().map(|particle| particle.so_far.clone()).collect(),
                log_weights: log_weights.into_iter().map(|w| w - sum).collect(),
                log_normaliser: sum - (particles.len() as f64).ln(),
            }
        };
        self.particles.chunks(self.settings.num_particles).map(of_prompt).collect()
    }
}

fn name(found: f64) -> String {
    if found.is_nan() { "NaN".into() } else { "infinity".into() }
}
