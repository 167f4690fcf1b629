//! A mixture of Gaussians: data of which everything that diffusion asks is known in closed form.

mod samples;
#[cfg(test)]
mod tests;

use tch::{Device, Kind, Tensor};

use crate::energy::{Energy, EnergyFn, Image, Noised};
use crate::{Error, NoiseLevel, Result, SharedTensor};

/// One Gaussian of a [`Mixture`].
#[derive(Clone, Debug, PartialEq)]
pub struct Component {
    /// μ, row-major over `[C, H, W]`.
    pub mean: Vec<f64>,
    /// s > 0, the same in every direction.
    pub deviation: f64,
    /// w > 0; weights are normalised over the mixture.
    pub weight: f64,
    /// y, from 0. A class may have several components.
    pub class: i64,
}

/// p(x₀) = Σ wₖ N(x₀; μₖ, sₖ² 1) over `[C, H, W]`, each component of a class.
///
/// With noise it stays a mixture: x_t = α x₀ + σ ε has p(x_t) = Σ wₖ N(x_t; α μₖ, vₖ 1) with vₖ = α² sₖ² + σ². Hence
/// its score, the best denoiser, and the probabilities of components and classes are known at every level, all
/// computed in f64 and differentiable in x. Rows are independent; x is `[B, C, H, W]` of any floating-point type.
#[derive(Clone)]
pub struct Mixture {
    shape: [i64; 3],
    components: Vec<Component>,
    /// μ, `[K, D]`
    means: SharedTensor,
    /// s², `[K]`
    variances: SharedTensor,
    /// ln w, `[K]`
    log_weights: SharedTensor,
}

/// What is known at x_t: D = C · H · W numbers a row.
pub(super) struct Posterior {
    /// x, `[B, D]`
    x: Tensor,
    /// α and σ, `[B, 1]` or `[1, 1]`
    alpha: Tensor,
    sigma: Tensor,
    /// v = α² s² + σ², `[B, K]` or `[1, K]`
    variances: Tensor,
    /// ln (w N(x_t; α μ, v 1)), `[B, K]`
    pub(super) log_joint: Tensor,
}

impl Mixture {
    const MOST_CLASSES: i64 = 4096;

