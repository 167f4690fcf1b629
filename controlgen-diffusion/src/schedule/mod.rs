//! Noise schedules in f64, and the steps that samplers take through them.

mod flow;
mod sigmas;
mod spacing;

pub use flow::flow_sigmas;
pub use sigmas::SigmaSpacing;
pub use spacing::Spacing;

use controlgen_core::guidance::Step;
use controlgen_core::{Error, NoiseLevel, Result};

/// `alphas_cumprod`: ᾱ_t = Π (1 − β_s) over s ≤ t, for timesteps 0 .. T of training. Ho et al., "Denoising Diffusion
/// Probabilistic Models" (2020). Computed in f64, and strictly falling.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffusionSchedule {
    alphas_cumprod: Vec<f64>,
}

impl DiffusionSchedule {
    /// A table of ᾱ.
    ///
    /// # Errors
    /// [`Error::Value`] for no entries, or entries that do not fall strictly within 0 < ᾱ < 1 (ᾱ = 0 is allowed at the
    /// end: a schedule that ends in pure noise).
    pub fn new(alphas_cumprod: Vec<f64>) -> Result<Self> {
        let mut before = 1.0;
        for (t, &alpha) in alphas_cumprod.iter().enumerate() {
            let last = t + 1 == alphas_cumprod.len();
            if !(alpha < before && (alpha > 0.0 || (last && alpha == 0.0))) {
                let expected = format!("above 0 and below {before}, as the table falls");
                return Err(Error::value(format!("alphas_cumprod[{t}]"), expected, alpha));
            }
            before = alpha;
        }
        if alphas_cumprod.is_empty() {
            return Err(Error::value("alphas_cumprod", "at least one entry", 0));
        }
        Ok(Self { alphas_cumprod })
    }

