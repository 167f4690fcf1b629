//! One run: from settings to a directory with a model.

use std::path::Path;
use std::time::{Duration, Instant};

use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights, replace, save};
use controlgen_core::noise::Noise;
use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::train::{
    AdamW, AdamWConfig, Ema, EmaConfig, Initial, Parameters, Schedule, StepReport, Task, Trainer,
    TrainerConfig, initial,
};
use controlgen_core::{Config, Error, Result, copy_parameters};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Card, Options};

/// Settings of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Steps in all.
    pub steps: u64,
    /// Examples a step.
    pub batch: usize,
    /// The highest learning rate, reached after `warmup` steps; it falls along a cosine.
    pub rate: f64,
    /// Steps in which the rate rises.
    pub warmup: u64,
    /// AdamW's λ.
    pub weight_decay: f64,
    /// AdamW's second β.
    pub beta2: f64,
    /// The decay of the averages, which are what is written.
    pub ema: f64,
    /// Of the parameters, the data and the noise.
    pub seed: u64,
    /// Steps from one evaluation to the next.
    pub evaluate_every: u64,
    /// Steps from one checkpoint to the next.
    pub save_every: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 32,
            rate: 1e-3,
            warmup: 200,
            weight_decay: 0.01,
            beta2: 0.99,
            ema: 0.999,
            seed: 0,
            evaluate_every: 1000,
            save_every: 500,
        }
    }
}

impl Settings {
    /// With what the command line says instead.
    #[must_use]
    pub fn with(mut self, options: &Options) -> Self {
        self.steps = options.steps.unwrap_or(self.steps);
        self.batch = options.batch.unwrap_or(self.batch);
        self.rate = options.rate.unwrap_or(self.rate);
        self.seed = options.seed.unwrap_or(self.seed);
        self.evaluate_every = options.evaluate_every.unwrap_or(self.evaluate_every);
        self.warmup = self.warmup.min(self.steps.div_euclid(4));
        self
    }
}

/// A part of what is trained that is written as a model of its own.
pub struct Model {
    /// Its folder below the recipe's; empty for the folder itself.
    pub folder: String,
    /// What its parameters' names begin with in training, with the dot; it is taken off.
    pub prefix: String,
    /// Its config.json.
    pub config: Config,
    /// `model` (transformers) or `diffusion_pytorch_model` (diffusers).
    pub stem: &'static str,
}

/// Something to be trained: a task, its parameters, and what becomes of them.
pub trait Recipe: Task {
    /// What is trained.
    fn parameters(&self) -> &Parameters;

    /// What is written.
    fn models(&self) -> Vec<Model>;

    /// What else goes into the recipe's folder (a scheduler's configuration, a model_index.json).
    ///
    /// # Errors
    /// Those of writing.
    fn write_more(&self, _folder: &Path) -> Result<()> {
        Ok(())
    }

    /// What the card says of the data, the loss and the measures; the run adds the rest.
    fn card(&self) -> Card;
}

