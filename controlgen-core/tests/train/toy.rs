//! A task small enough for a test: an embedding table and a matrix, noise in the loss.

use std::path::Path;

use controlgen_core::Result;
use controlgen_core::train::{
    Adafactor, AdafactorConfig, AdamW, AdamWConfig, Batch, Best, EmaConfig, Group, Loss, Optimizer,
    Parameters, Schedule, Sgd, SgdConfig, Spikes, Task, Trainer, TrainerConfig,
};
use tch::{Device, Kind, Tensor, kind::FLOAT_CPU};

pub const STEPS: u64 = 24;
const EXAMPLES: usize = 50;

/// Called with the step and how many losses it has been asked for before in that step.
type Before = Box<dyn FnMut(u64, usize)>;

pub struct Toy {
    pub table: Tensor,
    pub matrix: Tensor,
    pub unused: Tensor,
    pub before_loss: Before,
    pub before_evaluation: Box<dyn FnMut()>,
    /// What a loss is multiplied by, step by step.
    pub factor: Box<dyn Fn(u64) -> f64>,
    /// The step whose gradient is infinite, though its loss is not.
    pub infinite_gradient: Option<u64>,
    pub noise: f64,
    pub name: &'static str,
    pub unused_name: &'static str,
    pub examples: usize,
    pub asked: Vec<(u64, Vec<usize>)>,
}

impl Toy {
    pub fn new() -> Self {
        let leaf = |shape: &[i64]| {
            let numbers = Tensor::arange(shape.iter().product::<i64>(), FLOAT_CPU).sin() * 0.3;
            numbers.view(shape).detach().set_requires_grad(true)
        };
        // The matrix lies in memory as its transpose.
        let matrix = leaf(&[8, 32]).detach().tr().set_requires_grad(true);
        Self {
            table: leaf(&[60, 32]),
            matrix,
            unused: leaf(&[3]),
            before_loss: Box::new(|_, _| {}),
            before_evaluation: Box::new(|| {}),
            factor: Box::new(|_| 1.0),
            infinite_gradient: None,
            noise: 0.1,
            name: "toy",
            unused_name: "unused",
            examples: EXAMPLES,
            asked: Vec::new(),
        }
    }

    pub fn parameters(&self) -> Parameters {
        let named = [("table", &self.table), ("matrix", &self.matrix), (self.unused_name, &self.unused)];
        let named = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let group =
            |name: &str, _: &Tensor| Group { decay_touched_rows: name == "table", ..Group::default() };
        Parameters::grouped(named.into(), group).unwrap()
    }

    pub fn optimizer(&self, kind: &str) -> Box<dyn Optimizer> {
        let parameters = self.parameters();
        match kind {
            "AdamW" => Box::new(AdamW::new(&parameters, AdamWConfig::default()).unwrap()),
            "SGD" => {
                let config =
                    SgdConfig { momentum: 0.9, nesterov: true, weight_decay: 0.01, ..SgdConfig::default() };
                Box::new(Sgd::new(&parameters, config).unwrap())
            }
            "Adafactor" => {
                let config =
                    AdafactorConfig { beta1: Some(0.9), weight_decay: 0.01, ..AdafactorConfig::absolute() };
                Box::new(Adafactor::new(&parameters, config).unwrap())
            }
            other => panic!("{other}"),
        }
    }

    pub fn bits(&self) -> Vec<u32> {
        let all = Tensor::cat(&[self.table.view([-1]), self.matrix.reshape([-1]), self.unused.view([-1])], 0);
        Vec::<f32>::try_from(all.detach()).unwrap().into_iter().map(f32::to_bits).collect()
    }
}

impl Task for Toy {
    fn examples(&self) -> usize {
        self.examples
    }

    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss> {
        let before = self.asked.iter().filter(|(step, _)| *step == batch.step).count();
        (self.before_loss)(batch.step, before);
        self.asked.push((batch.step, batch.examples.to_vec()));
        let ids: Vec<i64> = batch.examples.iter().map(|&i| i as i64).collect();
        let x = self.table.f_index_select(0, &Tensor::f_from_slice(&ids)?)?;
        let noise = batch.stream.normal(&x.size(), Kind::Float, Device::Cpu)?;
        let y = (x + noise * self.noise).f_matmul(&self.matrix)?;
        let mut value = (y - 1.0).square().f_mean(None::<Kind>)?;
        if batch.step % 2 == 1 {
            // Reached by every second loss alone, so that it has no gradient at the other steps.
            value += self.unused.square().mean(Kind::Float);
        }
        if self.infinite_gradient == Some(batch.step) {
            value += (self.unused.f_sub(&self.unused.detach())?).abs().sqrt().sum(Kind::Float);
        }
        let value = value * (self.factor)(batch.step);
        let accuracy = value.detach().double_value(&[]) * 2.0;
        Ok(Loss { value, metrics: vec![("twice".into(), accuracy)] })
    }

    fn evaluate(&mut self) -> Result<Vec<(String, f64)>> {
        (self.before_evaluation)();
        let y = self.table.f_matmul(&self.matrix)?;
        Ok(vec![("held_out".into(), (y - 1.0).square().mean(Kind::Float).double_value(&[]))])
    }

    fn configuration(&self) -> serde_json::Value {
        serde_json::json!({ "name": self.name })
    }
}

/// Everything on: accumulation with a partial last batch, clipping, spikes, averages, evaluation, checkpoints.
pub fn config(directory: &Path) -> TrainerConfig {
    TrainerConfig {
        accumulation: 3,
        seed: 11,
        clip_norm: Some(1.0),
        clip_value: Some(0.5),
        spikes: Some(Spikes { window: 8, least: 4, ..Spikes::default() }),
        ema: Some(EmaConfig::default()),
        evaluate_every: Some(3),
        best: Some(Best::Lowest("held_out".into())),
        directory: Some(directory.to_owned()),
        save_every: Some(5),
        ..TrainerConfig::new(STEPS, 4, Schedule::cosine(0.03, STEPS).unwrap().with_warmup(3).unwrap())
    }
}

/// The same without files.
pub fn plain() -> TrainerConfig {
    TrainerConfig { directory: None, save_every: None, ..config(Path::new("")) }
}

pub fn trainer(toy: &Toy, kind: &str, config: TrainerConfig) -> Trainer {
    Trainer::boxed(config, toy.optimizer(kind)).unwrap()
}
