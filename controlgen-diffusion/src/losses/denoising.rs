//! The loss of denoisers.

use controlgen_core::noise::Stream;
use controlgen_core::{Denoiser, Error, NoiseLevel, Parameterisation, Pass, Prediction, Prepared, Result};
use tch::{Kind, Tensor};

use crate::DiffusionSchedule;

/// Which timesteps a model is trained at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Timesteps {
    /// All alike (Ho et al. 2020).
    Uniform,
    /// t = T s u / (1 + (s − 1) u), u uniform: with s > 1 more of the noisy ones, where it is decided what a picture is of
    /// (the shift of Esser et al. 2024, eq. 23).
    Shifted(f64),
}

/// What the squared error of a timestep counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighting {
    /// 1, for whatever the model predicts (the simple loss of Ho et al. 2020).
    Simple,
    /// min(SNR, γ) for the error of x₀, SNR = α² / σ²; so for ε min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1) (Hang et al.
    /// 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"; γ = 5 there).
    MinSnr(f64),
}

impl Weighting {
    /// The weight of the squared error of a prediction at a level.
    fn at(self, parameterisation: Parameterisation, level: NoiseLevel) -> f64 {
        let Self::MinSnr(gamma) = self else { return 1.0 };
        let (alpha, sigma) = (level.alpha(), level.sigma());
        let (a, b) = parameterisation.coefficients(level);
        // The error of x₀ is that of the prediction times σ / (α b − σ a).
        let factor = (sigma / (alpha * b - sigma * a)).powi(2);
        if factor.is_finite() { (alpha / sigma).powi(2).min(gamma) * factor } else { 1.0 }
    }
}

/// A batch with noise.
pub struct NoisedBatch {
    /// x_t = α_t x₀ + σ_t ε, `[B, C, H, W]`.
    pub x: Tensor,
    /// t, f32 `[B]`, as denoisers want it.
    pub t: Tensor,
    /// x₀.
    pub clean: Tensor,
    /// ε.
    pub noise: Tensor,
    timesteps: Vec<usize>,
    levels: Vec<NoiseLevel>,
}

impl NoisedBatch {
    /// What a model of this parameterisation should predict.
    ///
    /// # Errors
    /// LibTorch's.
    pub fn target(&self, parameterisation: Parameterisation) -> Result<Tensor> {
        let of = |level: &NoiseLevel| parameterisation.coefficients(*level);
        let clean = self.clean.f_mul(&column(self.levels.iter().map(|level| of(level).0), &self.clean)?)?;
        let noise = self.noise.f_mul(&column(self.levels.iter().map(|level| of(level).1), &self.clean)?)?;
        Ok(clean.f_add(&noise)?)
    }

    /// The timestep of each row.
    pub fn timesteps(&self) -> &[usize] {
        &self.timesteps
    }
}

/// The training of a denoiser: noise of random levels is added, and the squared error of what is predicted is the loss (Ho et
/// al. 2020, eq. 14; weighted as in Hang et al. 2023, eq. 8).
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::noise::Noise;
/// use controlgen_core::testing::{Component, Mixture, MixtureDenoiser};
/// use controlgen_core::{Condition, Denoiser, Parameterisation, Pass};
/// use controlgen_diffusion::DiffusionSchedule;
/// use controlgen_diffusion::losses::{Denoising, Timesteps, Weighting};
/// use tch::{Tensor, kind::FLOAT_CPU};
///
/// let schedule = DiffusionSchedule::cosine(1000)?;
/// let levels = schedule.clone();
/// let part = Component { mean: vec![0.0], deviation: 1.0, weight: 1.0, class: 0 };
/// let data = Mixture::new([1, 1, 1], vec![part])?;
/// let model = MixtureDenoiser::new(data, Parameterisation::V, move |t| levels.level(t))?;
///
/// let training = Denoising::new(schedule, Timesteps::Shifted(2.0), Weighting::MinSnr(5.0))?;
/// let x = Tensor::f_randn([64, 1, 1, 1], FLOAT_CPU)?;
/// let batch = training.noised(&x, &mut Noise::seeded(0).stream(0))?;
/// let pass = Pass::default();
/// let conditions: Vec<Condition> = (0..64).map(|_| Condition::Null).collect();
/// let prepared = model.prepare(&conditions, &pass)?;
/// let loss = training.loss(&model, &batch, &prepared, &pass)?; // [64]
/// # assert_eq!(loss.size(), [64]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Denoising {
    schedule: DiffusionSchedule,
    timesteps: Timesteps,
    weighting: Weighting,
}

