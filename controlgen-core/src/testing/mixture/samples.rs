//! Samples of a mixture, and what samples of it should be like.

use tch::Tensor;

use super::Mixture;
use crate::noise::Stream;
use crate::testing::normal_cdf;
use crate::{Error, NoiseLevel, Result};

impl Mixture {
    /// Exact samples x₀ `[B, C, H, W]` in f64, row i from stream i.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn sample(&self, streams: &mut [Stream]) -> Result<Tensor> {
        let total: f64 = self.components.iter().map(|c| c.weight).sum();
        let mut values = Vec::new();
        for stream in &mut *streams {
            let mut left = stream.uniform() * total;
            let mut chosen = &self.components[0];
            for component in &self.components {
                chosen = component;
                left -= component.weight;
                if left < 0.0 {
                    break;
                }
            }
            values.extend(chosen.mean.iter().map(|mu| mu + chosen.deviation * stream.standard_normal()));
        }
        let [c, h, w] = self.shape;
        let rows = i64::try_from(streams.len()).unwrap_or(i64::MAX);
        Ok(Tensor::f_from_slice(&values)?.f_view([rows, c, h, w])?)
    }

    /// How many rows of x₀ `[B, C, H, W]` are of each component, by the most probable one. Only between components
    /// that hardly overlap are these counts of the weights.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn counts(&self, x0: &Tensor) -> Result<Vec<u64>> {
        let nearest = self.at(x0, NoiseLevel::CLEAN)?.log_joint.f_argmax(1, false)?;
        let mut counts = vec![0; self.components.len()];
        for k in Vec::<i64>::try_from(nearest)? {
            counts[usize::try_from(k).unwrap_or(0)] += 1;
        }
        Ok(counts)
    }

    /// w, normalised: what [`Self::counts`] of samples is to be compared with.
    pub fn weights(&self) -> Vec<f64> {
        let total: f64 = self.components.iter().map(|c| c.weight).sum();
        self.components.iter().map(|c| c.weight / total).collect()
    }

    /// P(u · x_t ≤ value) for a direction u of length D: a mixture of normals.
    ///
    /// # Errors
    /// [`Error::Shape`] for a direction of another length; [`Error::Value`] for one that is 0 or no number.
    pub fn cdf(&self, direction: &[f64], level: NoiseLevel) -> Result<impl Fn(f64) -> f64 + 'static> {
        let norm = self.direction(direction)?;
        let (a, s) = (level.alpha(), level.sigma());
        let normals: Vec<(f64, f64, f64)> = self
            .components
            .iter()
            .zip(self.weights())
            .map(|(c, weight)| {
                let mean: f64 = c.mean.iter().zip(direction).map(|(mu, u)| mu * u).sum();
                (weight, a * mean, norm * (a * a * c.deviation * c.deviation + s * s).sqrt())
            })
            .collect();
        Ok(move |value: f64| {
            normals.iter().map(|(w, mean, deviation)| w * normal_cdf((value - mean) / deviation)).sum()
        })
    }

    /// u · x of each row of x `[B, C, H, W]`: the samples that [`Self::cdf`] is of.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Value`] as for [`Self::cdf`].
    pub fn project(&self, direction: &[f64], x: &Tensor) -> Result<Vec<f64>> {
        self.direction(direction)?;
        let x = self.at(x, NoiseLevel::CLEAN)?.x;
        Ok(Vec::try_from(x.f_matmul(&Tensor::f_from_slice(direction)?)?)?)
    }

    /// |u|.
    fn direction(&self, direction: &[f64]) -> Result<f64> {
        let dimensions = self.components[0].mean.len();
        if direction.len() != dimensions {
            let found = [i64::try_from(direction.len()).unwrap_or(i64::MAX)];
            return Err(Error::shape("direction", format!("[{dimensions}]"), &found));
        }
        let norm = direction.iter().map(|u| u * u).sum::<f64>().sqrt();
        if !norm.is_finite() || norm == 0.0 {
            return Err(Error::value("length of a direction", "a finite number > 0", norm));
        }
        Ok(norm)
    }
}
