//! Labelled texts, their splits, and classifiers of texts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod data;
mod directories;
mod numbers;
mod training;

use common::folder;
use controlgen_core::{LanguageModel, Placement};
use controlgen_text::models;
use tch::{Kind, Tensor};

fn model(name: &str) -> Box<dyn LanguageModel> {
    models::open(&folder(name), Placement::CPU).unwrap()
}

fn numbers_of(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

#[track_caller]
fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance, "{a} instead of {b}");
    }
}

/// Gives a classifier's parameters other numbers than those it begins with, which say the same of every text.
fn shake(parameters: &[(String, Tensor)]) {
    let _guard = tch::no_grad_guard();
    for (i, (name, value)) in parameters.iter().enumerate() {
        let n = value.numel() as i64;
        let numbers =
            (Tensor::arange(n, (Kind::Float, tch::Device::Cpu)) * 0.7 + i as f64).sin().view_as(value);
        let numbers = if name.ends_with("scale") { numbers * 0.3 + 1.0 } else { numbers };
        value.shallow_clone().copy_(&numbers);
    }
}
