//! One call of a denoiser, again and again: what `benches/reference/unet_side_by_side.py` sets beside diffusers.
//!
//! `denoiser-step MODEL_DIR INPUTS.safetensors [--train]`
//!
//! Conditions are prepared once. Each line on stdin is answered by a line on stdout: `step` by the seconds of one call;
//! `check` by how far the last call's output is from `output` of the inputs at most.
//!
//! With `--train` a step is one of training, towards `target` of the inputs: conditions, forward, mean squared error,
//! backward, gradients clipped to norm 1, AdamW; and `check` is answered by the last loss.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights};
use controlgen_core::train::{AdamW, AdamWConfig, Optimizer, Parameters};
use controlgen_core::{Condition, Config, Denoiser, Error, Pass, Placement, Prepared, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::{load_denoiser, open_denoiser};
use tch::Tensor;

/// The conditions of all rows.
fn conditions(inputs: &Safetensors, rows: i64) -> Result<Vec<Condition>> {
    let Some(text) = inputs.load("encoder_hidden_states")? else {
        return Ok((0..rows).map(|_| Condition::Null).collect());
    };
    let row = |row| Ok(Condition::Features(vec![("encoder_hidden_states".into(), text.f_get(row)?)]));
    (0..text.size3()?.0).map(row).collect()
}

/// A model in training.
struct Training {
    config: Config,
    optimizer: AdamW,
    conditions: Vec<Condition>,
    sample: Tensor,
    timestep: Tensor,
    target: Tensor,
    loss: f64,
}

impl Training {
    fn open(model: &Path, inputs: &Path) -> Result<Self> {
        let inputs = Safetensors::open(inputs)?;
        let leaves = Safetensors::open(model)?.load_all()?;
        let leaves = leaves.into_iter().map(|(name, leaf)| (name, leaf.set_requires_grad(true))).collect();
        let (sample, timestep) = (load(&inputs, "sample")?, load(&inputs, "timestep")?);
        let conditions = conditions(&inputs, sample.size4()?.0)?;
        Ok(Self {
            config: Config::open(&model.join("config.json"))?,
            optimizer: AdamW::new(&Parameters::new(leaves)?, AdamWConfig::default())?,
            conditions,
            sample,
            timestep,
            target: load(&inputs, "target")?,
            loss: f64::NAN,
        })
    }

    fn step(&mut self) -> Result<()> {
        let (pass, placement) = (Pass::default(), Placement::CPU);
        let weights = Weights::new(self.optimizer.parameters(), placement.options());
        let model = load_denoiser(&self.config, &weights, Predicts::EPSILON, placement)?;
        let prepared = model.prepare(&self.conditions, &pass)?;
        let made = model.predict(&self.sample, &self.timestep, &prepared, &pass)?;
        let loss = made.value.f_mse_loss(&self.target, tch::Reduction::Mean)?;
        self.loss = loss.f_double_value(&[])?;
        let mut gradients = self.optimizer.parameters().gradients(&loss)?;
        gradients.clip_norm(1.0)?;
        drop(weights);
        self.optimizer.step(&gradients, 1e-3)
    }

    fn answer(&mut self, line: &str) -> Result<f64> {
        match line {
            "step" => {
                let start = Instant::now();
                self.step()?;
                Ok(start.elapsed().as_secs_f64())
            }
            "check" => Ok(self.loss),
            other => Err(Error::value("line", "`step` or `check`", other)),
        }
    }
}

struct Step {
    model: Box<dyn Denoiser>,
    prepared: Prepared,
    inputs: Safetensors,
    sample: Tensor,
    timestep: Tensor,
    made: Option<Tensor>,
}

fn load(inputs: &Safetensors, name: &str) -> Result<Tensor> {
    inputs.load(name)?.ok_or_else(|| Error::value("inputs", format!("`{name}`"), "none of this name"))
}

impl Step {
    fn open(model: &Path, inputs: &Path) -> Result<Self> {
        let inputs = Safetensors::open(inputs)?;
        let model = open_denoiser(model, Predicts::EPSILON, Placement::CPU)?;
        let (sample, timestep) = (load(&inputs, "sample")?, load(&inputs, "timestep")?);
        let conditions = conditions(&inputs, sample.size4()?.0)?;
        let prepared = model.prepare(&conditions, &Pass::default())?;
        Ok(Self { model, prepared, inputs, sample, timestep, made: None })
    }

    fn answer(&mut self, line: &str) -> Result<f64> {
        match line {
            "step" => {
                self.made = None;
                let start = Instant::now();
                let made =
                    self.model.predict(&self.sample, &self.timestep, &self.prepared, &Pass::default())?;
                let seconds = start.elapsed().as_secs_f64();
                self.made = Some(made.value);
                Ok(seconds)
            }
            "check" => {
                let made = self.made.as_ref().ok_or_else(|| Error::value("line", "`step` first", line))?;
                Ok(made.f_sub(&load(&self.inputs, "output")?)?.f_abs()?.f_max()?.f_double_value(&[])?)
            }
            other => Err(Error::value("line", "`step` or `check`", other)),
        }
    }
}

/// Answers each line.
fn serve(mut answer: impl FnMut(&str) -> Result<f64>) -> Result<()> {
    let fail = |error| Error::io("stdin and stdout", error);
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let found = answer(line.map_err(fail)?.trim())?;
        writeln!(out, "{found}").and_then(|()| out.flush()).map_err(fail)?;
    }
    Ok(())
}

fn run() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    match &arguments[..] {
        [model, inputs] => {
            let _no_gradients = tch::no_grad_guard();
            let mut step = Step::open(model, inputs)?;
            serve(|line| step.answer(line))
        }
        [model, inputs, train] if train.as_os_str() == "--train" => {
            let mut training = Training::open(model, inputs)?;
            serve(|line| training.answer(line))
        }
        _ => {
            Err(Error::value("arguments", "MODEL_DIR INPUTS.safetensors [--train]", format!("{arguments:?}")))
        }
    }
}

fn main() -> ExitCode {
    benches::exit(run())
}
