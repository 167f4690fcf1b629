//! The task of every denoiser.

use std::path::Path;

use controlgen_core::checkpoint::{Weights, replace};
use controlgen_core::noise::Stream;
use controlgen_core::train::{Batch, Loss, Parameters, Task};
use controlgen_core::{Condition, Config, Denoiser, Error, Parameterisation, Pass, Placement, Result};
use controlgen_diffusion::losses::{Denoising, NoisedBatch};
use controlgen_diffusion::{Predicts, models};
use tch::{Kind, Tensor};

use super::run::begin;
use super::{Card, Model, Recipe};

/// Pictures with their conditions, and what is measured of a model of them.
pub trait Pictures {
    /// How many there are.
    fn examples(&self) -> usize;

    /// x₀ `[B, C, H, W]` and what each is of. Conditions are dropped here, for classifier-free guidance.
    ///
    /// # Errors
    /// Whatever keeps them from being made.
    fn batch(&mut self, examples: &[usize], stream: &mut Stream) -> Result<(Tensor, Vec<Condition>)>;

    /// Measures on held-out conditions.
    ///
    /// # Errors
    /// Those of sampling.
    fn evaluate(&mut self, denoiser: Box<dyn Denoiser>) -> Result<Vec<(String, f64)>>;

    /// What tells these pictures from others.
    fn configuration(&self) -> serde_json::Value;

    /// Writes what belongs to the model beside its weights.
    ///
    /// # Errors
    /// Those of writing.
    fn write_more(&self, folder: &Path) -> Result<()>;

    /// The card's text.
    fn card(&self) -> Card;
}

/// A denoiser in training.
pub struct DenoiserRecipe<P> {
    config: Config,
    predicts: Predicts,
    placement: Placement,
    parameters: Parameters,
    training: Denoising,
    pictures: P,
    scheduler: serde_json::Value,
}

impl<P: Pictures> DenoiserRecipe<P> {
    /// A new model of this configuration, with the scheduler_config.json that its pipeline will have.
    ///
    /// # Errors
    /// Those of loading a denoiser.
    pub fn new(
        config: serde_json::Value,
        parameterisation: Parameterisation,
        (training, scheduler): (Denoising, serde_json::Value),
        pictures: P,
        (placement, seed): (Placement, u64),
    ) -> Result<Self> {
        let serde_json::Value::Object(fields) = config else {
            return Err(Error::value("configuration of a denoiser", "an object", config));
        };
        let config = Config::from_fields("config.json", fields);
        let predicts = Predicts { parameterisation, learned_variance: false };
        let named = begin(seed, placement.device, |weights| {
            models::load_denoiser(&config, weights, predicts, Placement { kind: Kind::Float, ..placement })
        })?;
        let parameters = Parameters::new(named)?;
        Ok(Self { config, predicts, placement, parameters, training, pictures, scheduler })
    }

    /// The model of the parameters as they are, in the graph if gradients are on.
    ///
    /// # Errors
    /// Those of loading a denoiser.
    pub fn denoiser(&self) -> Result<Box<dyn Denoiser>> {
        let weights = Weights::new(&self.parameters, self.placement.options());
        models::load_denoiser(&self.config, &weights, self.predicts, self.placement)
    }
}

impl<P: Pictures> Task for DenoiserRecipe<P> {
    fn examples(&self) -> usize {
        self.pictures.examples()
    }

    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss> {
        let (clean, conditions) = {
            let _no_gradients = tch::no_grad_guard();
            self.pictures.batch(batch.examples, batch.stream)?
        };
        let clean = clean.f_to_device(self.placement.device)?;
        let noised: NoisedBatch = self.training.noised(&clean, batch.stream)?;
        let (denoiser, pass) = (self.denoiser()?, Pass::default());
        let prepared = denoiser.prepare(&conditions, &pass)?;
        let loss = self.training.loss(&*denoiser, &noised, &prepared, &pass)?;
        Ok(loss.f_mean(None::<Kind>)?.into())
    }

    fn evaluate(&mut self) -> Result<Vec<(String, f64)>> {
        let denoiser = self.denoiser()?;
        self.pictures.evaluate(denoiser)
    }

    fn configuration(&self) -> serde_json::Value {
        serde_json::json!({
            "model": self.config.fields(),
            "scheduler": self.scheduler,
            "training": format!("{:?}, {:?}", self.training.timesteps(), self.training.weighting()),
            "pictures": self.pictures.configuration(),
            "kind": format!("{:?}", self.placement.kind),
        })
    }
}

impl<P: Pictures> Recipe for DenoiserRecipe<P> {
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn models(&self) -> Vec<Model> {
        vec![Model {
            folder: "unet".to_owned(),
            prefix: String::new(),
            config: self.config.clone(),
            stem: "diffusion_pytorch_model",
        }]
    }

    fn write_more(&self, folder: &Path) -> Result<()> {
        let place = folder.join("scheduler");
        std::fs::create_dir_all(&place).map_err(|error| Error::io(&place, error))?;
        let text = format!("{:#}\n", self.scheduler);
        replace(place.join("scheduler_config.json"), text.as_bytes())?;
        self.pictures.write_more(folder)
    }

    fn card(&self) -> Card {
        self.pictures.card()
    }
}
