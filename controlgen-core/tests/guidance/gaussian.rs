//! A denoiser whose answers are known in closed form.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use controlgen_core::{
    Condition, Denoiser, DenoiserSpec, Dims, Error, NoiseLevel, Parameterisation, Pass, Placement,
    Prediction, Prepared, Result, SiteId, SiteMap, WeightMap,
};
use tch::{Kind, Tensor};

/// The deviation of the data around its mean.
pub const S: f64 = 0.5;

/// x₀ ~ N(μ, S²) for a mean μ a class, [2, 1, 1] each, and 0 unconditionally: the best denoiser is linear,
/// E[x₀ | x] = μ + α S² / (α² S² + σ²) · (x − α μ).
pub struct Gaussian {
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    to_k: SiteId,
    out: SiteId,
    /// t to its level.
    schedule: fn(f64) -> NoiseLevel,
    pub calls: Arc<AtomicI64>,
    pub rows: Arc<AtomicI64>,
}

pub fn diffusion(t: f64) -> NoiseLevel {
    NoiseLevel::from_alpha_bar((t * std::f64::consts::FRAC_PI_2).cos().powi(2)).unwrap()
}

pub fn flow(t: f64) -> NoiseLevel {
    NoiseLevel::from_flow(t).unwrap()
}

impl Gaussian {
    pub fn new(parameterisation: Parameterisation, schedule: fn(f64) -> NoiseLevel) -> Self {
        let mut sites = SiteMap::new();
        let to_k = sites.add("to_k", Dims::Linear { inputs: 2, outputs: 2 });
        let out = sites.add("out", Dims::Hidden { width: 2 });
        let spec = DenoiserSpec {
            architecture: "gaussian".into(),
            channels: 2,
            size: [1, 1],
            multiple: 1,
            parameterisation,
            learned_variance: false,
            placement: Placement::CPU.with_kind(Kind::Double),
        };
        Self { spec, sites: sites.into(), to_k, out, schedule, calls: Arc::default(), rows: Arc::default() }
    }

    pub fn mean(class: i64) -> [f64; 2] {
        [[2.0, -1.0], [-1.0, 0.5], [0.0, 3.0]][class as usize]
    }

    /// ε for rows x [B, 2, 1, 1] of one mean, by the formula.
    pub fn epsilon(x: &Tensor, mean: [f64; 2], level: NoiseLevel) -> Tensor {
        let (a, s) = (level.alpha(), level.sigma());
        let mu = Tensor::from_slice(&mean).view([1, 2, 1, 1]);
        let x0 = &mu + (x - &mu * a) * (a * S * S / (a * a * S * S + s * s));
        (x - x0 * a) / s
    }
}

impl Denoiser for Gaussian {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            calls: self.calls.clone(),
            rows: self.rows.clone(),
            ..*self
        })
    }
    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        let mean = |condition: &Condition| match condition {
            Condition::Null => Ok([0.0; 2]),
            Condition::Class(class @ 0..3) => Ok(Self::mean(*class)),
            _ => Err(Error::unsupported("such a condition", "Null, Class(0 .. 3)")),
        };
        let means = conditions.iter().map(mean).collect::<Result<Vec<_>>>()?;
        let means = Tensor::from_slice2(&means);
        let means = pass.linear(self.to_k, &means, means.shallow_clone())?;
        Prepared::new(&self.sites, pass, conditions.len() as i64, vec![means])
    }
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        prepared.check(&self.sites, pass)?;
        let batch = self.spec.validate(x, t, prepared)?;
        pass.check(&self.sites, batch)?;
        self.calls.fetch_add(1, Relaxed);
        self.rows.fetch_add(batch, Relaxed);
        let kind = x.kind();
        let (x, mu) = (x.to_kind(Kind::Double), prepared.tensors()[0].view([batch, 2, 1, 1]));
        // Each row at its own level.
        let mut rows = Vec::new();
        for i in 0..batch {
            let level = (self.schedule)(t.f_get(i)?.f_double_value(&[])?);
            let (a, s) = (level.alpha(), level.sigma());
            let (x, mu) = (x.narrow(0, i, 1), mu.narrow(0, i, 1));
            let x0 = &mu + (&x - &mu * a) * (a * S * S / (a * a * S * S + s * s));
            rows.push((level, x, x0));
        }
        let x0 =
            pass.hidden(self.out, Tensor::cat(&rows.iter().map(|row| &row.2).collect::<Vec<_>>(), 0), &x)?;
        let mut made = Vec::new();
        for (i, (level, x, _)) in (0i64..).zip(&rows) {
            let row = Prediction::new(x0.narrow(0, i, 1), Parameterisation::Sample);
            made.push(row.convert(x, *level, self.spec.parameterisation)?.value);
        }
        Ok(Prediction::new(Tensor::cat(&made, 0).to_kind(kind), self.spec.parameterisation))
    }
    fn map_weights(&self, _f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(self.handle())
    }
}
