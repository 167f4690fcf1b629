//! Controls over the next token: against transformers, against their definitions, and at their edges.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers are not seen to be tests

mod bad_input;
mod definitions;
mod fixtures;
mod history;
mod sample;

use controlgen_core::{Result, TokenControl};
use tch::{Kind, Tensor};

/// What a control makes of scores after this history: prompts, and then the tokens generated, one row each.
fn after(
    control: &impl TokenControl,
    prompts: &[Vec<i64>],
    generated: &[Vec<i64>],
    logits: &Tensor,
) -> Result<Tensor> {
    let mut state = control.start(prompts)?;
    for step in 0..generated.first().map_or(0, Vec::len) {
        let tokens: Vec<i64> = generated.iter().map(|row| row[step]).collect();
        control.advance(&mut state, &tokens)?;
    }
    control.score(&mut state, logits.copy())
}

/// What a control makes of one row without a history.
fn alone(control: &impl TokenControl, row: &[f32]) -> Vec<f32> {
    rows(&after(control, &[vec![0]], &[vec![]], &tensor(&[row.to_vec()])).unwrap()).remove(0)
}

/// Scores `[B, V]`.
fn tensor(rows: &[Vec<f32>]) -> Tensor {
    let rows: Vec<Tensor> = rows.iter().map(|row| Tensor::from_slice(row)).collect();
    Tensor::stack(&rows, 0)
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    assert_eq!(tensor.kind(), Kind::Float);
    tensor.try_into().unwrap()
}

/// Which tokens are left.
fn left(row: &[f32]) -> Vec<usize> {
    (0..row.len()).filter(|&i| row[i] > f32::NEG_INFINITY).collect()
}

/// The softmax, in f64.
fn probs(row: &[f32]) -> Vec<f64> {
    let best = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weights: Vec<f64> = row.iter().map(|&x| (f64::from(x) - best).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// Equal, or apart by at most `tolerance`; infinities equal.
fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(a == b || (a - b).abs() <= tolerance, "{what}: token {i} is {a}, expected {b}");
    }
}
