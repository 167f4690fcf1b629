//! The steps that diffusers' schedulers take.

use controlgen_core::guidance::Step;
use controlgen_core::{Error, NoiseLevel, Result};

use super::fields::Fields;
use crate::schedule::{flow_sigmas, from_ratio, linspace};
use crate::{DiffusionSchedule, SigmaSpacing, Spacing, steps_at};

/// How a scheduler makes n steps.
#[derive(Clone, Debug)]
pub(super) enum Grid {
    /// Whole timesteps, each to the next: DDPM, PNDM.
    Whole { spacing: Spacing, last: NoiseLevel },
    /// Whole timesteps, each to the one T div n before it, whether that is the next or not: DDIM.
    Stride { spacing: Spacing, last: NoiseLevel },
    /// Every so many of the timesteps of distillation: LCM.
    Distilled { original: usize },
    /// σ/α at timesteps or spaced by itself: k-diffusion's and the multistep solvers'.
    Sigmas(Sigmas),
    /// Times of rectified flow.
    Flow(Flow),
}

#[derive(Clone, Debug)]
pub(super) struct Sigmas {
    pub(super) spacing: Spacing,
    /// Timesteps as multistep solvers take them, and among how many.
    pub(super) solver: Option<usize>,
    pub(super) spaced: Option<SigmaSpacing>,
    /// Whether the most and the least noise of a spacing are those of the timesteps, or of the whole table.
    pub(super) bounds: (Option<f64>, Option<f64>),
    /// How timesteps of spaced sigmas are made whole.
    pub(super) whole: Whole,
    /// Steps of equal ln σ over the whole table: `interpolation_type` log_linear.
    pub(super) log_linear: bool,
    /// Timesteps ¼ ln σ, as models of continuous noise take them.
    pub(super) continuous: bool,
    pub(super) ends: Ends,
}

/// Where the last step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// Without noise.
    Clean,
    /// With the noise of the first timestep of training: `final_sigmas_type` sigma_min.
    First,
    /// With the noise the last step began with.
    Same,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    No,
    Round,
    Cut,
}

#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) training: usize,
    pub(super) shift: f64,
    /// Which of diffusers' three ways to the times.
    pub(super) times: Times,
    pub(super) terminal: Option<f64>,
    pub(super) spaced: Option<SigmaSpacing>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Times {
    FlowMatch,
    Dpm,
    UniPc,
}

impl Grid {
    /// n steps of a schedule, which flows have none of.
    pub(super) fn steps(&self, n: usize, table: Option<&DiffusionSchedule>) -> Result<Vec<Step>> {
        match (self, table) {
            (Self::Flow(flow), _) => flow.steps(n),
            (_, None) => Err(Error::value("schedule of betas", "one", "none")),
            (Self::Whole { spacing, last }, Some(table)) => {
                crate::steps(&table.timesteps(n, *spacing)?, |t| table.level(t), *last)
            }
            (Self::Stride { spacing, last }, Some(table)) => {
                let timesteps = table.timesteps(n, *spacing)?;
                let stride = table.alphas_cumprod().len().div_euclid(n) as f64;
                let mut steps = table.steps(&timesteps)?;
                for step in &mut steps {
                    let to = step.timestep - stride;
                    step.next = if to < 0.0 { *last } else { table.level(to)? };
                }
                Ok(steps)
            }
            (Self::Distilled { original }, Some(table)) => {
                let stride = table.alphas_cumprod().len().div_euclid(*original);
                if n == 0 || n > *original {
                    let expected = format!("1 ..= {original}, the steps of distillation");
                    return Err(Error::value("number of steps", expected, n));
                }
                // ⌊linspace(0, original, n, endpoint=False)⌋ from the noisiest
                let each = *original as f64 / n as f64;
                let place = |i: usize| *original - (i as f64 * each).floor() as usize;
                let timesteps: Vec<f64> = (0..n).map(|i| (place(i) * stride) as f64 - 1.0).collect();
                table.steps(&timesteps)
            }
            (Self::Sigmas(sigmas), Some(table)) => sigmas.steps(n, table),
        }
    }
}

