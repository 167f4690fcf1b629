//! One call of a denoiser, again and again: what `benches/reference/unet_side_by_side.py` sets beside diffusers.
//!
//! `denoiser-step MODEL_DIR INPUTS.safetensors`
//!
//! Conditions are prepared once. Each line on stdin is answered by a line on stdout: `step` by the seconds of one call;
//! `check` by how far the last call's output is from `output` of the inputs at most.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Condition, Denoiser, Error, Pass, Placement, Prepared, Result};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::open_denoiser;
use tch::Tensor;

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
        let conditions = match inputs.load("encoder_hidden_states")? {
            None => (0..sample.size4()?.0).map(|_| Condition::Null).collect(),
            Some(text) => (0..text.size3()?.0)
                .map(|row| Ok(Condition::Features(vec![("encoder_hidden_states".into(), text.f_get(row)?)])))
                .collect::<Result<Vec<_>>>()?,
        };
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

fn run() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, inputs] = &arguments[..] else {
        return Err(Error::value("arguments", "MODEL_DIR INPUTS.safetensors", arguments.len()));
    };
    let _no_gradients = tch::no_grad_guard();
    let mut step = Step::open(model, inputs)?;
    let fail = |error| Error::io("stdin and stdout", error);
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let found = step.answer(line.map_err(fail)?.trim())?;
        writeln!(out, "{found}").and_then(|()| out.flush()).map_err(fail)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
