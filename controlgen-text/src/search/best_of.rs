//! Best of n: samples ranked by any score.

use std::iter;
use std::sync::Arc;

use controlgen_core::energy::{Energy, Text};
use controlgen_core::{Error, Result};

use super::energies::energies_of;
use super::{Choice, Finish, Hypothesis, Listener, Search, Task, rows_of};

/// Draws `num_samples` completions of each prompt and gives the best `task.n` of them, best first; ties in the order in
/// which they were drawn.
///
/// What is best is said by a scorer: the mean log-probability under the model and its controls unless another is given;
/// an [`Energy`], lower being better; or any function of the completion. The winner's [`Hypothesis::score`] is the
/// scorer's, of an energy −E. Where the scorer is a reward r, the best of n has a distribution that lies at most
/// log n − (n − 1) / n nats from the model's by Kullback and Leibler (Stiennon et al., "Learning to summarize from human
/// feedback", 2020, appendix G.3; an upper bound by Beirami et al., "Theoretical guarantees on the best-of-n alignment
/// policy", 2024).
///
/// Sample k draws from stream k of the seed, as in [`Choice::Sample`]: the samples are the same completions.
///
/// *Cost*: `num_samples` completions of each prompt in one batch, and the scorer once.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, controls::TopP, search::BestOf};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let start = model.generate("The old library").with(TopP::new(0.95)?).max_new_tokens(12);
/// let done = start.search(BestOf::new(8, 1)?).n(2).run()?;
/// // -2.08 ", abandoned and desolate, just as it's said to"
/// // -2.65 " carved into the sandstone cliffs had once been the lair of"
/// done.completions.iter().for_each(|c| println!("{:.2} {:?}", c.score, c.text));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BestOf {
    num_samples: usize,
    seed: u64,
    scorer: Scorer,
}

type Function = dyn Fn(&Hypothesis) -> Result<f64> + Send + Sync;

#[derive(Clone)]
enum Scorer {
    MeanLogProb,
    Energy(Energy<Text>),
    Function(Arc<Function>),
}

impl BestOf {
    /// The best by mean log-probability of `num_samples` of at least 1.
    ///
    /// # Errors
    /// [`Error::Value`] for no samples.
    pub fn new(num_samples: usize, seed: u64) -> Result<Self> {
        if num_samples == 0 {
            return Err(Error::value("num_samples", "at least 1", 0));
        }
        Ok(Self { num_samples, seed, scorer: Scorer::MeanLogProb })
    }

    /// The best by the lowest energy of the new tokens, without the one that ended them; +∞ comes last.
    #[must_use]
    pub fn by_energy(self, energy: Energy<Text>) -> Self {
        Self { scorer: Scorer::Energy(energy), ..self }
    }

    /// The best by the highest score of a function of the completion; −∞ comes last. What is given as
    /// [`Hypothesis::score`] is the sum of log-probabilities under the model and its controls.
    #[must_use]
    pub fn by(self, scorer: impl Fn(&Hypothesis) -> Result<f64> + Send + Sync + 'static) -> Self {
        Self { scorer: Scorer::Function(Arc::new(scorer)), ..self }
    }

    fn scores(&self, task: &Task<'_>, drawn: &[Hypothesis]) -> Result<Vec<f64>> {
        match &self.scorer {
            Scorer::MeanLogProb => Ok(drawn.iter().map(mean_log_prob).collect()),
            Scorer::Function(scorer) => drawn.iter().map(|hypothesis| scorer(hypothesis)).collect(),
            Scorer::Energy(energy) => {
                let texts: Vec<&[i64]> = drawn.iter().map(|hypothesis| &hypothesis.ids[..]).collect();
                Ok(energies_of(energy, &texts, task.lm)?.into_iter().map(|energy| -energy).collect())
            }
        }
    }
}

/// Of the token that ended it too.
fn mean_log_prob(hypothesis: &Hypothesis) -> f64 {
    let length = hypothesis.ids.len() + usize::from(matches!(hypothesis.finish, Finish::Eos(_)));
    hypothesis.score / length.max(1) as f64
}

/// The errors beside those of sampling: [`Error::Value`] for more completions than samples; [`Error::NotFinite`] for a score
/// of NaN or +∞; the scorer's.
impl Search for BestOf {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        let n = self.num_samples;
        let count = rows_of("num_samples", task.prompts.len(), n)?;
        if task.n > n {
            let expected = format!("at most num_samples = {n}");
            return Err(Error::value("n, completions of each prompt", expected, task.n));
        }
        let _guard = tch::no_grad_guard();
        listener.reorder(&(0..count).map(|row| row.div_euclid(n) as i64).collect::<Vec<_>>())?;
        let all = Task { n, ..*task };
        let mut drawn = Choice::Sample { seed: self.seed, first: 0 }.run(&all, listener)?;
        let scores = self.scores(task, &drawn)?;
        for (hypothesis, score) in iter::zip(&mut drawn, scores) {
            if score.is_nan() || score == f64::INFINITY {
                let at = format!("sample {} of prompt {}", hypothesis.sample, hypothesis.prompt);
                return Err(Error::NotFinite { what: "score".into(), at, found: score.to_string() });
            }
            hypothesis.score = score;
        }
        let mut best = Vec::with_capacity(task.prompts.len() * task.n);
        for of_prompt in drawn.chunks_mut(n) {
            of_prompt.sort_by(|a, b| b.score.total_cmp(&a.score));
            let ranked = iter::zip(0.., of_prompt).take(task.n);
            best.extend(ranked.map(|(sample, found)| Hypothesis { sample, ..found.clone() }));
        }
        Ok(best)
    }
}
