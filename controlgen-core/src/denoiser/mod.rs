//! Denoisers: a noisy sample and a condition in, a prediction of the noise out.

mod level;
mod prediction;
mod prepared;

pub use level::NoiseLevel;
pub use prediction::{Parameterisation, Prediction};
pub use prepared::Prepared;

use tch::Tensor;

use crate::energy::checks;
use crate::{Error, Pass, Placement, Result, SiteMap, WeightMap};

/// What is known of a denoiser without running it.
#[derive(Clone, Debug)]
pub struct DenoiserSpec {
    /// The architecture, as `_class_name` in diffusers' config.json names it.
    pub architecture: String,
    /// C: channels of a sample.
    pub channels: i64,
    /// H and W that the model was made for; it may take others, in multiples of `multiple`.
    pub size: [i64; 2],
    /// H and W must be multiples of this.
    pub multiple: i64,
    /// What it predicts.
    pub parameterisation: Parameterisation,
    /// Whether it also predicts the variance of a step (Nichol & Dhariwal 2021).
    pub learned_variance: bool,
    /// Where the model runs.
    pub placement: Placement,
}

impl DenoiserSpec {
    /// B, once the sample, the timesteps and the conditions agree with the model and each other.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`]; [`Error::Value`] for an empty batch.
    pub fn validate(&self, x: &Tensor, t: &Tensor, prepared: &Prepared) -> Result<i64> {
        let expected = || format!("[B, {}, H, W], H and W multiples of {}", self.channels, self.multiple);
        let &[batch, channels, height, width] = x.size().as_slice() else {
            return Err(Error::shape("sample", expected(), &x.size()));
        };
        let fits = |n: i64| n > 0 && n % self.multiple.max(1) == 0;
        if channels != self.channels || !fits(height) || !fits(width) {
            return Err(Error::shape("sample", expected(), &x.size()));
        }
        if batch == 0 {
            return Err(Error::value("rows of the sample", ">= 1", batch));
        }
        checks::floating("sample", x)?;
        if t.size() != [batch] {
            return Err(Error::shape("timesteps", format!("[{batch}]"), &t.size()));
        }
        checks::floating("timesteps", t)?;
        if prepared.rows() != batch {
            return Err(Error::value("rows of the prepared conditions", batch, prepared.rows()));
        }
        Ok(batch)
    }
}

/// What one sample is to be of.
#[non_exhaustive]
pub enum Condition {
    /// Nothing: the unconditional model, where it has one of its own.
    Null,
    /// A class of a class-conditional model, from 0.
    Class(i64),
    /// Named features, each without a batch dimension, under diffusers' names: `encoder_hidden_states` `[T, D]`,
    /// `text_embeds` `[D]`, `time_ids` `[n]`, `controlnet_cond` `[C, H, W]`.
    Features(Vec<(String, Tensor)>),
}

impl Condition {
    /// Another handle over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        match self {
            Self::Null => Self::Null,
            Self::Class(class) => Self::Class(*class),
            Self::Features(features) => {
                Self::Features(features.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect())
            }
        }
    }

    /// The feature of this name, of which the model says what shape it should have.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a condition without features or without this one.
    pub fn feature(&self, name: &str) -> Result<&Tensor> {
        let found = match self {
            Self::Features(features) => features.iter().find(|feature| feature.0 == name).map(|f| &f.1),
            Self::Null | Self::Class(_) => None,
        };
        found.ok_or_else(|| Error::unsupported(format!("a condition without `{name}`"), format!("`{name}`")))
    }
}

/// A denoiser: from x_t = α x_0 + σ ε and a condition it predicts ε, or what is equal to it.
///
/// A model is an owned handle over shared weights, like a [`LanguageModel`](crate::LanguageModel). It keeps no state
/// between calls, and whether gradients are recorded is the caller's choice. Rows are independent: a batch gives
/// what its rows give one by one.
///
/// What every implementer keeps is what `testing::contract::denoiser` checks.
pub trait Denoiser: Send {
    /// Another handle over the same weights and sites.
    fn handle(&self) -> Box<dyn Denoiser>;

    /// What is known of it.
    fn spec(&self) -> &DenoiserSpec;

    /// Where controls may act.
    fn sites(&self) -> &SiteMap;

    /// What the model computes of its conditions once, not in every step (keys and values of the text, embeddings of
    /// the class): one row a condition. Controls that act there are those of `pass`, and the result remembers them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a condition that the model does not take, naming those it does;
    /// [`Error::Shape`] for a feature of the wrong shape; [`Error::ForeignSites`](Error::ForeignSites); the
    /// controls'.
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared>;

    /// The prediction for x_t `[B, C, H, W]` at timesteps t `[B]`, f32 or f64, in the units that the model was
    /// trained with, under conditions of B rows. It comes in the element type of x, whatever the model's.
    ///
    /// # Errors
    /// Those of [`DenoiserSpec::validate`] and [`Prepared::check`]; [`Error::ForeignSites`]; the controls'.
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction>;

    /// B, once a call of [`Self::predict`] is known to make sense; every implementer begins it with this.
    ///
    /// # Errors
    /// Those of [`DenoiserSpec::validate`] and [`Prepared::check`]; [`Error::ForeignSites`]; [`Error::Value`] for lanes
    /// that are not one a row.
    fn check_call(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<i64> {
        prepared.check(self.sites(), pass)?;
        let batch = self.spec().validate(x, t, prepared)?;
        pass.check(self.sites(), batch)?;
        Ok(batch)
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared. What was prepared
    /// before is to be prepared again.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>>;
}

impl<M: Denoiser + ?Sized> Denoiser for Box<M> {
    fn handle(&self) -> Box<dyn Denoiser> {
        (**self).handle()
    }
    fn spec(&self) -> &DenoiserSpec {
        (**self).spec()
    }
    fn sites(&self) -> &SiteMap {
        (**self).sites()
    }
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        (**self).prepare(conditions, pass)
    }
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        (**self).predict(x, t, prepared, pass)
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        (**self).map_weights(f)
    }
}