impl Denoising {
    /// Training over all timesteps of a schedule.
    ///
    /// # Errors
    /// [`Error::Value`] for a shift or a γ that is not above 0.
    pub fn new(schedule: DiffusionSchedule, timesteps: Timesteps, weighting: Weighting) -> Result<Self> {
        let positive = |what: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(Error::value(what, "a number > 0", value))
        };
        if let Timesteps::Shifted(shift) = timesteps {
            positive("the shift of timesteps", shift)?;
        }
        if let Weighting::MinSnr(gamma) = weighting {
            positive("min-SNR's gamma", gamma)?;
        }
        Ok(Self { schedule, timesteps, weighting })
    }

    /// The schedule.
    pub fn schedule(&self) -> &DiffusionSchedule {
        &self.schedule
    }

    /// Which timesteps are drawn.
    pub fn timesteps(&self) -> Timesteps {
        self.timesteps
    }

    /// What their errors count.
    pub fn weighting(&self) -> Weighting {
        self.weighting
    }

    fn timestep(&self, u: f64) -> usize {
        let all = self.schedule.alphas_cumprod().len();
        let u = match self.timesteps {
            Timesteps::Uniform => u,
            Timesteps::Shifted(shift) => shift * u / (1.0 + (shift - 1.0) * u),
        };
        ((u * all as f64) as usize).min(all - 1)
    }

    /// Clean samples `[B, C, H, W]` with noise, each at a timestep of its own. Timesteps are drawn before the noise; all comes
    /// from `stream`. Timesteps are stratified: row i of B draws u from i/B .. (i + 1)/B, in random order, which leaves each
    /// one's distribution as it is and lowers the variance of the mean (Kingma et al. 2021, I.1).
    ///
    /// # Errors
    /// [`Error::Shape`] for samples of another form.
    pub fn noised(&self, clean: &Tensor, stream: &mut Stream) -> Result<NoisedBatch> {
        let (b, _, _, _) = clean.size4()?;
        let rows = usize::try_from(b).unwrap_or(0);
        let mut timesteps: Vec<usize> =
            (0..rows).map(|row| self.timestep((row as f64 + stream.uniform()) / rows as f64)).collect();
        stream.shuffle(&mut timesteps);
        self.noised_at(clean, timesteps, stream)
    }

    /// The same at given timesteps, one a row.
    ///
    /// # Errors
    /// [`Error::Shape`] for samples of another form; [`Error::Value`] for timesteps that are not as many, or beyond the
    /// schedule.
    pub fn noised_at(
        &self,
        clean: &Tensor,
        timesteps: Vec<usize>,
        stream: &mut Stream,
    ) -> Result<NoisedBatch> {
        let sizes = clean.size();
        let &[b, _, _, _] = sizes.as_slice() else {
            return Err(Error::shape("clean samples", "[B, C, H, W]", &sizes));
        };
        if i64::try_from(timesteps.len()) != Ok(b) {
            return Err(Error::value("timesteps", format!("{b}, one a row"), timesteps.len()));
        }
        let levels = timesteps.iter().map(|&t| self.schedule.level(t as f64)).collect::<Result<Vec<_>>>()?;
        let alpha = column(levels.iter().map(|level| level.alpha()), clean)?;
        let sigma = column(levels.iter().map(|level| level.sigma()), clean)?;
        let noise = stream.normal(&sizes, clean.f_kind()?, clean.device())?;
        let x = clean.f_mul(&alpha)?.f_add(&noise.f_mul(&sigma)?)?;
        let t: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        let t = Tensor::f_from_slice(&t)?.f_to_device(clean.device())?;
        Ok(NoisedBatch { x, t, clean: clean.shallow_clone(), noise, timesteps, levels })
    }

    /// The weighted mean squared error of each row, `[B]` f32, in the graph.
    ///
    /// # Errors
    /// The denoiser's; [`Error::Unsupported`] for one that learns its variance, whose training has a term of its own.
    pub fn loss(
        &self,
        denoiser: &dyn Denoiser,
        batch: &NoisedBatch,
        prepared: &Prepared,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        self.loss_of(&denoiser.predict(&batch.x, &batch.t, prepared, pass)?, batch)
    }

    /// The same of a prediction.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn loss_of(&self, prediction: &Prediction, batch: &NoisedBatch) -> Result<Tensor> {
        if prediction.variance.is_some() {
            return Err(Error::unsupported("training of a learned variance", "models without one"));
        }
        let form = prediction.parameterisation;
        let error = prediction.value.f_to_kind(Kind::Float)?.f_sub(&batch.target(form)?)?.f_square()?;
        let loss = error.f_mean_dim(&[1i64, 2, 3][..], false, Kind::Float)?; // (B,)
        if self.weighting == Weighting::Simple {
            return Ok(loss);
        }
        let weights: Vec<f32> =
            batch.levels.iter().map(|&level| self.weighting.at(form, level) as f32).collect();
        let weights = Tensor::f_from_slice(&weights)?.f_to_device(loss.device())?;
        Ok(loss.f_mul(&weights)?)
    }
}

