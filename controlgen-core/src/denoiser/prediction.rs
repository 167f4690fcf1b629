//! What denoisers predict, and one form from another.

use tch::{Kind, Tensor};

use super::NoiseLevel;
use crate::{Error, Result};

/// What the output of a denoiser stands for, x = α x₀ + σ ε being given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Parameterisation {
    /// ε, the noise (Ho et al. 2020): diffusers' `epsilon`.
    Epsilon,
    /// x₀, the clean sample: diffusers' `sample`.
    Sample,
    /// v = α ε − σ x₀ (Salimans & Ho 2022): diffusers' `v_prediction`.
    V,
    /// u = ε − x₀, the velocity of rectified flow (Liu et al. 2022; Lipman et al. 2022).
    Velocity,
}

impl Parameterisation {
    /// The name in the field.
    pub fn name(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::Sample => "sample",
            Self::V => "v_prediction",
            Self::Velocity => "velocity",
        }
    }

    /// a and b of what is predicted, p = a x₀ + b ε, where x = α x₀ + σ ε.
    pub fn coefficients(self, level: NoiseLevel) -> (f64, f64) {
        match self {
            Self::Epsilon => (0.0, 1.0),
            Self::Sample => (1.0, 0.0),
            Self::V => (-level.sigma(), level.alpha()),
            Self::Velocity => (-1.0, 1.0),
        }
    }
}

/// The output of a denoiser: it knows what it stands for.
///
/// For a given x all forms are affine functions of each other. Hence a combination of predictions whose factors sum
/// to 1, which is what linear guidance is, means the same in every form ([`Prediction::combine`]).
pub struct Prediction {
    /// The prediction, of the shape of x.
    pub value: Tensor,
    /// What it stands for.
    pub parameterisation: Parameterisation,
    /// Where the variance is learned: v of the shape of x, which interpolates its logarithm
    /// ([`Prediction::log_variance`]).
    pub variance: Option<Tensor>,
}

impl Prediction {
    /// A prediction without a variance.
    pub fn new(value: Tensor, parameterisation: Parameterisation) -> Self {
        Self { value, parameterisation, variance: None }
    }