    /// A mixture over `[C, H, W]`.
    ///
    /// # Errors
    /// [`Error::Value`] for a dimension below 1, no components, a class outside 0 .. 4096, a deviation or weight that
    /// is not above 0; [`Error::Shape`] for a mean of another length; [`Error::NotFinite`] for one that is no number.
    pub fn new(shape: [i64; 3], components: Vec<Component>) -> Result<Self> {
        let dimensions = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n));
        let Some(dimensions) = dimensions.filter(|_| shape.iter().all(|&n| n > 0)) else {
            return Err(Error::value("shape of a mixture", "dimensions >= 1", format!("{shape:?}")));
        };
        for (i, Component { mean, deviation, weight, class }) in components.iter().enumerate() {
            if i64::try_from(mean.len()) != Ok(dimensions) {
                let found = [i64::try_from(mean.len()).unwrap_or(i64::MAX)];
                return Err(Error::shape(
                    format!("mean of component {i}"),
                    format!("[{dimensions}]"),
                    &found,
                ));
            }
            if let Some(j) = mean.iter().position(|x| !x.is_finite()) {
                let (what, found) = (format!("mean of component {i}"), mean[j].to_string());
                return Err(Error::NotFinite { what, at: format!("index {j}"), found });
            }
            for (name, value) in [("deviation", *deviation), ("weight", *weight)] {
                if !value.is_finite() || value <= 0.0 {
                    let what = format!("{name} of component {i}");
                    return Err(Error::value(what, "a finite number > 0", value));
                }
            }
            if !(0..Self::MOST_CLASSES).contains(class) {
                let range = format!("0 .. {}", Self::MOST_CLASSES);
                return Err(Error::value(format!("class of component {i}"), range, class));
            }
        }
        if components.is_empty() {
            return Err(Error::value("components of a mixture", "at least one", 0));
        }
        let total: f64 = components.iter().map(|c| c.weight).sum();
        let of = |f: &dyn Fn(&Component) -> f64| -> Result<SharedTensor> {
            Ok(Tensor::f_from_slice(&components.iter().map(f).collect::<Vec<_>>())?.into())
        };
        let means: Vec<f64> = components.iter().flat_map(|c| c.mean.iter().copied()).collect();
        Ok(Self {
            shape,
            means: Tensor::f_from_slice(&means)?.f_view([-1, dimensions])?.into(),
            variances: of(&|c| c.deviation * c.deviation)?,
            log_weights: of(&|c| (c.weight / total).ln())?,
            components,
        })
    }

    /// `[C, H, W]`.
    pub fn shape(&self) -> [i64; 3] {
        self.shape
    }

    /// The components, in the order of all probabilities of components.
    pub fn components(&self) -> &[Component] {
        &self.components
    }

    /// The number of classes, one more than the largest.
    pub fn classes(&self) -> i64 {
        1 + self.components.iter().map(|c| c.class).max().unwrap_or(0)
    }

    /// ln w, `[K]`.
    pub(super) fn log_weights(&self) -> &Tensor {
        &self.log_weights
    }

    /// The same density with other classes, one a component: a second attribute of the same data.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of classes than of components, or one outside 0 .. 4096.
    pub fn with_classes(&self, classes: &[i64]) -> Result<Self> {
        if classes.len() != self.components.len() {
            return Err(Error::value("classes", self.components.len(), classes.len()));
        }
        let relabelled = self.components.iter().zip(classes);
        Self::new(self.shape, relabelled.map(|(c, &class)| Component { class, ..c.clone() }).collect())
    }

    /// p(x₀ | y): the components of this class alone.
    ///
    /// # Errors
    /// [`Error::Value`] for a class without components.
    pub fn of_class(&self, class: i64) -> Result<Self> {
        self.members(class)?;
        Self::new(self.shape, self.components.iter().filter(|c| c.class == class).cloned().collect())
    }

    /// The components of a class by number.
    ///
    /// # Errors
    /// [`Error::Value`] for a class without components.
    pub(super) fn members(&self, class: i64) -> Result<Vec<i64>> {
        let members: Vec<i64> =
            (0..).zip(&self.components).filter(|(_, c)| c.class == class).map(|(k, _)| k).collect();
        if members.is_empty() {
            return Err(Error::value("class", "one that has components", class));
        }
        Ok(members)
    }

    /// What is known at x `[B, C, H, W]`, for α and σ `[B, 1]` or `[1, 1]` and ln w `[B, K]` or `[K]`.
    pub(super) fn posterior(
        &self,
        x: &Tensor,
        alpha: Tensor,
        sigma: Tensor,
        log_weights: &Tensor,
    ) -> Result<Posterior> {
        let [c, h, w] = self.shape;
        if x.dim() != 4 || x.size()[1..] != self.shape {
            return Err(Error::shape("sample", format!("[B, {c}, {h}, {w}]"), &x.size()));
        }
        let x = x.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_flatten(1, -1)?; // (B, D)
        let variances = alpha.f_square()?.f_mul(&self.variances)?.f_add(&sigma.f_square()?)?; // (B, K)
        let means = alpha.f_unsqueeze(-1)?.f_mul(&self.means)?; // (B, K, D)
        let distance = x.f_unsqueeze(1)?.f_sub(&means)?.f_square()?;
        let distance = distance.f_sum_dim_intlist(&[2i64][..], false, None::<Kind>)?; // (B, K)
        let constant = 0.5 * (c * h * w) as f64;
        let log_scale =
            variances.f_mul_scalar(2.0 * std::f64::consts::PI)?.f_log()?.f_mul_scalar(constant)?;
        let log_joint = distance.f_div(&variances)?.f_mul_scalar(-0.5)?.f_sub(&log_scale)?;
        Ok(Posterior { log_joint: log_joint.f_add(log_weights)?, x, alpha, sigma, variances })
    }

    fn at(&self, x: &Tensor, level: NoiseLevel) -> Result<Posterior> {
        let scalar = |value: f64| -> Result<Tensor> { Ok(Tensor::f_from_slice(&[value])?.f_view([1, 1])?) };
        self.posterior(x, scalar(level.alpha())?, scalar(level.sigma())?, &self.log_weights)
    }

    /// ln p(x_t), `[B]`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn log_density(&self, at: &Noised) -> Result<Tensor> {
        Ok(self.at(&at.x, at.level)?.log_joint.f_logsumexp(&[1i64][..], false)?)
    }

    /// p(k | x_t), `[B, K]`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn responsibilities(&self, at: &Noised) -> Result<Tensor> {
        self.at(&at.x, at.level)?.responsibilities()
    }

    /// ln p(y | x_t) of a class, `[B]`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Value`] for a class without components.
    pub fn log_class(&self, at: &Noised, class: i64) -> Result<Tensor> {
        let members = Tensor::f_from_slice(&self.members(class)?)?;
        let all = self.at(&at.x, at.level)?.log_joint;
        let own = all.f_index_select(1, &members)?.f_logsumexp(&[1i64][..], false)?;
        Ok(own.f_sub(&all.f_logsumexp(&[1i64][..], false)?)?)
    }

    /// ∇ ln p(x_t), of the shape of x, in f64.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn score(&self, at: &Noised) -> Result<Tensor> {
        let posterior = self.at(&at.x, at.level)?;
        let pull = self.pull(&posterior, &posterior.responsibilities()?)?;
        Ok(pull.f_neg()?.f_view_as(&at.x)?)
    }

    /// E[ε | x_t] = −σ ∇ ln p(x_t), of the shape of x, in f64.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn epsilon(&self, at: &Noised) -> Result<Tensor> {
        Ok(self.score(at)?.f_mul_scalar(-at.level.sigma())?)
    }

    /// E[x₀ | x_t], of the shape of x, in f64.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn x0(&self, at: &Noised) -> Result<Tensor> {
        let posterior = self.at(&at.x, at.level)?;
        self.clean(&posterior, &posterior.responsibilities()?)?.f_view_as(&at.x).map_err(Into::into)
    }

    /// E[ε | x_t] for responsibilities r `[B, K]`: σ Σ rₖ (x − α μₖ) / vₖ, `[B, D]`.
    pub(super) fn noise(&self, posterior: &Posterior, r: &Tensor) -> Result<Tensor> {
        Ok(self.pull(posterior, r)?.f_mul(&posterior.sigma)?)
    }

    fn pull(&self, Posterior { x, alpha, variances, .. }: &Posterior, r: &Tensor) -> Result<Tensor> {
        let r = r.f_div(variances)?; // (B, K)
        let sum = r.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?;
        Ok(x.f_mul(&sum)?.f_sub(&r.f_matmul(&self.means)?.f_mul(alpha)?)?)
    }

    /// E[x₀ | x_t] for responsibilities r `[B, K]`: Σ rₖ (σ² μₖ + α sₖ² x) / vₖ, `[B, D]`.
    pub(super) fn clean(&self, posterior: &Posterior, r: &Tensor) -> Result<Tensor> {
        let Posterior { x, alpha, sigma, variances, .. } = posterior;
        let r = r.f_div(variances)?; // (B, K)
        let of_means = r.f_matmul(&self.means)?.f_mul(&sigma.f_square()?)?;
        let of_x = r.f_mul(&self.variances)?.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?;
        Ok(of_means.f_add(&of_x.f_mul(alpha)?.f_mul(x)?)?)
    }

    /// −ln p(y | x_t): the exact classifier of noised samples (Dhariwal & Nichol 2021).
    ///
    /// # Errors
    /// [`Error::Value`] for a class without components.
    pub fn noised_classifier(&self, class: i64) -> Result<Energy<Noised>> {
        self.members(class)?;
        let mixture = self.clone();
        Ok(Energy::from_fn(move |at: &Noised| Ok(mixture.log_class(at, class)?.f_neg()?)))
    }

    /// −ln p(y | x₀): the exact classifier of clean samples.
    ///
    /// # Errors
    /// [`Error::Value`] for a class without components.
    pub fn classifier(&self, class: i64) -> Result<Energy<Image>> {
        let noised = self.noised_classifier(class)?;
        Ok(Energy::from_fn(move |image: &Image| {
            noised.energy(&Noised { x: image.0.shallow_clone(), level: NoiseLevel::CLEAN })
        }))
    }
}

impl Posterior {
    /// p(k | x_t), `[B, K]`.
    pub(super) fn responsibilities(&self) -> Result<Tensor> {
        Ok(self.log_joint.f_softmax(1, None::<Kind>)?)
    }
}
