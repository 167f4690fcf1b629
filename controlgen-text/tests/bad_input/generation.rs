//! Generation and scoring: prompts, lengths and controls that cannot be, weights that are no numbers.

use controlgen_core::checkpoint::{Safetensors, save};
use controlgen_core::{Controls, Error, LanguageModel, Pass, Result, TokenControl, TokenControls};
use controlgen_text::controls::{
    BannedWords, ForcedPrefix, LogitBias, MinLength, NoRepeatNgram, Suppress, Temperature, TopP,
};
use controlgen_text::search::{Choice, Finish, Hypothesis, Search, Task};
use controlgen_text::tokenizer::Tokenizer;
use controlgen_text::{TextModel, score_completions, score_text};
use tch::Tensor;

use crate::support::{MODELS, fields, folder, load, open, refused, tensors, weights};

const CHOICES: [Choice; 2] = [Choice::Greedy, Choice::Sample { seed: 1, first: 0 }];

fn task<'a>(lm: &'a dyn LanguageModel, prompts: &'a [Vec<i64>], controls: &'a TokenControls) -> Task<'a> {
    Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: 4, eos: &[], n: 1 }
}

fn run(lm: &dyn LanguageModel, prompts: &[Vec<i64>], controls: &TokenControls) -> Result<Vec<Hypothesis>> {
    Choice::Greedy.run(&task(lm, prompts, controls), &mut ())
}

#[test]
fn prompts() {
    let lm = open("mistral");
    let none = TokenControls::new();
    refused(run(&*lm, &[], &none), &["prompts", "at least one"]);
    refused(run(&*lm, &[vec![1], vec![]], &none), &["prompt 1", "at least one token", "none"]);
    for bad in [-1, 53, i64::MAX, i64::MIN] {
        refused(run(&*lm, &[vec![1, bad]], &none), &["prompt 0", "0 .. 53", &bad.to_string()]);
    }
    let error = refused(run(&*lm, &[vec![1], vec![1; 65]], &none), &["64 positions", "65"]);
    assert!(matches!(error, Error::Context { limit: 64, needed: 65 }));
    let full = run(&*lm, &[vec![1; 64]], &none).unwrap();
    assert_eq!(
        (full[0].ids.len(), &full[0].finish),
        (1, &Finish::Context),
        "the last position has a next token"
    );
}

#[test]
fn lengths_and_counts() {
    let lm = open("mistral");
    let (prompts, none) = (vec![vec![1, 2]], TokenControls::new());
    let with = |n, max_new_tokens, eos: &[i64]| {
        Choice::Greedy.run(&Task { n, max_new_tokens, eos, ..task(&*lm, &prompts, &none) }, &mut ())
    };
    refused(with(0, 4, &[]), &["at least 1", "0"]);
    for n in [usize::MAX, 1 << 40, (1 << 20) + 1] {
        refused(with(n, 4, &[]), &["at most 1048576", &n.to_string()]);
    }
    refused(with(1, 4, &[53]), &["EOS token id", "0 .. 53", "53"]);
    refused(with(1, 4, &[-1]), &["EOS token id", "0 .. 53", "-1"]);
    assert_eq!(with(2, 0, &[]).unwrap().iter().map(|h| h.ids.len()).sum::<usize>(), 0);
    let endless = with(1, usize::MAX, &[]).unwrap();
    assert_eq!((endless[0].ids.len(), &endless[0].finish), (63, &Finish::Context));
}

fn everything() -> Vec<i64> {
    (0..53).collect()
}

#[test]
fn all_tokens_banned() {
    let lm = open("mistral");
    let but = |kept: i64| everything().into_iter().filter(move |&id| id != kept);
    let stacks: [(&str, TokenControls, usize); 5] = [
        ("suppressed", TokenControls::new().with(Suppress::new(everything()).unwrap()), 0),
        ("words", TokenControls::new().with(BannedWords::new((0..53).map(|id| vec![id])).unwrap()), 0),
        (
            "biased",
            TokenControls::new()
                .with(LogitBias::new(everything().into_iter().map(|id| (id, f64::NEG_INFINITY))).unwrap()),
            0,
        ),
        (
            "forced and forbidden",
            TokenControls::new().with(ForcedPrefix::new([7]).unwrap()).with(Suppress::new([7]).unwrap()),
            0,
        ),
        (
            "one token, once",
            TokenControls::new().with(Suppress::new(but(7)).unwrap()).with(NoRepeatNgram::new(1).unwrap()),
            1,
        ),
    ];
    for (what, controls, at) in stacks {
        // What shapes the distribution comes after, and has nothing to work on.
        let shaped = controls.clone().with(Temperature::new(0.5).unwrap()).with(TopP::new(0.9).unwrap());
        for controls in [controls, shaped] {
            for choice in CHOICES {
                let prompts = [vec![1, 2], vec![3]];
                let error = choice.run(&task(&*lm, &prompts, &controls), &mut ()).err();
                match error {
                    Some(Error::AllBanned { row: 0, step }) => assert_eq!(step, at, "{what}"),
                    other => panic!("{what}, {choice:?}: {other:?}"),
                }
            }
        }
    }
    // Of two rows the second: the first may still end.
    let controls =
        TokenControls::new().with(NoRepeatNgram::new(1).unwrap()).with(Suppress::new(but(7)).unwrap());
    let error = run(&*lm, &[vec![1, 2], vec![7]], &controls);
    assert!(matches!(error, Err(Error::AllBanned { row: 1, step: 0 })), "{:?}", error.err());
}

