//! Bad input: an error that says what was expected, never a panic.

use controlgen_core::{Error, Result, TokenControl};
use controlgen_text::controls::*;
use tch::{Kind, Tensor};

use super::{after, tensor};

/// An error in an argument, which says these things.
#[track_caller]
fn refused<T>(made: Result<T>, says: &[&str]) {
    let error = made.err().expect("an error");
    assert!(matches!(error, Error::Value { .. }), "{error}");
    let text = error.to_string();
    assert!(says.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn numbers_outside_their_range() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.1, 1e-40, 1e40, 0.0] {
        refused(Temperature::new(bad), &["temperature", "1e-30 ..= 1e30"]);
        refused(RepetitionPenalty::new(bad), &["repetition_penalty", "1e-30 ..= 1e30"]);
    }
    for bad in [f64::NAN, f64::INFINITY, -1e-9, 1.0 + 1e-9] {
        refused(TopP::new(bad), &["top_p", "0 ..= 1", &bad.to_string()]);
        refused(MinP::new(bad), &["min_p", "0 ..= 1", &bad.to_string()]);
    }
    for bad in [f64::NAN, f64::INFINITY, -0.5, 0.0, 1.0] {
        refused(Typical::new(bad), &["typical_p", "above 0 and below 1"]);
        refused(EpsilonCutoff::new(bad), &["epsilon_cutoff", "above 0 and below 1"]);
        refused(EtaCutoff::new(bad), &["eta_cutoff", "above 0 and below 1"]);
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e31] {
        refused(FrequencyPresence::new(bad, 0.0), &["frequency_penalty"]);
        refused(FrequencyPresence::new(0.0, bad), &["presence_penalty"]);
    }
    refused(TopK::new(0), &["top_k", "at least 1"]);
    refused(NoRepeatNgram::new(0), &["no_repeat_ngram_size", "at least 1"]);
    refused(TopK::new(1).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
    refused(TopP::new(0.5).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
    refused(MinP::new(0.5).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
    refused(Typical::new(0.5).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
    refused(EpsilonCutoff::new(0.5).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
    refused(EtaCutoff::new(0.5).unwrap().min_tokens_to_keep(0), &["min_tokens_to_keep"]);
}

#[test]
fn token_ids_and_sequences() {
    refused(Suppress::new([]), &["suppressed tokens", "at least one"]);
    refused(Suppress::new([3, -1]), &["suppressed tokens", "-1"]);
    refused(MinLength::new(3, []), &["end-of-text", "at least one"]);
    refused(MinLength::total(3, [-7]), &["end-of-text", "-7"]);
    refused(ForcedPrefix::new([]), &["forced prefix", "at least one"]);
    refused(ForcedPrefix::new([1, -2]), &["forced prefix", "-2"]);
    refused(BannedWords::new(Vec::<Vec<i64>>::new()), &["banned words", "at least one"]);
    refused(BannedWords::new([vec![1], vec![]]), &["banned words", "at least one"]);
    refused(BannedWords::new([vec![1, -3]]), &["banned words", "-3"]);
    refused(LogitBias::new([]), &["biased tokens", "at least one"]);
    refused(LogitBias::new([(-1, 1.0)]), &["biased tokens", "-1"]);
    refused(LogitBias::new([(1, 1.0), (1, 2.0)]), &["biased tokens", "[1] twice"]);
    refused(LogitBias::sequences([(vec![], 1.0)]), &["biased tokens", "at least one"]);
    for bad in [f64::NAN, f64::INFINITY, 1e39] {
        refused(LogitBias::new([(1, bad)]), &["logit_bias"]);
    }
    assert!(LogitBias::new([(1, f64::NEG_INFINITY)]).is_ok());
}

#[test]
fn ids_that_the_vocabulary_lacks() {
    fn score(control: &impl TokenControl) -> Result<Tensor> {
        after(control, &[vec![0]], &[vec![]], &tensor(&[vec![0.0; 5]]))
    }
    let says = ["0 .. 5", "found 5"];
    refused(score(&Suppress::new([5]).unwrap()), &says);
    refused(score(&BannedWords::new([[5]]).unwrap()), &says);
    refused(score(&BannedWords::new([[5, 1]]).unwrap()), &says);
    refused(score(&LogitBias::new([(5, 1.0)]).unwrap()), &says);
    refused(score(&LogitBias::sequences([([1, 5], 1.0)]).unwrap()), &says);
    refused(score(&ForcedPrefix::new([5]).unwrap()), &says);
    refused(score(&MinLength::new(2, [5]).unwrap()), &says);
    refused(score(&MinLength::new(0, [5]).unwrap()), &says);
}

/// Every control refuses scores of another shape or type, and rows that are not those of its state.
#[test]
fn other_tensors_and_other_rows() {
    fn check(name: &str, control: &impl TokenControl, follows_rows: bool) {
        let prompts = [vec![1], vec![2]];
        let score = |logits: Tensor| control.score(&mut control.start(&prompts).unwrap(), logits);
        let cpu = |kind| (kind, tch::Device::Cpu);
        assert!(score(Tensor::zeros([2, 4], cpu(Kind::Float))).is_ok(), "{name}");
        for size in [vec![4], vec![2, 1, 4], vec![2, 0], vec![0, 4]] {
            let error = score(Tensor::zeros(&size, cpu(Kind::Float))).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{name}: {error}");
        }
        for kind in [Kind::Double, Kind::Half, Kind::BFloat16, Kind::Int64] {
            let error = score(Tensor::zeros([2, 4], cpu(kind))).unwrap_err();
            assert!(matches!(error, Error::Kind { .. }), "{name}: {error}");
        }
        if follows_rows {
            refused(score(Tensor::zeros([3, 4], cpu(Kind::Float))), &["rows", "2", "3"]);
            refused(control.advance(&mut control.start(&prompts).unwrap(), &[1]), &["rows", "2", "1"]);
            refused(control.advance(&mut control.start(&prompts).unwrap(), &[1, -1]), &["-1"]);
        }
    }
    check("temperature", &Temperature::new(0.5).unwrap(), false);
    check("top-k", &TopK::new(2).unwrap(), false);
    check("top-p", &TopP::new(0.5).unwrap(), false);
    check("top-p 1", &TopP::new(1.0).unwrap(), false);
    check("min-p", &MinP::new(0.5).unwrap(), false);
    check("typical", &Typical::new(0.5).unwrap(), false);
    check("epsilon", &EpsilonCutoff::new(0.5).unwrap(), false);
    check("eta", &EtaCutoff::new(0.5).unwrap(), false);
    check("suppress", &Suppress::new([1]).unwrap(), false);
    check("repetition", &RepetitionPenalty::new(1.5).unwrap(), true);
    check("normalised", &RepetitionPenalty::new(1.5).unwrap().normalised(), true);
    check("frequency", &FrequencyPresence::new(1.0, 1.0).unwrap(), true);
    check("n-gram", &NoRepeatNgram::new(2).unwrap(), true);
    check("banned", &BannedWords::new([vec![1], vec![2, 3]]).unwrap(), true);
    check("bias", &LogitBias::sequences([(vec![1], 0.5), (vec![2, 3], 1.0)]).unwrap(), true);
    check("min length", &MinLength::new(2, [1]).unwrap(), true);
    check("prefix", &ForcedPrefix::new([1]).unwrap(), true);
}

#[test]
fn prompts_with_negative_ids() {
    let prompts = [vec![1], vec![2, -3]];
    let says = ["prompt 1", "-3"];
    refused(RepetitionPenalty::new(1.5).unwrap().start(&prompts).map(|_| ()), &says);
    refused(NoRepeatNgram::new(2).unwrap().start(&prompts).map(|_| ()), &says);
    refused(BannedWords::new([[1]]).unwrap().start(&prompts).map(|_| ()), &says);
    refused(LogitBias::new([(1, 1.0)]).unwrap().start(&prompts).map(|_| ()), &says);
}