    /// A model's output `[B, 2 C, ..]` of which the second half of the channels is the variance.
    ///
    /// # Errors
    /// [`Error::Shape`] where the channels are not `2 · channels`.
    pub fn with_variance(output: &Tensor, channels: i64, parameterisation: Parameterisation) -> Result<Self> {
        if output.size().get(1) != Some(&(2 * channels)) {
            let expected = format!("[B, {}, ..]", 2 * channels);
            return Err(Error::shape("output with learned variance", expected, &output.size()));
        }
        let value = output.f_narrow(1, 0, channels)?;
        Ok(Self { value, parameterisation, variance: Some(output.f_narrow(1, channels, channels)?) })
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            value: self.value.shallow_clone(),
            parameterisation: self.parameterisation,
            variance: self.variance.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// ε, for the x that this is a prediction of.
    ///
    /// # Errors
    /// [`Error::Value`] where ε is not determined at this level (x₀ predicted where there is no noise);
    /// [`Error::Shape`] where x has another shape.
    pub fn epsilon(&self, x: &Tensor, level: NoiseLevel) -> Result<Tensor> {
        self.form(x, level, Parameterisation::Epsilon)
    }

    /// x₀, for the x that this is a prediction of.
    ///
    /// # Errors
    /// [`Error::Value`] where x₀ is not determined at this level (ε predicted where there is only noise);
    /// [`Error::Shape`] where x has another shape.
    pub fn x0(&self, x: &Tensor, level: NoiseLevel) -> Result<Tensor> {
        self.form(x, level, Parameterisation::Sample)
    }

    /// The same prediction in another form; the variance goes along.
    ///
    /// # Errors
    /// [`Error::Value`] where that form is not determined at this level; [`Error::Shape`] where x has another shape.
    pub fn convert(&self, x: &Tensor, level: NoiseLevel, to: Parameterisation) -> Result<Self> {
        let value = self.form(x, level, to)?;
        Ok(Self { value, parameterisation: to, variance: self.variance.as_ref().map(Tensor::shallow_clone) })
    }

    fn form(&self, x: &Tensor, level: NoiseLevel, to: Parameterisation) -> Result<Tensor> {
        if to == self.parameterisation {
            self.check_sample(x)?;
            return Ok(self.value.shallow_clone());
        }
        let (clean, noise) = to.coefficients(level);
        self.blend(x, level, clean, noise, to.name())
    }

    /// `clean` · x₀ + `noise` · ε, for the x that this is a prediction of, in two products whatever the model predicts:
    /// with α' and σ' of another level it is x there, which is the step of most solvers.
    ///
    /// # Errors
    /// [`Error::Value`] where x₀ and ε are not both determined at this level; [`Error::Shape`] where x has another
    /// shape.
    pub fn mix(&self, x: &Tensor, level: NoiseLevel, clean: f64, noise: f64) -> Result<Tensor> {
        self.blend(x, level, clean, noise, "both sample and epsilon")
    }

    /// With x = α x₀ + σ ε and the prediction p = a x₀ + b ε, the form q = c x₀ + d ε is
    /// ((c b − d a) x + (α d − σ c) p) / (α b − σ a). Errors call it `name`.
    fn blend(&self, x: &Tensor, level: NoiseLevel, c: f64, d: f64, name: &str) -> Result<Tensor> {
        self.check_sample(x)?;
        let (alpha, sigma) = (level.alpha(), level.sigma());
        let (a, b) = self.parameterisation.coefficients(level);
        let determinant = alpha * b - sigma * a;
        if determinant == 0.0 {
            let what = format!("the noise at which {} gives {name}", self.parameterisation.name());
            let expected = if sigma == 0.0 { "sigma > 0" } else { "alpha > 0" };
            return Err(Error::value(what, expected, format!("alpha {alpha}, sigma {sigma}")));
        }
        let of_x = x.f_mul_scalar((c * b - d * a) / determinant)?;
        Ok(of_x.f_add(&self.value.f_mul_scalar((alpha * d - sigma * c) / determinant)?)?)
    }

    fn check_sample(&self, x: &Tensor) -> Result<()> {
        if x.size() != self.value.size() {
            let expected = format!("{:?}", self.value.size());
            return Err(Error::shape("the sample of a prediction", expected, &x.size()));
        }
        Ok(())
    }

    /// Σ fᵢ pᵢ, for factors that sum to 1: the same in every form. The variance is that of the first.
    ///
    /// # Errors
    /// [`Error::Value`] for no parts, factors that do not sum to 1 within 1e-6, or parts of different forms;
    /// [`Error::Shape`] for parts of different shapes.
    pub fn combine(parts: &[(f64, &Self)]) -> Result<Self> {
        let Some(((factor, first), rest)) = parts.split_first() else {
            return Err(Error::value("predictions to combine", "at least one", 0));
        };
        let scale = parts.iter().map(|(factor, _)| factor.abs()).fold(1.0, f64::max);
        let sum: f64 = parts.iter().map(|(factor, _)| factor).sum();
        if !sum.is_finite() || (sum - 1.0).abs() > 1e-6 * scale {
            return Err(Error::value("sum of the factors of predictions", "1", sum));
        }
        let mut value = first.value.f_mul_scalar(*factor)?;
        for (factor, part) in rest {
            if part.parameterisation != first.parameterisation {
                let (expected, found) = (first.parameterisation.name(), part.parameterisation.name());
                return Err(Error::value("form of a prediction to combine", expected, found));
            }
            if part.value.size() != first.value.size() {
                let expected = format!("{:?}", first.value.size());
                return Err(Error::shape("a prediction to combine", expected, &part.value.size()));
            }
            value = value.f_add(&part.value.f_mul_scalar(*factor)?)?;
        }
        Ok(Self { value, ..first.handle() })
    }

    /// The logarithm of the variance of a step, between those of β̃ and β: f ln β + (1 − f) ln β̃ with
    /// f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a prediction without a variance; [`Error::Value`] for a logarithm that is no
    /// number.
    pub fn log_variance(&self, ln_beta_tilde: f64, ln_beta: f64) -> Result<Tensor> {
        let Some(v) = &self.variance else {
            return Err(Error::unsupported(
                "the variance of a model that learned none",
                "the schedule's variance",
            ));
        };
        if !ln_beta_tilde.is_finite() || !ln_beta.is_finite() {
            let found = format!("{ln_beta_tilde} and {ln_beta}");
            return Err(Error::value("logarithms of the variances", "finite numbers", found));
        }
        let f = v.f_add_scalar(1.0)?.f_mul_scalar(0.5)?;
        Ok(f.f_mul_scalar(ln_beta - ln_beta_tilde)?.f_add_scalar(ln_beta_tilde)?)
    }

    /// The predictions of `n` equal parts of the batch.
    ///
    /// # Errors
    /// [`Error::Shape`] where the rows do not divide.
    pub(crate) fn chunk(self, n: i64) -> Result<Vec<Self>> {
        let rows = self.value.size().first().copied().unwrap_or(0);
        if n == 1 {
            return Ok(vec![self]);
        }
        if n < 1 || rows % n != 0 {
            return Err(Error::shape("prediction", format!("{n} parts of equal rows"), &self.value.size()));
        }
        let parameterisation = self.parameterisation;
        let mut variances = match &self.variance {
            Some(variance) => variance.f_chunk(n, 0)?.into_iter().map(Some).collect(),
            None => Vec::new(),
        }
        .into_iter();
        let part = |value| Self { value, parameterisation, variance: variances.next().flatten() };
        Ok(self.value.f_chunk(n, 0)?.into_iter().map(part).collect())
    }

    /// The prediction without its graph.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub(crate) fn detach(&self) -> Result<Self> {
        Ok(Self {
            value: self.value.f_detach()?,
            parameterisation: self.parameterisation,
            variance: self.variance.as_ref().map(Tensor::f_detach).transpose()?,
        })
    }

