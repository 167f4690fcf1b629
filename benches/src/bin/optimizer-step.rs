//! How long a step of an optimizer takes: `benches/reference/optimizer_side_by_side.py` asks, beside PyTorch's.
//!
//! Reads lines `OPTIMIZER SET STEPS` and answers each with the seconds of a step, the mean over so many.

use std::io::{BufRead, Write};
use std::time::Instant;

use controlgen_core::train::{
    Adafactor, AdafactorConfig, AdamW, AdamWConfig, Gradients, Optimizer, Parameters, Sgd, SgdConfig,
};
use controlgen_core::{Error, Result};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

/// The shapes of a set: those of a LoRA of rank 8 on SmolLM2-135M's q and v, or ten million numbers in few.
fn shapes(set: &str) -> Result<Vec<[i64; 2]>> {
    match set {
        "lora" => Ok((0..30).flat_map(|_| [[8, 576], [576, 8], [8, 576], [192, 8]]).collect()),
        "10M" => Ok(vec![[1024, 1024]; 10]),
        other => Err(Error::value("set", "lora or 10M", other)),
    }
}

struct Timed {
    optimizer: Box<dyn Optimizer>,
    gradients: Gradients,
}

impl Timed {
    fn new(name: &str, set: &str) -> Result<Self> {
        let leaf = |shape: &[i64; 2]| Tensor::f_ones(shape, FLOAT_CPU)?.f_set_requires_grad(true);
        let shapes = shapes(set)?;
        let named = shapes.iter().enumerate().map(|(i, shape)| Ok((i.to_string(), leaf(shape)?)));
        let parameters = Parameters::new(named.collect::<Result<_>>()?)?;
        let mut gradients = Gradients::none(&parameters);
        let mut loss = Tensor::f_zeros([], FLOAT_CPU)?;
        for parameter in parameters.iter() {
            let weight = Tensor::f_rand_like(&parameter.value)?;
            loss = loss.f_add(&parameter.value.f_mul(&weight)?.f_sum(None::<Kind>)?)?;
        }
        gradients.add(&loss, &parameters)?;
        let optimizer: Box<dyn Optimizer> = match name {
            "AdamW" => Box::new(AdamW::new(&parameters, AdamWConfig::default())?),
            "SGD" => Box::new(Sgd::new(&parameters, SgdConfig { momentum: 0.9, ..SgdConfig::default() })?),
            "Adafactor" => Box::new(Adafactor::new(&parameters, AdafactorConfig::absolute())?),
            other => return Err(Error::value("optimizer", "AdamW, SGD or Adafactor", other)),
        };
        Ok(Self { optimizer, gradients })
    }

    fn seconds(&mut self, steps: u32) -> Result<f64> {
        let began = Instant::now();
        for _ in 0..steps {
            self.optimizer.step(&self.gradients, 1e-3)?;
        }
        Ok(began.elapsed().as_secs_f64() / f64::from(steps.max(1)))
    }
}

fn main() -> Result<()> {
    let mut known: std::collections::HashMap<String, Timed> = std::collections::HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Error::io("stdin", error))?;
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, set, steps] = fields[..] else {
            return Err(Error::value("request", "OPTIMIZER SET STEPS", line));
        };
        let steps = steps.parse().map_err(|_| Error::value("steps", "a number", steps))?;
        let timed = match known.entry(format!("{name} {set}")) {
            std::collections::hash_map::Entry::Occupied(timed) => timed.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(Timed::new(name, set)?),
        };
        let mut out = std::io::stdout();
        let written = writeln!(out, "{}", timed.seconds(steps)?).and_then(|()| out.flush());
        written.map_err(|error| Error::io("stdout", error))?;
    }
    Ok(())
}
