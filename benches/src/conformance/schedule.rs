//! A scheduler's steps over given model outputs, tensors in and tensors out.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use controlgen_core::guidance::{Guided, Step};
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, Prediction, Result};
use controlgen_diffusion::Scheduler;
use tch::{Device, Kind, Tensor};

use super::arguments::Arguments;

/// The input tensors.
const INPUTS: [&str; 3] = ["sample", "model_outputs", "noise"];

/// Noise that was recorded: that of the call under way.
struct Recorded {
    noise: Option<Tensor>,
    calls: Arc<AtomicUsize>,
}

impl NoiseSource for Recorded {
    fn normal(&mut self, shape: &[i64], kind: Kind, _: Device) -> Result<Tensor> {
        let Some(noise) = &self.noise else {
            return Err(Error::value("input tensor `noise`", "one, as the scheduler draws noise", "none"));
        };
        let z = entry("noise", noise, self.calls.load(Relaxed).saturating_sub(1))?;
        if z.size() != shape {
            return Err(Error::shape("noise", format!("[K, {shape:?}]"), &noise.size()));
        }
        Ok(z.f_to_kind(kind)?)
    }
}

/// Entry k of `[K, ..]`.
fn entry(name: &str, tensor: &Tensor, k: usize) -> Result<Tensor> {
    let (k, found) = (i64::try_from(k).unwrap_or(i64::MAX), tensor.size().first().copied().unwrap_or(0));
    if k >= found {
        let expected = format!("one for each call of the model, more than {found}");
        return Err(Error::value(format!("entries of {name}"), expected, found));
    }
    Ok(tensor.f_select(0, k)?)
}

pub fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["steps", "eta"])?;
    let [config, inputs, outputs] =
        arguments.paths(["SCHEDULER_CONFIG.json", "INPUTS.safetensors", "OUTPUTS.safetensors"])?;
    let steps = usize::try_from(arguments.number("steps", 0)?).unwrap_or(usize::MAX);
    let eta = match arguments.get("eta") {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| Error::value("--eta", "a number in 0 ..= 1", text))?),
    };
    run_one(&config, &inputs, &outputs, steps, eta)
}

/// One config on one file of inputs.
fn run_one(config: &Path, inputs: &Path, outputs: &Path, steps: usize, eta: Option<f64>) -> Result<()> {
    let scheduler = Scheduler::open(config)?;
    let scheduler = match eta {
        None => scheduler,
        Some(eta) => scheduler.with_eta(eta)?,
    };
    let inputs = Safetensors::open(inputs)?;
    if let Some(name) = inputs.names().iter().find(|name| !INPUTS.contains(&name.as_str())) {
        return Err(Error::value("input tensor", format!("one of {}", INPUTS.join(", ")), name));
    }
    let needed = |name: &str| -> Result<Tensor> {
        inputs.load(name)?.ok_or_else(|| Error::value(format!("input tensor `{name}`"), "one", "none"))
    };
    let (sample, model_outputs) = (needed("sample")?, needed("model_outputs")?);
    let channels = sample.size().get(1).copied().unwrap_or(0);
    let steps = scheduler.steps(steps)?;
    // diffusers keeps the samples of some classes as x/α.
    let scale = |step: &Step| if scheduler.scales_samples() { step.level.alpha() } else { 1.0 };
    let calls = Arc::new(AtomicUsize::new(0));
    let (mut timesteps, mut samples) = (Vec::new(), Vec::new());
    let mut predict = |x: &Tensor, step: &Step| {
        let k = calls.fetch_add(1, Relaxed);
        if k > 0 {
            samples.push(x.f_div_scalar(scale(step))?);
        }
        timesteps.push(step.timestep);
        let output = entry("model_outputs", &model_outputs, k)?;
        let form = scheduler.parameterisation();
        let prediction = if output.size().get(1) == Some(&(2 * channels)) {
            Prediction::with_variance(&output, channels, form)?
        } else {
            Prediction::new(output, form)
        };
        Ok(Guided { x: x.shallow_clone(), prediction, shift: None })
    };
    let mut noise = Recorded { noise: inputs.load("noise")?, calls: Arc::clone(&calls) };
    let x = match steps.first() {
        Some(first) => sample.f_mul_scalar(scale(first))?,
        None => sample,
    };
    let last = scheduler.sampler().sample(&mut predict, x, &steps, &mut noise)?;
    // Most runs end without noise, α = 1.
    let scale = steps.last().filter(|_| scheduler.scales_samples()).map_or(1.0, |step| step.next.alpha());
    samples.push(last.f_div_scalar(scale)?);
    let tensors = [
        ("timesteps".to_owned(), Tensor::f_from_slice(&timesteps)?),
        ("samples".to_owned(), Tensor::f_stack(&samples, 0)?),
    ];
    save(outputs, &tensors, &[("format", "pt")])
}
