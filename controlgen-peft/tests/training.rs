//! Adapters under the training core: they learn, in f32 and over a model in bf16, and resume to the bit.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::Path;

use common::model_in;
use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::train::{
    AdamW, AdamWConfig, Batch, Loss, Parameters, Schedule, StepReport, Task, Trainer, TrainerConfig,
};
use controlgen_core::{Adapter, Controls, LanguageModel, Pass, Placement, Result};
use controlgen_peft::{Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig};
use tch::{Kind, Tensor};

const STEPS: u64 = 30;

/// Rows of ids, whose every token is to be the next but one of the row before.
struct NextTokens {
    lm: Box<dyn LanguageModel>,
    adapter: Box<dyn Adapter>,
}

impl Task for NextTokens {
    fn examples(&self) -> usize {
        12
    }

    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss> {
        let row =
            |&example: &usize| -> Vec<i64> { (0..6).map(|t| (7 * example as i64 + 3 * t) % 40).collect() };
        let rows: Vec<Vec<i64>> = batch.examples.iter().map(row).collect();
        let ids = Tensor::from_slice2(&rows);
        let controls = Controls::bind(self.lm.sites(), vec![self.adapter.handle()])?;
        let logits = common::forward(&*self.lm, &Pass::with_controls(&controls), &ids, None);
        let logits = logits.f_narrow(1, 0, 5)?.f_to_kind(Kind::Float)?.f_flatten(0, 1)?;
        let targets = ids.f_narrow(1, 1, 5)?.f_reshape([-1])?;
        Ok(logits.cross_entropy_for_logits(&targets).into())
    }
}

fn adapters(lm: &dyn LanguageModel) -> Vec<(f64, Box<dyn Adapter>)> {
    let sites = lm.sites();
    let prefix = PrefixConfig { num_virtual_tokens: 4, ..Default::default() };
    let target_modules = vec!["self_attn".into(), "mlp".into()];
    let bottleneck = BottleneckConfig { target_modules, reduction_factor: 4, ..Default::default() };
    vec![
        (0.02, Box::new(Lora::new(LoraConfig { r: 4, ..Default::default() }, sites, 1).unwrap())),
        (0.05, Box::new(Ia3::new(Ia3Config::default(), sites).unwrap())),
        (0.05, Box::new(Prefix::new(prefix, sites, 1).unwrap())),
        (0.02, Box::new(Bottleneck::new(bottleneck, sites, 1).unwrap())),
    ]
}

/// The losses of a run, of `steps` now, and the parameters at its end.
fn run(kind: Kind, number: usize, directory: &Path, steps: u64) -> (Vec<f64>, Vec<Tensor>) {
    let lm = model_in("llama_gqa_tied", Placement::CPU.with_kind(kind));
    let (rate, adapter) = adapters(&*lm).swap_remove(number);
    let parameters = Parameters::new(adapter.parameters()).unwrap();
    let optimizer = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    let mut config = TrainerConfig::new(STEPS, 4, Schedule::linear(rate, STEPS).unwrap());
    config.directory = Some(directory.to_owned());
    config.clip_norm = Some(1.0);
    let mut task = NextTokens { lm, adapter };
    let mut trainer = Trainer::new(config, optimizer).unwrap();
    trainer.resume(&task).unwrap();
    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.loss);
        if report.step + 1 == steps { Flow::Stop } else { Flow::Continue }
    };
    trainer.run(&mut task, &mut watch, &CancelToken::new()).unwrap();
    (losses, parameters.iter().map(|p| p.value.detach()).collect())
}

#[test]
fn every_adapter_learns_and_is_resumed_to_the_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for number in 0..4 {
            let directories = [0, 1].map(|_| tempfile::tempdir().unwrap());
            let (losses, whole) = run(kind, number, directories[0].path(), STEPS);
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            let (begin, end) = (mean(&losses[..3]), mean(&losses[27..]));
            println!("{kind:?}, adapter {number}: {begin:.3} to {end:.3}");
            assert!(end < 0.85 * begin, "{kind:?}, adapter {number}: {begin} to {end}");
            let _ = run(kind, number, directories[1].path(), 13);
            let (after, parts) = run(kind, number, directories[1].path(), STEPS);
            assert_eq!(after, losses[13..], "{kind:?}, adapter {number}");
            assert!(whole.iter().zip(&parts).all(|(a, b)| a.equal(b)), "{kind:?}, adapter {number}");
        }
    }
}
