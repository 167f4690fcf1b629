//! The best denoiser of a mixture of Gaussians.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tch::{Kind, Tensor};

use super::Mixture;
use crate::layers::Linear;
use crate::{
    Condition, Denoiser, DenoiserSpec, Dims, Error, NoiseLevel, Parameterisation, Pass, Placement,
    Prediction, Prepared, Result, SiteId, SiteMap, WeightMap,
};

/// Timesteps to levels of noise.
type Schedule = dyn Fn(f64) -> Result<NoiseLevel> + Send + Sync;

/// The best denoiser of a [`Mixture`], in any parameterisation: what sampling with it gives is known.
///
/// It takes [`Condition::Null`], the whole mixture, and [`Condition::Class`]. Its sites are
///
/// * `to_k`, linear, used in `prepare`: the condition as a unit vector of Y + 1 numbers (null is the last) to ln w
///   `[K]`, the same for all conditions; afterwards the components of other classes get −∞;
/// * `responsibilities`, hidden, `[B, 1, K]`: r = p(k | x_t, y), of which x̂₀ = Σ rₖ E[x₀ | x_t, k] and ε̂ alike. The
///   residual is p(k | y): what r is when x is not looked at.
///
/// It computes in f64 on the CPU, without dividing by α or σ, so that every form is exact at every level.
pub struct MixtureDenoiser {
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    mixture: Mixture,
    to_k: Linear,
    responsibilities: SiteId,
    schedule: Arc<Schedule>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    calls: AtomicU64,
    rows: AtomicU64,
}

impl MixtureDenoiser {
    /// A denoiser whose timestep t is the level `schedule(t)`.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn new(
        mixture: Mixture,
        parameterisation: Parameterisation,
        schedule: impl Fn(f64) -> Result<NoiseLevel> + Send + Sync + 'static,
    ) -> Result<Self> {
        let [channels, height, width] = mixture.shape();
        let (k, classes) = (mixture.log_weights().size()[0], mixture.classes());
        let mut sites = SiteMap::new();
        let to_k = sites.add("to_k", Dims::Linear { inputs: classes + 1, outputs: k });
        let responsibilities = sites.add("responsibilities", Dims::Hidden { width: k });
        let weight = mixture.log_weights().f_unsqueeze(1)?.f_expand([k, classes + 1], false)?;
        let spec = DenoiserSpec {
            architecture: "mixture".into(),
            channels,
            size: [height, width],
            multiple: 1,
            parameterisation,
            learned_variance: false,
            placement: Placement::CPU.with_kind(Kind::Double),
        };
        Ok(Self {
            spec,
            sites: sites.into(),
            mixture,
            to_k: Linear::new(weight.f_contiguous()?, None, &[(to_k, k)])?,
            responsibilities,
            schedule: Arc::new(schedule),
            counts: Arc::default(),
        })
    }

    /// The data.
    pub fn mixture(&self) -> &Mixture {
        &self.mixture
    }

    /// How often `predict` was called, and on how many rows together, of all handles, since the last
    /// [`Self::reset_counts`]. Calls that were refused do not count.
    pub fn counts(&self) -> (u64, u64) {
        (self.counts.calls.load(Relaxed), self.counts.rows.load(Relaxed))
    }

    /// Counts from 0 again.
    pub fn reset_counts(&self) {
        self.counts.calls.store(0, Relaxed);
        self.counts.rows.store(0, Relaxed);
    }

    fn share(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            mixture: self.mixture.clone(),
            to_k: self.to_k.handle(),
            responsibilities: self.responsibilities,
            schedule: self.schedule.clone(),
            counts: self.counts.clone(),
        }
    }

    /// The column of `to_k` for a condition, and 0 for its components, −∞ for all others, `[K]`.
    fn condition(&self, condition: &Condition) -> Result<(i64, Tensor)> {
        let k = i64::try_from(self.mixture.components().len()).unwrap_or(i64::MAX);
        let options = (Kind::Double, tch::Device::Cpu);
        match condition {
            Condition::Null => Ok((self.mixture.classes(), Tensor::f_zeros([k], options)?)),
            Condition::Class(class) => {
                let members = self.mixture.members(*class).map_err(|_| {
                    let classes = format!("classes 0 .. {} that have components", self.mixture.classes());
                    Error::unsupported(format!("class {class}"), classes)
                })?;
                let members = Tensor::f_from_slice(&members)?;
                let others = Tensor::f_full([k], f64::NEG_INFINITY, options)?;
                Ok((*class, others.f_index_fill(0, &members, 0.0)?))
            }
            Condition::Features(_) => {
                Err(Error::unsupported("a condition of features", "Condition::Null, Condition::Class"))
            }
        }
    }
}

