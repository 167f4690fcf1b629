//! The contracts of `controlgen_core::testing` on everything of this crate that implements a trait.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{ENCODER_DECODERS, MODELS, folder};
use controlgen_core::testing::contract;
use controlgen_core::{Placement, TokenControl, TokenControls};
use controlgen_text::arithmetic::{ModelArithmetic, Term};
use controlgen_text::controls::features::{Alliteration, Repetition, WordLength, WordList};
use controlgen_text::controls::*;
use controlgen_text::models;
use controlgen_text::words::TokenTrie;
use tch::Kind;

#[test]
fn language_models() {
    // The models are small: threads would only wait for each other.
    tch::set_num_threads(1);
    for name in MODELS.into_iter().chain(ENCODER_DECODERS) {
        let lm = models::open(&folder(name), Placement::CPU).unwrap();
        contract::language_model(&*lm).unwrap_or_else(|violation| panic!("{name}: {violation}"));
    }
}

/// Of terms that read the whole prompt: what a term that does not says of a text depends on where its prompt ends.
#[test]
fn arithmetic() {
    tch::set_num_threads(1);
    for name in ["gpt2_gelu_hub", "llama_gqa_tied", "qwen2"] {
        let a = Term::new(models::open(&folder(name), Placement::CPU).unwrap());
        let amateur = a.first_layers(1).unwrap();
        for (what, expression) in [
            ("one term", 1.5 * &a),
            ("two of one model", 1.5 * &a - 0.5 * a.after([3, 1, 4])),
            ("two models", &a - 0.4 * amateur.after([2])),
            ("three", a.after([7]) - 0.4 * &amateur + 0.5 * &a),
        ] {
            let lm = ModelArithmetic::new(expression).unwrap();
            contract::language_model(&lm).unwrap_or_else(|violation| panic!("{name}, {what}: {violation}"));
        }
    }
    // An encoder–decoder's terms differ by what the encoder reads.
    for name in ENCODER_DECODERS {
        let a = Term::new(models::open(&folder(name), Placement::CPU).unwrap());
        let lm = ModelArithmetic::new(&a - 0.5 * a.instead([3, 1]) + 0.2 * a.after([4])).unwrap();
        contract::language_model(&lm).unwrap_or_else(|violation| panic!("{name}: {violation}"));
    }
}

#[test]
fn encoders() {
    tch::set_num_threads(1);
    for name in ["bert", "bert_masked_lm", "bert_classifier", "roberta_masked_lm", "t5_v1_0", "t5_v1_1"] {
        // In f32 a step that is not lost in roundings crosses the kinks of T5's ReLU, whose scores nothing tames.
        let kinds: &[Kind] =
            if name.starts_with("t5") { &[Kind::Double] } else { &[Kind::Float, Kind::Double] };
        for &kind in kinds {
            let placement = Placement::CPU.with_kind(kind);
            let encoder = models::open_encoder(&folder(name), placement).unwrap();
            contract::encoder(&*encoder).unwrap_or_else(|violation| panic!("{name}, {kind:?}: {violation}"));
        }
    }
}

const VOCAB: i64 = 11;

const REGULARISERS: [Regulariser; 5] =
    [Regulariser::Greedy, Regulariser::Variance, Regulariser::Local, Regulariser::Max, Regulariser::Squared];

#[track_caller]
fn control(name: &str, control: &impl TokenControl) {
    contract::token_control(control, VOCAB).unwrap_or_else(|violation| panic!("{name}: {violation}"));
}

/// In the order of the table in `controls/mod.rs`, with every option.
#[test]
fn token_controls() {
    control("temperature", &Temperature::new(0.7).unwrap());
    control("top-k", &TopK::new(4).unwrap());
    control("top-k", &TopK::new(1).unwrap().min_tokens_to_keep(2).unwrap());
    control("top-p", &TopP::new(0.8).unwrap());
    control("top-p", &TopP::new(0.1).unwrap().min_tokens_to_keep(3).unwrap());
    control("min-p", &MinP::new(0.2).unwrap());
    control("min-p", &MinP::new(0.9).unwrap().min_tokens_to_keep(3).unwrap());
    control("typical", &Typical::new(0.6).unwrap());
    control("typical", &Typical::new(0.2).unwrap().min_tokens_to_keep(3).unwrap());
    control("epsilon cutoff", &EpsilonCutoff::new(0.05).unwrap());
    control("eta cutoff", &EtaCutoff::new(0.05).unwrap());
    control("repetition penalty", &RepetitionPenalty::new(1.4).unwrap());
    control("repetition penalty", &RepetitionPenalty::new(0.6).unwrap().generated_only());
    control("repetition penalty", &RepetitionPenalty::new(1.4).unwrap().normalised());
    control("frequency and presence", &FrequencyPresence::new(0.3, 0.4).unwrap());
    control("no repeated n-gram", &NoRepeatNgram::new(1).unwrap());
    control("no repeated n-gram", &NoRepeatNgram::new(2).unwrap());
    control("suppress", &Suppress::new([3, 5]).unwrap());
    control("banned words", &BannedWords::new([&[2][..], &[3, 4], &[5, 6, 7]]).unwrap());
    control("logit bias", &LogitBias::new([(2, 1.5), (3, f64::NEG_INFINITY)]).unwrap());
    control("logit bias", &LogitBias::sequences([([4, 5], 2.0), ([5, 4], -2.0)]).unwrap());
    control("minimum length", &MinLength::new(3, [1]).unwrap());
    control("minimum length", &MinLength::total(5, [1, 2]).unwrap());
    control("forced prefix", &ForcedPrefix::new([3, 7, 2]).unwrap());
    for regulariser in REGULARISERS {
        for weight in [0.0, 0.7, 1e6] {
            control(&format!("{regulariser:?}"), &Regularised::new(regulariser, weight).unwrap());
        }
    }
    control("watermark", &Watermark::new(3, 0.4, 2.0).unwrap());
    control("watermark", &Watermark::new(3, 0.4, 2.0).unwrap().context(3).unwrap());
    let trie = TokenTrie::from_bytes([" a", "b", "ab", ".", " ab", "c", " c", "b a", "", "1", " B"]).unwrap();
    let worth = Features::new(&trie)
        .with(1.5, WordList::new(["ab", "abc"]).unwrap())
        .and_then(|worth| worth.with(-2.0, Repetition::new()))
        .and_then(|worth| worth.with(0.5, Alliteration))
        .and_then(|worth| worth.with(0.1, WordLength))
        .and_then(|worth| {
            worth.with(0.3, |word: &str, before: &[Arc<str>]| (word.len() * before.len()) as f64)
        });
    control("features", &worth.unwrap());
    control("noise", &GumbelNoise::new(3, 0.8).unwrap());
    let stack = TokenControls::new()
        .with(RepetitionPenalty::new(1.3).unwrap())
        .with(NoRepeatNgram::new(2).unwrap())
        .with(MinLength::new(2, [1]).unwrap())
        .with(Temperature::new(0.8).unwrap())
        .with(TopP::new(0.9).unwrap());
    control("a stack", &stack);
}
