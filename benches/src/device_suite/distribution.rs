//! Whether what is drawn on a device comes from the distribution that it should.

use std::collections::HashMap;

use controlgen_core::noise::{Stream, TorchGenerator};
use controlgen_core::testing::{TableLm, TableLmConfig, chi_square};
use controlgen_core::{LanguageModel, Pass, Placement, Result, TokenControls};
use controlgen_text::controls::{Temperature, TopP};
use controlgen_text::search::{Choice, Search, Task};
use tch::{Device, Kind, Tensor};

use super::Row;

/// How many samples are drawn.
const SAMPLES: usize = 4096;
/// How improbable a statistic may be.
const ALPHA: f64 = 1e-3;

/// Samples of a table model, against its probabilities written out; and against the same samples on the CPU.
pub fn sampling(device: Device) -> Result<Vec<Row>> {
    let drawn = |device, controls: &TokenControls| -> Result<Vec<Vec<i64>>> {
        let placement = Placement::new(device, Kind::Float);
        let config = TableLmConfig { vocab: 5, seed: 3, placement, ..TableLmConfig::default() };
        let lm = TableLm::new(&config)?;
        let prompts = [vec![0]];
        let task = Task {
            lm: &lm,
            prompts: &prompts,
            controls,
            pass: Pass::default(),
            max_new_tokens: 2,
            eos: &[],
            n: SAMPLES,
        };
        let found = Choice::Sample { seed: 7, first: 0 }.run(&task, &mut ())?;
        Ok(found.into_iter().map(|hypothesis| hypothesis.ids).collect())
    };
    let plain = drawn(device, &TokenControls::new())?;
    let lm = TableLm::new(&TableLmConfig { vocab: 5, seed: 3, ..TableLmConfig::default() })?;
    let mut counts: HashMap<&[i64], u64> = HashMap::new();
    plain.iter().for_each(|ids| *counts.entry(ids).or_default() += 1);
    let (mut observed, mut expected) = (Vec::new(), Vec::new());
    for first in 0..lm.spec().vocab {
        for second in 0..lm.spec().vocab {
            observed.push(counts.get([first, second].as_slice()).copied().unwrap_or(0));
            expected.push(lm.log_prob(&[0], &[first, second])?.exp());
        }
    }
    let total: f64 = expected.iter().sum();
    expected.iter_mut().for_each(|p| *p /= total);
    let p = chi_square(&observed, &expected)?;
    let bound = Some((format!("≥ {ALPHA}"), p >= ALPHA));
    let figure = format!("p = {p:.3}");
    let check = format!("{SAMPLES} samples against the exact distribution (chi-square)");
    let mut rows = vec![Row { check, kind: "f32", figure, bound }];

    let controls = TokenControls::new().with(Temperature::new(0.7)?).with(TopP::new(0.8)?);
    for (name, controls) in [("no controls", TokenControls::new()), ("temperature, top-p", controls)] {
        let (here, cpu) = (drawn(device, &controls)?, drawn(Device::Cpu, &controls)?);
        let different = here.iter().zip(&cpu).filter(|(a, b)| a != b).count();
        // A uniform number may fall between two sums that are rounded differently.
        let bound = Some(("≤ 1".to_owned(), different <= 1));
        let check = format!("samples that differ from the CPU's, {name}");
        rows.push(Row { check, kind: "f32", figure: format!("{different} of {SAMPLES}"), bound });
    }
    Ok(rows)
}

/// Noise is made on the host: it is the same everywhere, to the bit.
pub fn noise(device: Device) -> Result<Vec<Row>> {
    let different = |here: &Tensor, cpu: &Tensor| -> Result<i64> {
        Ok(here.f_to_device(Device::Cpu)?.f_ne_tensor(cpu)?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
    };
    let shape = [3, 32, 32];
    let stream = |device| Stream::new(5, 1).normal(&shape, Kind::Float, device);
    let torch = |device| TorchGenerator::new(5).randn(&shape, Kind::Float, device);
    let found = [
        ("per-sample stream", different(&stream(device)?, &stream(Device::Cpu)?)?),
        ("PyTorch's CPU generator", different(&torch(device)?, &torch(Device::Cpu)?)?),
    ];
    let row = |(name, n): (&str, i64)| {
        let (check, figure) = (format!("numbers that differ from the CPU's, {name}"), format!("{n} of 3072"));
        Row { check, kind: "f32", figure, bound: Some(("0".into(), n == 0)) }
    };
    Ok(found.into_iter().map(row).collect())
}
