//! Outputs are those of diffusers.

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Pass, Placement};
use tch::Tensor;

use crate::support::{Case, MODELS, folder, open};

#[test]
fn predictions_are_those_of_diffusers() {
    let _no_gradients = tch::no_grad_guard();
    let mut worst: f64 = 0.0;
    for (name, learned) in MODELS {
        let model = open(name, learned, Placement::CPU);
        let case = Case::of(name, &*model);
        let prepared = model.prepare(&case.conditions(), &Pass::default()).unwrap();
        let made = model.predict(&case.x(), &case.get("timestep"), &prepared, &Pass::default()).unwrap();
        let found = match made.variance {
            Some(variance) => Tensor::cat(&[made.value, variance], 1),
            None => made.value,
        };
        let expected = case.get("output");
        assert_eq!(found.size(), expected.size(), "{name}");
        let distance = (&found - &expected).abs().max().double_value(&[]);
        println!("{name}: {distance:.2e} of {:.2}", expected.abs().max().double_value(&[]));
        assert!(distance <= 2e-5, "{name}: {distance}");
        worst = worst.max(distance);
    }
    println!("the most of all: {worst:.2e}");
}

#[test]
fn sizes_are_halved_upwards_as_by_diffusers() {
    let _no_gradients = tch::no_grad_guard();
    for name in ["unet_sd1", "unet_sdxl"] {
        let model = open(name, false, Placement::CPU);
        let case = Case::of(name, &*model);
        let odd = Safetensors::open(folder(name).join("odd.safetensors")).unwrap();
        let prepared = model.prepare(&case.conditions(), &Pass::default()).unwrap();
        let x = odd.load("sample").unwrap().unwrap();
        let made = model.predict(&x, &case.get("timestep"), &prepared, &Pass::default()).unwrap();
        let distance = (made.value - odd.load("output").unwrap().unwrap()).abs().max().double_value(&[]);
        assert!(distance <= 2e-5, "{name}: {distance}");
    }
}
