//! The watermark and its detector, by the distributions that they claim.
#![allow(clippy::unwrap_used, clippy::panic)]

use controlgen_core::noise::Stream;
use controlgen_core::testing::{TableLm, TableLmConfig, ks_test, normal_cdf};
use controlgen_core::{Error, Pass, TokenControl, TokenControls};
use controlgen_text::controls::{Detection, Watermark, WatermarkDetector};
use controlgen_text::search::{Choice, Search, Task};
use tch::Tensor;

const ALPHA: f64 = 0.001;

fn watermark(key: u64) -> Watermark {
    Watermark::new(key, 0.25, 2.0).unwrap()
}

/// `n` texts of a table model of 60 tokens.
fn texts(controls: &TokenControls, n: usize, length: usize) -> Vec<Vec<i64>> {
    let lm =
        TableLm::new(&TableLmConfig { vocab: 60, eos: vec![], context: 4096, ..TableLmConfig::default() });
    let (lm, prompts) = (lm.unwrap(), [vec![0]]);
    let pass = Pass::default();
    let task = Task { lm: &lm, prompts: &prompts, controls, pass, max_new_tokens: length, eos: &[], n };
    let found = Choice::Sample { seed: 3, first: 0 }.run(&task, &mut ()).unwrap();
    found.into_iter().map(|hypothesis| hypothesis.ids).collect()
}

/// The z of a sample is that of a whole number; a uniform number within its step makes it continuous.
fn smooth(found: Detection, stream: &mut Stream) -> f64 {
    found.z + (stream.uniform() - 0.5) / (found.tokens as f64 * 0.25 * 0.75).sqrt()
}

/// Row by row, of texts that a model says, each under a key of its own; and of random tokens under one key.
#[test]
fn z_is_standard_normal_on_unmarked_text() {
    let mut stream = Stream::new(11, 0);
    for context in [1, 2] {
        let texts = texts(&TokenControls::new(), 300, 500);
        let z = texts.iter().zip(0u64..).map(|(text, key)| {
            let found =
                WatermarkDetector::new(watermark(key).context(context).unwrap()).detect(text).unwrap();
            assert!((found.p_value - (1.0 - normal_cdf(found.z))).abs() < 1e-9);
            smooth(found, &mut stream)
        });
        let z: Vec<f64> = z.collect();
        let p = ks_test(&z, normal_cdf).unwrap();
        assert!(p > ALPHA, "context {context}: p = {p}");
    }
    let mut draw = Stream::new(12, 0);
    let detector = WatermarkDetector::new(watermark(5));
    let z = (0..400).map(|_| {
        let text: Vec<i64> = (0..400).map(|_| (draw.uniform() * 20_000.0) as i64).collect();
        smooth(detector.detect(&text).unwrap(), &mut stream)
    });
    let p = ks_test(&z.collect::<Vec<_>>(), normal_cdf).unwrap();
    assert!(p > ALPHA, "one key: p = {p}");
}

/// Of a text that repeats itself, one draw counts once.
#[test]
fn repeated_tokens_count_once() {
    let text: Vec<i64> = (0..400).map(|i| i % 20).collect();
    let spread = |detector: fn(Watermark) -> WatermarkDetector| {
        let z = (0..300).map(|key| detector(watermark(key)).detect(&text).unwrap());
        let all: Vec<Detection> = z.collect();
        (all[0].tokens, all.iter().map(|found| found.z * found.z).sum::<f64>() / 300.0)
    };
    let (tokens, once) = spread(WatermarkDetector::new);
    assert_eq!(tokens, 20);
    // The variance of 300 standard normal numbers is within 0.75 … 1.29 but for one in a thousand.
    assert!((0.75..1.29).contains(&once), "{once}");
    let (tokens, every) = spread(|watermark| WatermarkDetector::new(watermark).count_repeated());
    assert_eq!(tokens, 399);
    assert!(every > 10.0, "{every}");
}

#[test]
fn marked_text_is_detected_by_its_key_alone() {
    for context in [1, 3] {
        let marked = watermark(99).context(context).unwrap();
        let texts = texts(&TokenControls::new().with(marked), 40, 200);
        for text in &texts {
            let found = WatermarkDetector::new(marked).detect(text).unwrap();
            assert!(found.z > 4.0 && found.p_value < 1e-4, "{found:?}");
        }
        let other = WatermarkDetector::new(watermark(98).context(context).unwrap());
        let mean = texts.iter().map(|text| other.detect(text).unwrap().z).sum::<f64>() / 40.0;
        assert!(mean.abs() < 1.0, "{mean}");
    }
}

/// The scores are the model's with δ on the green ones, of which there is a share γ; the hash stays what it is.
#[test]
fn green_tokens_gain_delta() {
    let marked = watermark(7).context(2).unwrap();
    let mut state = marked.start(&[vec![4], vec![8, 1, 6]]).unwrap();
    let plain = Tensor::arange(20_000, tch::kind::FLOAT_CPU).sin().repeat([2, 1]);
    let gained = |state: &mut Vec<Vec<i64>>| -> Vec<Vec<f32>> {
        (marked.score(state, plain.copy()).unwrap() - &plain).try_into().unwrap()
    };
    let check = |row: &[f32], before: &[i64]| {
        for (token, gain) in (0i64..).zip(row) {
            let green = marked.is_green(before, token);
            assert!((gain - if green == Some(true) { 2.0 } else { 0.0 }).abs() < 1e-5, "{before:?}, {token}");
        }
        row.iter().filter(|gain| **gain > 1.0).count()
    };
    let first = gained(&mut state);
    // Too few tokens before it; then 5,000 green ones, with a deviation of 61.
    assert_eq!(check(&first[0], &[4]), 0);
    assert!((4_800..5_200).contains(&check(&first[1], &[1, 6])));
    marked.advance(&mut state, &[3, 9]).unwrap();
    let second = gained(&mut state);
    assert!((4_800..5_200).contains(&check(&second[0], &[4, 3])));
    check(&second[1], &[6, 9]);
    let green: Vec<i64> = (0..24).filter(|&token| watermark(7).is_green(&[5], token) == Some(true)).collect();
    assert_eq!(green, GREEN_AFTER_5);
}

/// Under key 7, γ = 1/4: worked out in Python from the formula in the documentation.
const GREEN_AFTER_5: [i64; 6] = [4, 6, 8, 10, 14, 22];

#[test]
fn bad_input() {
    for (gamma, delta) in [(0.0, 1.0), (1.0, 1.0), (f64::NAN, 1.0), (0.5, 0.0), (0.5, f64::NAN), (0.5, 1e4)] {
        assert!(matches!(Watermark::new(1, gamma, delta), Err(Error::Value { .. })), "{gamma}, {delta}");
    }
    for context in [0, 65] {
        assert!(matches!(watermark(1).context(context), Err(Error::Value { .. })));
    }
    let detector = WatermarkDetector::new(watermark(1).context(3).unwrap());
    assert!(matches!(detector.detect(&[1, 2, 3]), Err(Error::Value { .. })));
    assert!(detector.detect(&[1, 2, 3, 4]).is_ok());
}