/// Numbers of the rows of `like`, `[B, 1, 1, 1]`, of its element type and where it lies.
fn column(values: impl Iterator<Item = f64>, like: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = values.collect();
    let values = Tensor::f_from_slice(&values)?.f_to_kind(like.f_kind()?)?.f_to_device(like.device())?;
    Ok(values.f_view([-1, 1, 1, 1])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use controlgen_core::noise::Noise;
    use tch::kind::FLOAT_CPU;

    fn training(timesteps: Timesteps, weighting: Weighting) -> Denoising {
        Denoising::new(DiffusionSchedule::cosine(1000).unwrap(), timesteps, weighting).unwrap()
    }

    #[test]
    fn the_weighted_error_is_that_of_x0_in_every_form() {
        let training = training(Timesteps::Uniform, Weighting::MinSnr(5.0));
        let clean = Tensor::randn([6, 1, 2, 2], FLOAT_CPU);
        let timesteps = vec![10, 200, 400, 600, 800, 950];
        let mut stream = Noise::seeded(1).stream(0);
        let batch = training.noised_at(&clean, timesteps.clone(), &mut stream).unwrap();
        let guess = Tensor::randn([6, 1, 2, 2], FLOAT_CPU);
        let all: Vec<Vec<f64>> = [Parameterisation::Epsilon, Parameterisation::Sample, Parameterisation::V]
            .map(|form| {
                // The same guess of x₀ in every form.
                let rows: Vec<Tensor> = (0i64..)
                    .zip(&timesteps)
                    .map(|(row, &t)| {
                        let level = training.schedule().level(t as f64).unwrap();
                        let of = Prediction::new(guess.narrow(0, row, 1), Parameterisation::Sample);
                        of.convert(&batch.x.narrow(0, row, 1), level, form).unwrap().value
                    })
                    .collect();
                let prediction = Prediction::new(Tensor::cat(&rows, 0), form);
                Vec::try_from(training.loss_of(&prediction, &batch).unwrap().to_kind(Kind::Double)).unwrap()
            })
            .into();
        for (row, &t) in timesteps.iter().enumerate() {
            let level: NoiseLevel = training.schedule().level(t as f64).unwrap();
            let row_of = |x: &Tensor| x.get(i64::try_from(row).unwrap());
            let error = (row_of(&guess) - row_of(&clean)).square().mean(Kind::Double).double_value(&[]);
            let expected = error * level.log_snr().exp().min(5.0);
            for form in &all {
                assert!(
                    (form[row] - expected).abs() < 2e-4 * (1.0 + expected),
                    "{row}: {} {expected}",
                    form[row]
                );
            }
        }
    }

    #[test]
    fn a_right_prediction_costs_nothing() {
        let training = training(Timesteps::Shifted(3.0), Weighting::Simple);
        let clean = Tensor::randn([8, 3, 4, 4], FLOAT_CPU);
        let batch = training.noised(&clean, &mut Noise::seeded(2).stream(0)).unwrap();
        for form in [
            Parameterisation::Epsilon,
            Parameterisation::Sample,
            Parameterisation::V,
            Parameterisation::Velocity,
        ] {
            let target = batch.target(form).unwrap();
            let right = Prediction::new(target.shallow_clone(), form);
            assert!(training.loss_of(&right, &batch).unwrap().abs().max().double_value(&[]) == 0.0);
            let wrong = Prediction::new(target + 2.0, form);
            let loss = training.loss_of(&wrong, &batch).unwrap();
            assert!((loss - 4.0).abs().max().double_value(&[]) < 1e-4);
        }
    }

    #[test]
    fn timesteps_follow_their_distribution() {
        let mean = |timesteps| {
            let training = training(timesteps, Weighting::Simple);
            let clean = Tensor::zeros([4000, 1, 1, 1], FLOAT_CPU);
            let batch = training.noised(&clean, &mut Noise::seeded(0).stream(0)).unwrap();
            batch.timesteps().iter().sum::<usize>() as f64 / 4000.0
        };
        assert!((mean(Timesteps::Uniform) - 499.5).abs() < 1.0);
        // ∫ s u / (1 + (s − 1) u) du = s / (s − 1) · (1 − ln s / (s − 1))
        let expected = 1.5 * (1.0 - 3f64.ln() / 2.0);
        assert!((mean(Timesteps::Shifted(3.0)) / 1000.0 - expected).abs() < 2e-3);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let schedule = || DiffusionSchedule::cosine(1000).unwrap();
        assert!(Denoising::new(schedule(), Timesteps::Shifted(0.0), Weighting::Simple).is_err());
        assert!(Denoising::new(schedule(), Timesteps::Uniform, Weighting::MinSnr(f64::NAN)).is_err());
        let training = training(Timesteps::Uniform, Weighting::Simple);
        let mut stream = Noise::seeded(0).stream(0);
        assert!(training.noised(&Tensor::zeros([2, 3], FLOAT_CPU), &mut stream).is_err());
        let clean = Tensor::zeros([2, 1, 1, 1], FLOAT_CPU);
        assert!(training.noised_at(&clean, vec![3], &mut stream).is_err());
        assert!(training.noised_at(&clean, vec![3, 1000], &mut stream).is_err());
        let batch = training.noised(&clean, &mut stream).unwrap();
        let mut prediction = Prediction::new(clean.shallow_clone(), Parameterisation::V);
        prediction.variance = Some(clean);
        assert!(matches!(training.loss_of(&prediction, &batch), Err(Error::Unsupported { .. })));
    }
}