/// Runs a recipe to its end, or until it is stopped, from its last checkpoint if there is one.
///
/// # Errors
/// Those of the trainer, the recipe and of writing.
pub fn train(recipe: &mut impl Recipe, settings: &Settings, options: &Options) -> Result<()> {
    let config = TrainerConfig {
        seed: settings.seed,
        shuffle: false,
        clip_norm: Some(1.0),
        ema: Some(EmaConfig { decay: settings.ema, ..EmaConfig::default() }),
        evaluate_every: Some(settings.evaluate_every),
        save_every: Some(settings.save_every),
        directory: Some(options.run.clone()),
        ..TrainerConfig::new(
            settings.steps,
            settings.batch,
            Schedule::cosine(settings.rate, settings.steps)?.with_warmup(settings.warmup)?,
        )
    };
    if let Some(from) = &options.from {
        begin_with(recipe, from)?;
    }
    let adamw =
        AdamWConfig { beta2: settings.beta2, weight_decay: settings.weight_decay, ..AdamWConfig::default() };
    let mut trainer = Trainer::new(config, AdamW::new(recipe.parameters(), adamw)?)?;
    let resumed = trainer.resume(recipe)?;
    let numbers = recipe.parameters().trainable();
    println!("{}: {numbers} parameters, step {} of {}", options.name, trainer.steps_done(), settings.steps);
    if options.export {
        if !resumed {
            let found = format!("none in {}", options.run.display());
            return Err(Error::value("a checkpoint to export", "last.safetensors", found));
        }
        let seconds = seconds_before(&options.run);
        return export(recipe, &mut trainer, settings, options, seconds);
    }
    let cancel = CancelToken::new();
    let stop = cancel.clone();
    // A second handler is refused, as in tests that train twice: then that of the first run stays.
    let _ = ctrlc::set_handler(move || stop.cancel());
    let (before, began) = (if resumed { seconds_before(&options.run) } else { 0.0 }, Instant::now());
    let mut loss = f64::NAN;
    let mut watch = |report: &StepReport| {
        loss = if loss.is_nan() { report.loss } else { 0.98 * loss + 0.02 * report.loss };
        if let Some(found) = &report.evaluation {
            let found: Vec<String> = found.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            println!("  after {} steps: {}", report.step + 1, found.join(", "));
        }
        if (report.step + 1).is_multiple_of(100) {
            println!(
                "{}/{} loss {loss:.4} norm {:.2} rate {:.2e} {:.2} steps/s, {} left",
                report.step + 1,
                report.steps,
                report.gradient_norm,
                report.learning_rate,
                report.rate,
                minutes(report.left)
            );
            // What is lost with it is a line of the card.
            let _ = replace(seconds_file(&options.run), told(before, began).as_bytes());
        }
        Flow::Continue
    };
    let summary = trainer.run(recipe, &mut watch, &cancel)?;
    replace(seconds_file(&options.run), told(before, began).as_bytes())?;
    if summary.finished {
        export(recipe, &mut trainer, settings, options, before + began.elapsed().as_secs_f64())
    } else {
        println!("stopped after {} steps; the same command goes on", summary.steps);
        Ok(())
    }
}

fn told(before: f64, began: Instant) -> String {
    format!("{:.1}", before + began.elapsed().as_secs_f64())
}

fn minutes(time: Duration) -> String {
    format!("{:.0} min", time.as_secs_f64() / 60.0)
}

fn seconds_file(run: &Path) -> std::path::PathBuf {
    run.join("seconds.txt")
}

/// What the runs before took.
fn seconds_before(run: &Path) -> f64 {
    std::fs::read_to_string(seconds_file(run)).ok().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

/// New leaves in the order of their names, for what `load` asks for; see [`initial`].
pub(super) fn begin<M>(
    seed: u64,
    device: Device,
    load: impl FnOnce(&Weights<'_>) -> Result<M>,
) -> Result<Vec<(String, Tensor)>> {
    initial(Noise::seeded(seed ^ 0x696e_6974), device, Initial::torch, load)
}

/// Takes the weights of a trained model.
fn begin_with(recipe: &impl Recipe, from: &Path) -> Result<()> {
    let all = recipe.parameters().named();
    for model in recipe.models() {
        let folder = from.join(&model.folder);
        let source = Safetensors::open(&folder)?;
        let loaded = source.load_all()?;
        let to: Vec<(String, Tensor)> = all
            .iter()
            .filter_map(|(name, value)| {
                Some((name.strip_prefix(&model.prefix)?.to_owned(), value.shallow_clone()))
            })
            .collect();
        let loaded = loaded
            .into_iter()
            .map(|(name, value)| Ok((name, value.f_to_kind(Kind::Float)?)))
            .collect::<Result<Vec<_>>>()?;
        copy_parameters(&source.what(), &loaded, &to)?;
    }
    Ok(())
}

/// Writes the averages as models, and the card.
fn export(
    recipe: &impl Recipe,
    trainer: &mut Trainer,
    settings: &Settings,
    options: &Options,
    seconds: f64,
) -> Result<()> {
    let averages = trainer.ema().map_or_else(|| recipe.parameters().named(), |ema: &mut Ema| ema.averages());
    for model in recipe.models() {
        let folder = options.out.join(&model.folder);
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let tensors = averages
            .iter()
            .filter_map(|(name, value)| Some((name.strip_prefix(&model.prefix)?.to_owned(), value)))
            .map(|(name, value)| Ok((name, value.f_to_kind(Kind::Half)?)))
            .collect::<Result<Vec<_>>>()?;
        save(folder.join(format!("{}.safetensors", model.stem)), &tensors, &[("format", "pt")])?;
        let config = format!("{:#}\n", Value::Object(model.config.fields().clone()));
        replace(folder.join("config.json"), config.as_bytes())?;
    }
    recipe.write_more(&options.out)?;
    let card = recipe.card().render(settings, options, trainer.steps_done(), seconds);
    replace(options.out.join("README.md"), card.as_bytes())?;
    println!("{}: written to {}", options.name, options.out.display());
    Ok(())
}