    /// From β_t, each above 0 and at most 1.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn from_betas(betas: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut product = 1.0;
        let running = betas.into_iter().map(|beta| {
            product *= 1.0 - beta;
            product
        });
        Self::new(running.collect())
    }

    /// β from `start` to `end` in n equal steps: diffusers' `linear` (Ho et al. 2020: 1e-4, 0.02, 1000).
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= 1,000,000 and β within 0 .. 1.
    pub fn linear(start: f64, end: f64, n: usize) -> Result<Self> {
        Self::from_betas(linspace(start, end, Self::length(n)?))
    }

    /// √β from √`start` to √`end` in n equal steps: diffusers' `scaled_linear` (Rombach et al. 2022: 0.00085, 0.012,
    /// 1000).
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= 1,000,000 and β within 0 .. 1.
    pub fn scaled_linear(start: f64, end: f64, n: usize) -> Result<Self> {
        Self::from_betas(linspace(start.sqrt(), end.sqrt(), Self::length(n)?).map(|root| root * root))
    }

    /// β_t = min(1 − f(t + 1) / f(t), 0.999) with f(t) = cos²(π/2 · (t/T + 0.008) / 1.008): diffusers'
    /// `squaredcos_cap_v2` (Nichol & Dhariwal 2021, eq. 17).
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= 1,000,000.
    pub fn cosine(n: usize) -> Result<Self> {
        let f = |t: usize| {
            let u = (t as f64 / n as f64 + 0.008) / 1.008;
            (u * std::f64::consts::FRAC_PI_2).cos().powi(2)
        };
        Self::from_betas((0..Self::length(n)?).map(|t| (1.0 - f(t + 1) / f(t)).min(0.999)))
    }

    /// β from `start` to `end` along σ(−6) .. σ(6): diffusers' `sigmoid` (of GeoDiff, Xu et al. 2022).
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= 1,000,000 and β within 0 .. 1.
    pub fn sigmoid(start: f64, end: f64, n: usize) -> Result<Self> {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        Self::from_betas(linspace(-6.0, 6.0, Self::length(n)?).map(|x| sigmoid(x) * (end - start) + start))
    }

    /// β_t = min(1 − e^(−12 / T), 0.999), the same for all t: diffusers' `exp`.
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= 1,000,000.
    pub fn exponential(n: usize) -> Result<Self> {
        let beta = (-(-12.0 / n as f64).exp_m1()).min(0.999);
        Self::from_betas(std::iter::repeat_n(beta, Self::length(n)?))
    }

    /// The same schedule, shifted and scaled in √ᾱ so that it ends in pure noise: ᾱ_T = 0, ᾱ_1 as it was. Lin et al.,
    /// "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), algorithm 1. At the end only the v and
    /// x₀ parameterisations say what x₀ is.
    ///
    /// # Errors
    /// [`Error::Value`] for a table of one entry.
    pub fn zero_terminal_snr(&self) -> Result<Self> {
        let roots: Vec<f64> = self.alphas_cumprod.iter().map(|alpha| alpha.sqrt()).collect();
        let (first, last) = (roots[0], roots[roots.len() - 1]);
        if roots.len() < 2 {
            return Err(Error::value("timesteps of a schedule to rescale", ">= 2", roots.len()));
        }
        Self::new(roots.iter().map(|root| ((root - last) * first / (first - last)).powi(2)).collect())
    }

    /// The same schedule with another ᾱ at the end, which may be more than the one before: what diffusers does to a
    /// schedule that ended in pure noise. Samplers refuse steps along which noise grows.
    pub(crate) fn ending_in(mut self, alpha_bar: f64) -> Self {
        self.alphas_cumprod.pop();
        self.alphas_cumprod.push(alpha_bar);
        self
    }

    /// T of a table that is to be computed.
    fn length(n: usize) -> Result<usize> {
        const MOST: usize = 1_000_000;
        if n <= MOST { Ok(n) } else { Err(Error::value("training timesteps", format!("1 ..= {MOST}"), n)) }
    }

    /// ᾱ of every timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// The level of a timestep, which is a whole number.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is not in 0 .. T.
    pub fn level(&self, timestep: f64) -> Result<NoiseLevel> {
        let found =
            self.alphas_cumprod.get(timestep as usize).filter(|_| timestep >= 0.0 && timestep.fract() == 0.0);
        let Some(&alpha_bar) = found else {
            let expected = format!("a whole number in 0 .. {}", self.alphas_cumprod.len());
            return Err(Error::value("timestep", expected, timestep));
        };
        NoiseLevel::from_alpha_bar(alpha_bar)
    }

    /// σ/α = √((1 − ᾱ) / ᾱ) of every timestep, the sigma of Karras et al. 2022: rising.
    pub fn sigmas(&self) -> Vec<f64> {
        self.alphas_cumprod.iter().map(|alpha| ((1.0 - alpha) / alpha).sqrt()).collect()
    }

    /// The level of a timestep that need not be whole: σ/α is interpolated between whole ones.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is not in 0 ..= T − 1.
    pub fn level_between(&self, timestep: f64) -> Result<NoiseLevel> {
        let last = self.alphas_cumprod.len() - 1;
        if !(0.0..=last as f64).contains(&timestep) {
            return Err(Error::value("timestep", format!("0 ..= {last}"), timestep));
        }
        let (low, part) = (timestep as usize, timestep.fract());
        let sigma = |t: usize| {
            let alpha = self.alphas_cumprod[t];
            ((1.0 - alpha) / alpha).sqrt()
        };
        if part == 0.0 {
            self.level(timestep)
        } else {
            from_ratio(sigma(low) + part * (sigma(low + 1) - sigma(low)))
        }
    }

    /// The timestep of this σ/α: ln σ/α is interpolated between whole timesteps; at the ends it stays.
    pub fn timestep_of(&self, sigma: f64) -> f64 {
        let log = |t: usize| {
            let alpha = self.alphas_cumprod[t];
            0.5 * ((1.0 - alpha) / alpha).ln()
        };
        let (wanted, all) = (sigma.max(1e-10).ln(), self.alphas_cumprod.len());
        let (mut low, mut high) = (0, all - 1);
        while high > low + 1 {
            let middle = low.midpoint(high);
            if log(middle) <= wanted { low = middle } else { high = middle }
        }
        if low == high {
            return low as f64;
        }
        low as f64 + ((wanted - log(low)) / (log(high) - log(low))).clamp(0.0, 1.0)
    }

    /// n timesteps, from the noisiest.
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= T, or for an offset with which they leave 0 .. T.
    pub fn timesteps(&self, n: usize, spacing: Spacing) -> Result<Vec<f64>> {
        self.within(spacing.timesteps(n, self.alphas_cumprod.len())?)
    }

    /// n timesteps for a solver of several steps: where [`Self::timesteps`] would have the first timesteps of training
    /// among them (leading, linspace), n of n + 1, without the last.
    ///
    /// # Errors
    /// Those of [`Self::timesteps`], with n below T.
    pub fn solver_timesteps(&self, n: usize, spacing: Spacing) -> Result<Vec<f64>> {
        self.within(spacing.solver_timesteps(n, self.alphas_cumprod.len(), self.alphas_cumprod.len())?)
    }

    fn within(&self, timesteps: Vec<f64>) -> Result<Vec<f64>> {
        let all = self.alphas_cumprod.len();
        if let Some(t) = timesteps.iter().find(|&&t| t < 0.0 || t > (all - 1) as f64) {
            return Err(Error::value("timesteps with their offset", format!("0 .. {all}"), t));
        }
        Ok(timesteps)
    }

    /// The steps through these timesteps, the last of which ends without noise (diffusers' `set_alpha_to_one`).
    ///
    /// # Errors
    /// [`Error::Value`] for no timesteps, or one that is not in 0 .. T.
    pub fn steps(&self, timesteps: &[f64]) -> Result<Vec<Step>> {
        steps(timesteps, |t| self.level(t), NoiseLevel::CLEAN)
    }
}