impl Denoiser for MixtureDenoiser {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(self.share())
    }

    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        pass.check_sites(&self.sites)?;
        let rows = i64::try_from(conditions.len()).unwrap_or(i64::MAX);
        if conditions.is_empty() {
            return Prepared::new(&self.sites, pass, 0, vec![]);
        }
        let conditions = conditions.iter().map(|c| self.condition(c)).collect::<Result<Vec<_>>>()?;
        let (columns, masks): (Vec<i64>, Vec<Tensor>) = conditions.into_iter().unzip();
        let options = (Kind::Double, tch::Device::Cpu);
        let unit = Tensor::f_eye(self.mixture.classes() + 1, options)?;
        let unit = unit.f_index_select(0, &Tensor::f_from_slice(&columns)?)?; // (n, Y + 1)
        let log_weights = self.to_k.forward(&unit, pass)?.f_add(&Tensor::f_stack(&masks, 0)?)?; // (n, K)
        Prepared::new(&self.sites, pass, rows, vec![log_weights])
    }

    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        let batch = self.check_call(x, t, prepared, pass)?;
        let mut levels = Vec::with_capacity(usize::try_from(batch).unwrap_or(0));
        for t in Vec::<f64>::try_from(t.f_to_kind(Kind::Double)?)? {
            levels.push((self.schedule)(t)?);
        }
        let column = |f: fn(NoiseLevel) -> f64| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&levels.iter().map(|&l| f(l)).collect::<Vec<_>>())?.f_unsqueeze(1)?)
        };
        let (alpha, sigma) = (column(NoiseLevel::alpha)?, column(NoiseLevel::sigma)?); // (B, 1)
        let log_weights = &prepared.tensors()[0]; // (B, K)
        let shared = |a: &Tensor| a.shallow_clone();
        let posterior = self.mixture.posterior(x, shared(&alpha), shared(&sigma), log_weights)?;
        let prior = log_weights.f_softmax(1, None::<Kind>)?.f_unsqueeze(1)?;
        let r = posterior.responsibilities()?.f_unsqueeze(1)?; // (B, 1, K)
        let r = pass.hidden(self.responsibilities, r, &prior)?.f_squeeze_dim(1)?;
        self.counts.calls.fetch_add(1, Relaxed);
        self.counts.rows.fetch_add(u64::try_from(batch).unwrap_or(0), Relaxed);
        let noise = || self.mixture.noise(&posterior, &r);
        let clean = || self.mixture.clean(&posterior, &r);
        let value = match self.spec.parameterisation {
            Parameterisation::Epsilon => noise()?,
            Parameterisation::Sample => clean()?,
            Parameterisation::V => noise()?.f_mul(&alpha)?.f_sub(&clean()?.f_mul(&sigma)?)?,
            Parameterisation::Velocity => noise()?.f_sub(&clean()?)?,
        };
        let value = value.f_view_as(x)?.f_to_device(x.device())?.f_to_kind(x.f_kind()?)?;
        Ok(Prediction::new(value, self.spec.parameterisation))
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(Self { to_k: self.to_k.map_weights(f)?, ..self.share() }))
    }
}

#[cfg(test)]
mod tests;
