//! Training of the models that the repository carries. See [`USAGE`].

mod card;
mod denoiser;
mod pictures;
mod run;
mod text;

use std::path::PathBuf;

use controlgen_core::{Error, Placement, Result, device};
use tch::Kind;

use crate::number;
pub use card::Card;
pub use denoiser::{DenoiserRecipe, Pictures};
pub use run::{Model, Recipe, Settings, train};

/// What the command takes.
pub const USAGE: &str = "\
train NAME [options]
    Trains a model and writes it with its card. A run that was interrupted (Ctrl-C, a full disk) is taken up again by the
    same command.
  --out FOLDER       where the trained model goes; default benches/data/NAME
  --run FOLDER       checkpoints, tables, sample sheets; default .controlgen/training/NAME
  --steps N  --batch N  --rate R  --seed N  --evaluate-every N
                     instead of the recipe's own
  --from FOLDER      begin with the weights of a trained model of the same kind
  --device cpu | cuda:0
  --bf16             compute in bf16; parameters stay f32
  --export           train no more: write the model as the last checkpoint has it
NAME is one of:";

/// How many examples an epoch counts where each is drawn anew: none comes twice.
const DRAWN_ANEW: usize = 1 << 20;

/// What can be trained.
const NAMES: [&str; 2] = ["shapes-text", "shapes-pixel"];

/// Trains what the arguments say.
///
/// # Errors
/// What is wrong with the arguments, the files or the run.
pub fn command(arguments: impl Iterator<Item = String>) -> Result<()> {
    let options = Options::parse(arguments, &NAMES)?;
    match options.name.as_str() {
        "shapes-text" => {
            let settings = text::settings().with(&options);
            train(&mut text::TextTower::new(options.placement, settings.seed)?, &settings, &options)
        }
        _ => {
            let settings = pictures::pixel_settings().with(&options);
            train(&mut pictures::pixel(&options, settings.seed)?, &settings, &options)
        }
    }
}

/// Where shipped models lie.
pub fn models_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// What the command line says beside the recipe's own settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The recipe.
    pub name: String,
    /// Where the model goes.
    pub out: PathBuf,
    /// Where checkpoints and tables go.
    pub run: PathBuf,
    /// Instead of the recipe's.
    pub steps: Option<u64>,
    /// Instead of the recipe's.
    pub batch: Option<usize>,
    /// Instead of the recipe's.
    pub rate: Option<f64>,
    /// Instead of the recipe's.
    pub seed: Option<u64>,
    /// Instead of the recipe's.
    pub evaluate_every: Option<u64>,
    /// A trained model to begin with.
    pub from: Option<PathBuf>,
    /// What that model's card says of its runs.
    pub before: Option<String>,
    /// Where and in which type it is computed.
    pub placement: Placement,
    /// Whether the last checkpoint is only written as a model.
    pub export: bool,
}

impl Options {
    /// Reads the arguments.
    ///
    /// # Errors
    /// [`Error::Value`] for what is none of them.
    pub fn parse(mut arguments: impl Iterator<Item = String>, names: &[&str]) -> Result<Self> {
        let usage = || format!("{USAGE} {}", names.join(", "));
        let name = arguments.next().unwrap_or_default();
        if !names.contains(&name.as_str()) {
            return Err(Error::value("what to train", usage(), name));
        }
        let state = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.controlgen/training");
        let mut options = Self {
            out: models_folder().join(name.replacen('-', "/", 1)),
            run: state.join(&name),
            name,
            steps: None,
            batch: None,
            rate: None,
            seed: None,
            evaluate_every: None,
            from: None,
            before: None,
            placement: Placement::CPU,
            export: false,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))
            };
            match argument.as_str() {
                "--out" => options.out = value()?.into(),
                "--run" => options.run = value()?.into(),
                "--from" => options.from = Some(value()?.into()),
                "--steps" => options.steps = Some(number(&argument, &value()?)?),
                "--batch" => options.batch = Some(number(&argument, &value()?)?),
                "--rate" => options.rate = Some(number(&argument, &value()?)?),
                "--seed" => options.seed = Some(number(&argument, &value()?)?),
                "--evaluate-every" => options.evaluate_every = Some(number(&argument, &value()?)?),
                "--device" => options.placement.device = device(&value()?)?,
                "--bf16" => options.placement.kind = Kind::BFloat16,
                "--export" => options.export = true,
                other => return Err(Error::value("argument", usage(), other)),
            }
        }
        // Before the card is written anew, perhaps in the same folder.
        let card =
            options.from.as_ref().and_then(|from| std::fs::read_to_string(from.join("README.md")).ok());
        options.before = card.as_deref().and_then(Card::runs).map(str::to_owned);
        Ok(options)
    }
}