/// The steps through timesteps of any model, from the level of one to that of the next, and at the end to `last`.
///
/// # Errors
/// [`Error::Value`] for no timesteps; `level`'s.
pub fn steps(
    timesteps: &[f64],
    level: impl Fn(f64) -> Result<NoiseLevel>,
    last: NoiseLevel,
) -> Result<Vec<Step>> {
    let levels = timesteps.iter().map(|&t| level(t)).collect::<Result<Vec<_>>>()?;
    steps_at(timesteps, &levels, last)
}

/// The steps through these levels of noise, one a timestep, and at the end to `last`.
///
/// # Errors
/// [`Error::Value`] for no timesteps, or another number of levels.
pub fn steps_at(timesteps: &[f64], levels: &[NoiseLevel], last: NoiseLevel) -> Result<Vec<Step>> {
    if timesteps.is_empty() {
        return Err(Error::value("timesteps", "at least one", 0));
    }
    if levels.len() != timesteps.len() {
        return Err(Error::value("levels of noise", timesteps.len(), levels.len()));
    }
    let next = levels.iter().skip(1).copied().chain([last]);
    let step =
        |(index, ((&timestep, &level), next))| Step { index, of: timesteps.len(), timestep, level, next };
    Ok(timesteps.iter().zip(levels).zip(next).enumerate().map(step).collect())
}

/// The last steps of a run, for a sample that is there already (img2img; Meng et al., "SDEdit", 2021): of n steps
/// min(⌊n · strength⌋, n). The sample is noised to the first one's level. Steps keep their numbers.
///
/// # Errors
/// [`Error::Value`] unless `strength` is in 0 ..= 1 and leaves a step.
pub fn from_strength(steps: &[Step], strength: f64) -> Result<&[Step]> {
    if !(0.0..=1.0).contains(&strength) {
        return Err(Error::value("strength", "0 ..= 1", strength));
    }
    let kept = ((steps.len() as f64 * strength) as usize).min(steps.len());
    if kept == 0 {
        let expected = format!(">= {}, for one of {} steps", 1.0 / steps.len() as f64, steps.len());
        return Err(Error::value("strength", expected, strength));
    }
    Ok(&steps[steps.len() - kept..])
}

/// The level of α² + σ² = 1 with this σ/α.
pub(crate) fn from_ratio(sigma: f64) -> Result<NoiseLevel> {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    NoiseLevel::new(alpha, sigma * alpha)
}

/// n numbers from `start` to `end`, both included.
pub(crate) fn linspace(start: f64, end: f64, n: usize) -> impl DoubleEndedIterator<Item = f64> {
    let last = n.saturating_sub(1);
    let step = (end - start) / last.max(1) as f64;
    (0..n).map(move |i| if i == last && i > 0 { end } else { start + step * i as f64 })
}
