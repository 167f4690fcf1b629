//! Noise schedules in f64, and the steps that samplers take through them.

use controlgen_core::guidance::Step;
use controlgen_core::{Error, NoiseLevel, Result};

/// `alphas_cumprod`: ᾱ_t = Π (1 − β_s) over s ≤ t, for timesteps 0 .. T of training. Ho et al., "Denoising Diffusion
/// Probabilistic Models" (2020). Computed in f64, and strictly falling.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffusionSchedule {
    alphas_cumprod: Vec<f64>,
}

/// Which of the T timesteps a sampler visits: diffusers' `timestep_spacing`; table 2 of Lin et al., "Common Diffusion
/// Noise Schedules and Sample Steps are Flawed" (2023).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// 0, k, 2 k, .., with k = T div n, and all of them `offset` later: the last timestep is not among them.
    Leading {
        /// diffusers' `steps_offset`: 0, or 1 for Stable Diffusion.
        offset: i64,
    },
    /// From 0 to T − 1, both included.
    Linspace,
    /// T − 1, T − 1 − T / n, ..: the last timestep is among them, the first is not.
    Trailing,
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

    /// n timesteps, from the noisiest.
    ///
    /// # Errors
    /// [`Error::Value`] unless n is in 1 ..= T, or for an offset with which they leave 0 .. T.
    pub fn timesteps(&self, n: usize, spacing: Spacing) -> Result<Vec<f64>> {
        let all = self.alphas_cumprod.len();
        if n == 0 || n > all {
            return Err(Error::value("number of steps", format!("1 ..= {all}"), n));
        }
        let of = |i: usize| match spacing {
            Spacing::Leading { offset } => (i * all.div_euclid(n)) as f64 + offset as f64,
            Spacing::Linspace if n == 1 => 0.0,
            Spacing::Linspace => (i as f64 * (all - 1) as f64 / (n - 1) as f64).round_ties_even(),
            Spacing::Trailing => {
                (all as f64 - (n - 1 - i) as f64 * all as f64 / n as f64).round_ties_even() - 1.0
            }
        };
        let timesteps: Vec<f64> = (0..n).rev().map(of).collect();
        if let Some(t) = timesteps.iter().find(|&&t| t < 0.0 || t >= all as f64) {
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
    if timesteps.is_empty() {
        return Err(Error::value("timesteps", "at least one", 0));
    }
    let levels = timesteps.iter().map(|&t| level(t)).collect::<Result<Vec<_>>>()?;
    let next = levels.iter().skip(1).copied().chain([last]);
    let step =
        |(index, ((&timestep, &level), next))| Step { index, of: timesteps.len(), timestep, level, next };
    Ok(timesteps.iter().zip(&levels).zip(next).enumerate().map(step).collect())
}

/// n numbers from `start` to `end`, both included.
fn linspace(start: f64, end: f64, n: usize) -> impl Iterator<Item = f64> {
    let last = n.saturating_sub(1).max(1) as f64;
    (0..n).map(move |i| start + (end - start) * i as f64 / last)
}