#[test]
fn controls_of_another_vocabulary() {
    let lm = open("mistral");
    let check = |control: TokenControls| {
        refused(run(&*lm, &[vec![1, 2]], &control), &["0 .. 53", "53"]);
    };
    fn one(control: impl TokenControl) -> TokenControls {
        TokenControls::new().with(control)
    }
    check(one(Suppress::new([3, 53]).unwrap()));
    check(one(BannedWords::new([vec![1, 53]]).unwrap()));
    check(one(LogitBias::new([(53, 1.0)]).unwrap()));
    check(one(MinLength::new(3, [53]).unwrap()));
    check(one(ForcedPrefix::new([1, 53]).unwrap()));
}

#[test]
fn site_controls_of_another_model() {
    let (lm, other) = (open("mistral"), open("qwen2"));
    let controls = Controls::bind(other.sites(), vec![]).unwrap();
    let (prompts, none) = (vec![vec![1, 2]], TokenControls::new());
    let task = Task { pass: Pass::with_controls(&controls), ..task(&*lm, &prompts, &none) };
    assert!(matches!(Choice::Greedy.run(&task, &mut ()), Err(Error::ForeignSites)));
}

/// A NaN or an infinity in any weight is found when a token is to be chosen, and is in no result.
#[test]
fn weights_that_are_no_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for model in ["gpt2_gelu_new", "qwen3", "llama_biased"] {
        let config = fields(model, "config.json");
        let all = tensors(&weights(model));
        for (i, (name, tensor)) in all.iter().enumerate() {
            // Where the scores of a query are NaN, LibTorch's attention gives zeros; where an infinity stands, a norm or
            // a gate may.
            let in_scores =
                ["c_attn", "q_proj", "k_proj", "q_norm", "k_norm"].iter().any(|part| name.contains(part));
            for bad in [f64::NAN, f64::INFINITY] {
                let must_fail = bad.is_nan() && !in_scores;
                // The first row of a table is the first token's.
                let spoiled = tensor.copy();
                let _ = spoiled.flatten(0, -1).narrow(0, 0, 1).fill_(bad);
                let mut changed: Vec<_> = all.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
                changed[i].1 = spoiled;
                save(&path, &changed, &[]).unwrap();
                let lm = load(&config, &Safetensors::open(&path).unwrap()).unwrap();
                let (none, prompts) = (TokenControls::new(), [vec![0, 1, 2]]);
                for choice in CHOICES {
                    match choice.run(&task(&*lm, &prompts, &none), &mut ()) {
                        Err(Error::NotFinite { .. }) => {}
                        Err(other) => panic!("{model}, {name} = {bad}: {other}"),
                        Ok(done) => {
                            assert!(!must_fail, "{model}: {name} holds {bad}, and a text was generated");
                            assert!(
                                done[0].logprobs.iter().all(|p| p.is_finite()),
                                "{model}, {name} = {bad}"
                            );
                        }
                    }
                }
                let scored = score_text(&*lm, &[0, 1, 2], 16, 8, &Pass::default());
                match scored {
                    Err(Error::NotFinite { .. }) => {}
                    Err(other) => panic!("{model}, {name} = {bad}: {other}"),
                    Ok(scored) => {
                        assert!(!must_fail, "{model}: {name} holds {bad}, and a text was scored");
                        assert!(scored.total().is_finite());
                    }
                }
            }
        }
    }
}

#[test]
fn scoring() {
    for model in MODELS {
        let lm = open(model);
        let (vocab, context) = (lm.spec().vocab, lm.spec().context);
        let pass = Pass::default();
        let score =
            |prompt: &[i64], completions: &[Vec<i64>]| score_completions(&*lm, prompt, completions, &pass);
        refused(score(&[], &[vec![1]]), &["prompt", "at least one token"]);
        refused(score(&[1], &[]), &["completions", "at least one"]);
        refused(score(&[1], &[vec![1], vec![]]), &["completions", "at least one token"]);
        for bad in [-1, vocab] {
            refused(score(&[1, bad], &[vec![1]]), &["token id", &format!("0 .. {vocab}"), &bad.to_string()]);
            refused(
                score(&[1], &[vec![1, bad, 2]]),
                &["token id", &format!("0 .. {vocab}"), &bad.to_string()],
            );
            // The last token is scored, and not read.
            refused(score(&[1], &[vec![1, bad]]), &["token id", &format!("0 .. {vocab}"), &bad.to_string()]);
        }
        let long = vec![1; usize::try_from(context).unwrap()];
        refused(score(&[1, 2], &[long]), &["positions"]);

        let text = |ids: &[i64], window, stride| score_text(&*lm, ids, window, stride, &pass);
        refused(text(&[1], 8, 4), &["at least 2", "1"]);
        refused(text(&[1, 2, 3], 1, 1), &["window", "1"]);
        refused(text(&[1, 2, 3], usize::MAX, 1), &["window"]);
        refused(text(&[1, 2, 3], 8, 0), &["stride", "0"]);
        refused(text(&[1, 2, 3], 8, 8), &["stride", "8"]);
        refused(text(&[1, 2, vocab], 8, 4), &["token id", &format!("0 .. {vocab}")]);
    }
}

#[test]
fn a_tokenizer_of_another_model() {
    let tokenizer = Tokenizer::open(folder("tokenizer/byte_level")).unwrap();
    refused(TextModel::new(open("mistral"), tokenizer), &["tokens of the tokenizer", "53", "704"]);
    refused(TextModel::open(folder("mistral"), controlgen_core::Placement::CPU), &["tokenizer.json"]);
}

/// Through adapters and merges too.
#[test]
fn mapped_weights_that_are_no_numbers() {
    let lm = open("mistral").map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    assert!(matches!(run(&*lm, &[vec![1]], &TokenControls::new()), Err(Error::NotFinite { .. })));
    let wrong = open("mistral").map_weights(&mut |_, _| Ok(Some(Tensor::from_slice(&[1.0f32]))));
    refused(wrong, &["[1]"]);
}
