//! A whole run: an edit beside its source, under classifier-free guidance.

use std::cell::Cell;

use controlgen_core::guidance::{Guided, Guider, Step};
use controlgen_core::noise::{Noise, NoiseSource};
use controlgen_core::{Condition, NoiseLevel, Parameterisation, Prediction};
use controlgen_diffusion::{Ddim, Sampler, sample, steps};
use controlgen_guidance::ClassifierFreeGuidance;
use tch::{Device, Kind, Tensor};

use crate::edits::{Chain, OnMaps, controls, explicit, mapper, relative};
use crate::toy::{D, P, Toy, positions, prompt};

const SAMPLES: i64 = 2;

fn chains() -> Vec<Chain> {
    let more = OnMaps::Reweight([1.0, 1.0, 2.0, 1.0, 1.0]);
    let cross = vec![(OnMaps::Replace(mapper(), [1.0; 5]), 0..4), (more, 0..6)];
    vec![("attn1", vec![(OnMaps::Swap, 0..3)]), ("attn2", cross)]
}

fn way() -> Vec<Step> {
    let times: Vec<f64> = (0..6).map(|i| 0.9 - 0.15 * f64::from(i)).collect();
    steps(&times, |t| NoiseLevel::from_alpha_bar(1.0 - t), NoiseLevel::CLEAN).unwrap()
}

/// The source's prompt is class 1, the edit's class 2; both rows of a sample begin with the same noise.
fn start() -> Tensor {
    let mut noise = Noise::seeded(9).streams(SAMPLES as usize);
    noise.normal(&[SAMPLES, D, 1, P], Kind::Double, Device::Cpu).unwrap().repeat([2, 1, 1, 1])
}

fn run(chains: &[Chain]) -> Tensor {
    let model = Toy::new();
    let conditions = vec![vec![Condition::Null], vec![Condition::Class(1), Condition::Class(2)]];
    let controls = controls(&model, chains, [2, 3]);
    let guider = Guider::new(Box::new(model), conditions, Some(controls), 1).unwrap().with_roles(2).unwrap();
    let guider = guider.with(ClassifierFreeGuidance::new(1.5).unwrap());
    let mut noise = Noise::seeded(1).streams(0);
    sample(&Ddim::new(0.0).unwrap(), &guider, start(), &way(), &mut noise).unwrap()
}

/// The same by hand: 4 rows without a condition, 4 with, of which the last two have edited maps.
fn by_hand(chains: &[Chain]) -> Tensor {
    let model = Toy::new();
    let (calls, edited) = (Cell::new(0), [(6, 4), (7, 5)]);
    let mut predict = |x: &Tensor, step: &Step| {
        calls.set(calls.get() + 1);
        let (text, keep): (Vec<_>, Vec<_>) = [0, 0, 0, 0, 2, 2, 3, 3].map(prompt).into_iter().unzip();
        let (text, keep) = (Tensor::stack(&text, 0), Tensor::stack(&keep, 0));
        let both = positions(&Tensor::cat(&[x, x], 0));
        let y = model.run(&both, &text, &keep, &|site, attn| {
            Ok(explicit(&model, chains, &edited, step.index, site, &attn))
        });
        let halves = y.transpose(1, 2).unsqueeze(2).chunk(2, 0);
        let value = &halves[0] + (&halves[1] - &halves[0]) * 1.5;
        Ok(Guided {
            x: x.shallow_clone(),
            prediction: Prediction::new(value, Parameterisation::Epsilon),
            shift: None,
        })
    };
    let mut noise = Noise::seeded(1).streams(0);
    let found = Ddim::new(0.0).unwrap().sample(&mut predict, start(), &way(), &mut noise).unwrap();
    assert_eq!(calls.get(), 6);
    found
}

#[test]
fn an_edit_is_made_beside_its_source() {
    let (found, plain) = (run(&chains()), run(&[]));
    assert!(relative(&found, &by_hand(&chains())) < 1e-10);
    assert!(relative(&plain, &by_hand(&[])) < 1e-10);
    // The sources are what they are alone; the edits are not.
    let sources = |x: &Tensor| x.narrow(0, 0, SAMPLES);
    let edits = |x: &Tensor| x.narrow(0, SAMPLES, SAMPLES);
    assert!(sources(&found).equal(&sources(&plain)));
    assert!(relative(&edits(&found), &edits(&plain)) > 1e-2);
}