    /// Refuses a prediction that is not of `x`'s shape and element type.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`].
    pub(crate) fn check(&self, x: &Tensor) -> Result<()> {
        for t in std::iter::once(&self.value).chain(&self.variance) {
            if t.size() != x.size() {
                return Err(Error::shape("a denoiser's prediction", format!("{:?}", x.size()), &t.size()));
            }
            let (expected, found): (Kind, Kind) = (x.f_kind()?, t.f_kind()?);
            if expected != found {
                let (expected, found) = (format!("{expected:?}, as the sample"), format!("{found:?}"));
                return Err(Error::Kind { what: "a denoiser's prediction".into(), expected, found });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Parameterisation::{Epsilon, Sample, V, Velocity};
    use tch::kind::DOUBLE_CPU;

    const ALL: [Parameterisation; 4] = [Epsilon, Sample, V, Velocity];

    fn wave(salt: f64) -> Tensor {
        ((Tensor::arange(24, DOUBLE_CPU) * 12.9898 + salt).sin() * 2.0).view([2, 3, 2, 2])
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// x and each form of the prediction, from x₀ and ε by the definitions.
    fn forms(level: NoiseLevel) -> (Tensor, [(Parameterisation, Tensor); 4]) {
        let (x0, eps) = (wave(1.0), wave(5.0));
        let (a, s) = (level.alpha(), level.sigma());
        let x = &x0 * a + &eps * s;
        let (v, u) = (&eps * a - &x0 * s, &eps - &x0);
        (x, [(Epsilon, eps), (Sample, x0), (V, v), (Velocity, u)])
    }

    #[test]
    fn every_form_gives_every_other() {
        let levels = [
            NoiseLevel::from_alpha_bar(0.7).unwrap(),
            NoiseLevel::from_alpha_bar(0.01).unwrap(),
            NoiseLevel::from_flow(0.3).unwrap(),
            NoiseLevel::from_sigma(4.0).unwrap(),
        ];
        for level in levels {
            let (x, forms) = forms(level);
            for (from, value) in &forms {
                let prediction = Prediction::new(value.shallow_clone(), *from);
                for (to, expected) in &forms {
                    let converted = prediction.convert(&x, level, *to).unwrap();
                    assert_eq!(converted.parameterisation, *to);
                    let d = distance(&converted.value, expected);
                    assert!(d < 1e-12, "{} to {} at {level:?}: {d}", from.name(), to.name());
                    let back = converted.convert(&x, level, *from).unwrap();
                    assert!(distance(&back.value, value) < 1e-10);
                }
                let mixed = prediction.mix(&x, level, 0.3, -0.7).unwrap();
                assert!(distance(&mixed, &(&forms[1].1 * 0.3 - &forms[0].1 * 0.7)) < 1e-12);
                assert!(distance(&prediction.epsilon(&x, level).unwrap(), &forms[0].1) < 1e-12);
                assert!(distance(&prediction.x0(&x, level).unwrap(), &forms[1].1) < 1e-12);
            }
        }
    }

    #[test]
    fn at_the_ends_only_what_is_determined_is_given() {
        let noise = NoiseLevel::from_flow(1.0).unwrap();
        let (x, [eps, x0, v, u]) = forms(noise);
        for (from, value) in [v, u] {
            let prediction = Prediction::new(value, from);
            assert!(distance(&prediction.x0(&x, noise).unwrap(), &x0.1) < 1e-12, "{}", from.name());
        }
        let from_eps = Prediction::new(eps.1, Epsilon);
        assert!(matches!(from_eps.x0(&x, noise), Err(Error::Value { .. })));
        let (x, [_, x0, ..]) = forms(NoiseLevel::CLEAN);
        let from_x0 = Prediction::new(x0.1, Sample);
        assert!(matches!(from_x0.epsilon(&x, NoiseLevel::CLEAN), Err(Error::Value { .. })));
        assert!(matches!(from_x0.x0(&x.get(0), NoiseLevel::CLEAN), Err(Error::Shape { .. })));
    }

    #[test]
    fn combining_commutes_with_converting() {
        let level = NoiseLevel::from_alpha_bar(0.4).unwrap();
        let x = wave(9.0);
        let (c, u) = (Prediction::new(wave(1.0), Epsilon), Prediction::new(wave(2.0), Epsilon));
        let expected = &u.value + (&c.value - &u.value) * 7.5;
        for to in ALL {
            let parts = [u.convert(&x, level, to).unwrap(), c.convert(&x, level, to).unwrap()];
            let combined = Prediction::combine(&[(-6.5, &parts[0]), (7.5, &parts[1])]).unwrap();
            assert!(distance(&combined.epsilon(&x, level).unwrap(), &expected) < 1e-10, "{}", to.name());
        }
        assert!(Prediction::combine(&[(0.0, &u), (1.0, &c)]).unwrap().value.equal(&c.value), "to the bit");
    }

    #[test]
    fn what_does_not_combine_is_refused() {
        let c = Prediction::new(wave(1.0), Epsilon);
        let v = Prediction::new(wave(1.0), V);
        let small = Prediction::new(wave(1.0).narrow(0, 0, 1), Epsilon);
        assert!(matches!(Prediction::combine(&[]), Err(Error::Value { .. })));
        assert!(matches!(Prediction::combine(&[(1.0, &c), (1.0, &c)]), Err(Error::Value { .. })));
        assert!(matches!(Prediction::combine(&[(f64::NAN, &c)]), Err(Error::Value { .. })));
        let infinite = [(f64::INFINITY, &c), (f64::NEG_INFINITY, &c)];
        assert!(matches!(Prediction::combine(&infinite), Err(Error::Value { .. })));
        assert!(matches!(Prediction::combine(&[(0.5, &c), (0.5, &v)]), Err(Error::Value { .. })));
        assert!(matches!(Prediction::combine(&[(0.5, &c), (0.5, &small)]), Err(Error::Shape { .. })));
    }

    #[test]
    fn learned_variances_interpolate_logarithms() {
        let v = Tensor::from_slice(&[-1.0, 0.0, 1.0, 0.5]).view([1, 1, 2, 2]);
        let output = Tensor::cat(&[&wave(1.0).narrow(1, 0, 1).narrow(0, 0, 1), &v], 1);
        let prediction = Prediction::with_variance(&output, 1, Epsilon).unwrap();
        assert_eq!(prediction.value.size(), [1, 1, 2, 2]);
        let log: Vec<f64> = prediction.log_variance(-4.0, -2.0).unwrap().view(-1).try_into().unwrap();
        assert_eq!(log, [-4.0, -3.0, -2.0, -2.5]);
        assert!(matches!(Prediction::with_variance(&output, 2, Epsilon), Err(Error::Shape { .. })));
        assert!(matches!(prediction.log_variance(f64::NEG_INFINITY, 0.0), Err(Error::Value { .. })));
        assert!(Prediction::new(v, Epsilon).log_variance(-1.0, 0.0).is_err());
    }

    #[test]
    fn chunks_take_their_variances_along() {
        let output = wave(3.0); // (2, 3, 2, 2)
        let prediction =
            Prediction { value: output.shallow_clone(), parameterisation: V, variance: Some(&output * 2.0) };
        let parts = prediction.handle().chunk(2).unwrap();
        assert_eq!(parts.len(), 2);
        assert!(parts[1].value.equal(&output.narrow(0, 1, 1)));
        assert!(parts[1].variance.as_ref().unwrap().equal(&(output.narrow(0, 1, 1) * 2.0)));
        assert!(matches!(prediction.chunk(3), Err(Error::Shape { .. })));
    }
}