impl Sigmas {
    fn steps(&self, n: usize, table: &DiffusionSchedule) -> Result<Vec<Step>> {
        let all = table.sigmas();
        let (first, most) = (all[0], all[all.len() - 1]);
        let mut timesteps = match (self.solver, self.spacing) {
            (Some(of), spacing) => spacing.solver_timesteps(n, of, all.len())?,
            (None, Spacing::Linspace) => {
                table.timesteps(n, Spacing::Linspace)?; // n in range
                // From the last timestep on; one step alone is at timestep 0, as NumPy has it.
                linspace(0.0, (all.len() - 1) as f64, n).rev().collect()
            }
            (None, spacing) => table.timesteps(n, spacing)?,
        };
        let mut ratios = match self.log_linear {
            true => linspace(most.ln(), first.ln(), n + 1).map(f64::exp).take(n).collect(),
            false => {
                let levels = timesteps.iter().map(|&t| table.level_between(t));
                let ratio = |level: NoiseLevel| level.sigma() / level.alpha();
                levels.map(|level| level.map(ratio)).collect::<Result<Vec<f64>>>()?
            }
        };
        if let Some(spaced) = self.spaced {
            let (from, to) = match self.solver {
                Some(_) => (most, first),
                // diffusers spaces between the first and the last of what it had, log-linear's end included.
                None if self.log_linear => (most, first),
                None => (ratios[0], ratios[n - 1]),
            };
            ratios = spaced.sigmas(self.bounds.1.unwrap_or(from), self.bounds.0.unwrap_or(to), n)?;
            timesteps = ratios.iter().map(|&ratio| table.timestep_of(ratio)).collect();
        }
        match self.whole {
            Whole::No => {}
            Whole::Round => timesteps.iter_mut().for_each(|t| *t = t.round_ties_even().trunc()),
            // A timestep that is whole but for rounding is that one.
            Whole::Cut => timesteps.iter_mut().for_each(|t| *t = (*t + 1e-6).trunc()),
        }
        if self.continuous {
            timesteps = ratios.iter().map(|ratio| 0.25 * ratio.ln()).collect();
        }
        let levels = ratios.iter().map(|&ratio| from_ratio(ratio)).collect::<Result<Vec<_>>>()?;
        let last = match self.ends {
            Ends::Clean => NoiseLevel::CLEAN,
            Ends::First => from_ratio(first)?,
            Ends::Same => levels[n - 1],
        };
        steps_at(&timesteps, &levels, last)
    }
}

impl Flow {
    fn steps(&self, n: usize) -> Result<Vec<Step>> {
        if n == 0 || n > self.training {
            return Err(Error::value("number of steps", format!("1 ..= {}", self.training), n));
        }
        let least = 1.0 / self.training as f64;
        let shifted = |sigma: f64| self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma);
        let mut sigmas: Vec<f64> = match self.times {
            Times::FlowMatch => flow_sigmas(n, self.training, self.shift)?,
            // 1 − α of α from 1 / T to 1, without the end that has no noise
            Times::Dpm => {
                linspace(1.0, least, n + 1).map(|alpha| shifted(1.0 - alpha)).rev().take(n).collect()
            }
            Times::UniPc => linspace(1.0, least, n + 1).map(shifted).take(n).collect(),
        };
        if let Some(terminal) = self.terminal {
            let scale = (1.0 - sigmas[n - 1]) / (1.0 - terminal);
            sigmas.iter_mut().for_each(|sigma| *sigma = 1.0 - (1.0 - *sigma) / scale);
        }
        if self.times == Times::UniPc && (sigmas[0] - 1.0).abs() < 1e-6 {
            sigmas[0] -= 1e-6;
        }
        if let Some(spaced) = self.spaced {
            sigmas = spaced.sigmas(sigmas[0], sigmas[n - 1], n)?;
        }
        let whole = self.times != Times::FlowMatch;
        let time = |sigma: &f64| {
            let t = sigma * self.training as f64;
            if whole { t.trunc() } else { t }
        };
        let timesteps: Vec<f64> = sigmas.iter().map(time).collect();
        let levels = sigmas.iter().map(|&sigma| NoiseLevel::from_flow(sigma)).collect::<Result<Vec<_>>>()?;
        steps_at(&timesteps, &levels, NoiseLevel::CLEAN)
    }
}

/// `timestep_spacing` and `steps_offset`.
pub(super) fn spacing(fields: &Fields, default: &str) -> Result<Spacing> {
    let offset = fields.int("steps_offset", 0, 0, 1_000_000)?;
    let words = [
        ("leading", Spacing::Leading { offset }),
        ("linspace", Spacing::Linspace),
        ("trailing", Spacing::Trailing),
    ];
    fields.one_of("timestep_spacing", default, &words)
}

/// `use_karras_sigmas` and `use_exponential_sigmas`, of which one at most.
pub(super) fn sigma_spacing(fields: &Fields) -> Result<Option<SigmaSpacing>> {
    fields.refuse("use_beta_sigmas", "use_karras_sigmas, use_exponential_sigmas, or none")?;
    fields.refuse("use_lu_lambdas", "use_karras_sigmas, use_exponential_sigmas, or none")?;
    match (fields.bool("use_karras_sigmas", false)?, fields.bool("use_exponential_sigmas", false)?) {
        (true, true) => Err(fields.error("use_exponential_sigmas", "false beside use_karras_sigmas", "true")),
        (true, false) => Ok(Some(SigmaSpacing::Karras { rho: 7.0 })),
        (false, true) => Ok(Some(SigmaSpacing::Exponential)),
        (false, false) => Ok(None),
    }
}
