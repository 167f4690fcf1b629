//! T5 v1.0 and v1.1 against transformers, on small random models: states, logits, what searches say.
//!
//! The fixtures are made by `benches/reference/encoder_fixtures.py`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Cases, ENCODER_DECODERS, difference, folder};
use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights, save};
use controlgen_core::energy::{EnergyFn, Text};
use controlgen_core::{
    EnableGrad, EncoderInput, Error, LanguageModel, LmInput, Pass, Placement, Reads, Rows, Source, State,
    TokenControls, Tokens,
};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty};
use controlgen_text::energies::Nll;
use controlgen_text::models::{self, Config, T5};
use controlgen_text::score_completions;
use controlgen_text::search::{
    BeamSearch, BestOf, Choice, ContrastiveSearch, DiverseBeamSearch, Finish, Hypothesis, Search, Smc,
    Speculative, StochasticBeamSearch, Task,
};
use tch::{Device, Kind, Tensor};

fn open(name: &str) -> T5 {
    let config = Config::open(&folder(name).join("config.json")).unwrap();
    load(&config, &Safetensors::open(folder(name)).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn load(config: &Config, source: &Safetensors) -> Result<T5, Error> {
    T5::load(config, &Weights::new(source, Placement::CPU.options()), Placement::CPU)
}

/// The encoder's input of a case.
struct Prompt {
    ids: Tensor,
    keep: Option<Tensor>,
}

impl Prompt {
    fn of(cases: &Cases, case: &str) -> Self {
        let keep = cases.get(&format!("{case}.attention_mask")).map(|mask| mask.to_kind(Kind::Bool));
        Self { ids: cases.get(&format!("{case}.input_ids")).unwrap(), keep }
    }

    fn input(&self) -> LmInput<'_> {
        LmInput::ids(&self.ids).keep(self.keep.as_ref())
    }

    fn start(&self, lm: &dyn LanguageModel) -> State {
        lm.start(Source::Encoder(self.input()), &Pass::default()).unwrap()
    }

    /// The ids of each row without padding.
    fn rows(&self) -> Vec<Vec<i64>> {
        let rows = 0..self.ids.size()[0];
        rows.map(|row| {
            let ids = self.ids.get(row);
            let ids = match &self.keep {
                Some(keep) => ids.masked_select(&keep.get(row)),
                None => ids,
            };
            Vec::try_from(ids).unwrap()
        })
        .collect()
    }
}

fn forward(lm: &dyn LanguageModel, input: LmInput<'_>, state: &mut State) -> Tensor {
    lm.forward(input, state, &Pass::default()).unwrap().logits
}

#[test]
fn states_and_logits_equal_transformers() {
    let _guard = tch::no_grad_guard();
    let mut worst: f64 = 0.0;
    for name in ENCODER_DECODERS {
        let (lm, cases) = (open(name), Cases::open(name));
        let encoder = models::open_encoder(&folder(name), Placement::CPU).unwrap();
        assert_eq!(encoder.spec().reads, Reads::Text { vocab: 53, context: None });
        for case in ["plain", "right", "left", "decoder"] {
            let prompt = Prompt::of(&cases, case);
            let expected = cases.get(&format!("{case}.encoder_last_hidden_state")).unwrap();
            let states = lm.encode(prompt.input(), &Pass::default()).unwrap();
            let diff = difference(&states, &expected, prompt.keep.as_ref());
            assert!(diff <= 1e-4, "{name}, {case}, encoder: {diff}");
            let text = EncoderInput::Text { tokens: Tokens::Ids(&prompt.ids), keep: prompt.keep.as_ref() };
            let alone = encoder.encode(text, &Pass::default()).unwrap().hidden;
            assert!(alone.equal(&states), "{name}, {case}: the encoder by itself");

            let ids = cases.get(&format!("{case}.decoder_input_ids")).unwrap();
            let keep = cases.get(&format!("{case}.decoder_attention_mask")).map(|m| m.to_kind(Kind::Bool));
            let expected = cases.get(&format!("{case}.logits")).unwrap();
            let whole = forward(&lm, LmInput::ids(&ids).keep(keep.as_ref()), &mut prompt.start(&lm));
            let len = ids.size()[1];
            for cuts in [vec![len], vec![1; len as usize], vec![len - 3, 2, 1], vec![1, len - 1]] {
                let (mut state, mut parts, mut at) = (prompt.start(&lm), vec![], 0);
                for &n in &cuts {
                    let (part, kept) =
                        (ids.narrow(1, at, n), keep.as_ref().map(|keep| keep.narrow(1, at, n)));
                    parts.push(forward(&lm, LmInput::ids(&part).keep(kept.as_ref()), &mut state));
                    at += n;
                }
                let found = Tensor::cat(&parts, 1);
                let diff = difference(&found, &expected, keep.as_ref());
                assert!(diff <= 1e-4, "{name}, {case}, read by {cuts:?}: {diff}");
                assert!(difference(&found, &whole, keep.as_ref()) <= 1e-4, "{name}, {case}, {cuts:?}");
                worst = worst.max(diff);
            }
        }
    }
    println!("largest difference from transformers, cached or not: {worst:.2e}");
}

fn task<'a>(
    lm: &'a dyn LanguageModel,
    prompts: &'a [Vec<i64>],
    controls: &'a TokenControls,
    eos: &'a [i64],
    n: usize,
) -> Task<'a> {
    Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: 20, eos, n }
}

/// What was said, the token that ended it included, filled up with it as generate does.
fn said(hypothesis: &Hypothesis, len: usize) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.resize(len, token);
    }
    ids
}

fn rows(tensor: &Tensor) -> Vec<Vec<i64>> {
    (0..tensor.size()[0]).map(|row| Vec::try_from(tensor.get(row)).unwrap()).collect()
}

#[test]
fn searches_say_what_generate_says() {
    let mut worst: f64 = 0.0;
    for name in ENCODER_DECODERS {
        let (lm, cases) = (open(name), Cases::open(name));
        let prompts = Prompt::of(&cases, "greedy").rows();
        assert!(prompts.iter().any(|p| p.len() != prompts[0].len()), "prompts of unequal lengths");
        let none = TokenControls::new();
        let greedy = Choice::Greedy.run(&task(&lm, &prompts, &none, &[], 1), &mut ()).unwrap();
        let expected = rows(&cases.get("greedy.new_ids").unwrap());
        assert_eq!(greedy.iter().map(|h| h.ids.clone()).collect::<Vec<_>>(), expected, "{name}");
        for (row, hypothesis) in (0..).zip(&greedy) {
            let logprobs: Vec<f64> = Vec::try_from(cases.get("greedy.logprobs").unwrap().get(row)).unwrap();
            for (found, expected) in hypothesis.logprobs.iter().zip(logprobs) {
                worst = worst.max((found - expected).abs());
            }
        }
        assert!(worst <= 1e-4, "{name}: log-probabilities differ by {worst}");
        // What looks back sees what the decoder said, not what the encoder read.
        let back = TokenControls::new().with(RepetitionPenalty::new(1.7).unwrap());
        let back = back.with(NoRepeatNgram::new(2).unwrap());
        let found = Choice::Greedy.run(&task(&lm, &prompts, &back, &[], 1), &mut ()).unwrap();
        let expected = rows(&cases.get("processed.new_ids").unwrap());
        assert_eq!(found.into_iter().map(|h| h.ids).collect::<Vec<_>>(), expected, "{name}, processed");

        let eos = [cases.get("stop.eos_token_id").unwrap().int64_value(&[0])];
        let beams = BeamSearch::new(4).unwrap().length_penalty(0.7).unwrap();
        let found = beams.run(&task(&lm, &prompts, &none, &eos, 3), &mut ()).unwrap();
        let expected = rows(&cases.get("beams.new_ids").unwrap());
        let len = expected[0].len();
        assert_eq!(found.iter().map(|h| said(h, len)).collect::<Vec<_>>(), expected, "{name}, beams");
        let scores: Vec<f64> = Vec::try_from(cases.get("beams.scores").unwrap()).unwrap();
        for (hypothesis, expected) in found.iter().zip(scores) {
            let diff = (hypothesis.score - expected).abs();
            assert!(diff <= 1e-3, "{name}, beams: {} for {expected}", hypothesis.score);
        }
    }
    println!("greedy log-probabilities differ by {worst:.1e}");
}

/// Every search: a prompt's completions are the same alone and in a batch of unequal prompts; and their
/// log-probabilities are those of scoring them.
#[test]
fn every_search_runs_and_does_not_mix_prompts() {
    let lm = open("t5_v1_1");
    let prompts = Prompt::of(&Cases::open("t5_v1_1"), "right").rows();
    let sampled = Choice::Sample { seed: 3, first: 0 };
    let beams = |n| BeamSearch::new(n).unwrap();
    let searches: Vec<(&str, usize, Box<dyn Search>)> = vec![
        ("greedy", 1, Box::new(Choice::Greedy)),
        ("sampling", 2, Box::new(sampled)),
        ("beams", 2, Box::new(beams(3))),
        ("diverse beams", 2, Box::new(DiverseBeamSearch::new(beams(4), 2, 0.5).unwrap())),
        ("stochastic beams", 2, Box::new(StochasticBeamSearch::new(3, 5).unwrap())),
        ("contrastive", 1, Box::new(ContrastiveSearch::new(0.6, 4).unwrap())),
        ("best of n", 1, Box::new(BestOf::new(4, 5).unwrap())),
        ("SMC", 2, Box::new(Smc::new(6, 5).unwrap())),
        ("prompt look-up", 1, Box::new(Speculative::prompt_lookup(Choice::Greedy, 2, 3).unwrap())),
        ("draft model", 1, Box::new(Speculative::draft_model(Choice::Greedy, lm.handle(), 3).unwrap())),
    ];
    let none = TokenControls::new();
    for (name, n, search) in searches {
        let run = |prompts: &[Vec<i64>]| {
            let task = Task { max_new_tokens: 8, ..task(&lm, prompts, &none, &[7], n) };
            search.run(&task, &mut ()).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let batch = run(&prompts);
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = run(std::slice::from_ref(prompt));
            let of_batch: Vec<_> = batch.iter().filter(|h| h.prompt == i).collect();
            assert_eq!(alone.len(), of_batch.len(), "{name}, prompt {i}");
            for (alone, of_batch) in alone.iter().zip(of_batch) {
                assert_eq!(alone.ids, of_batch.ids, "{name}, prompt {i}");
                if alone.ids.is_empty() {
                    continue;
                }
                let given = std::slice::from_ref(&alone.ids);
                let scored = score_completions(&lm, prompt, given, &Pass::default()).unwrap();
                for (found, expected) in of_batch.logprobs.iter().zip(&scored[0].logprobs) {
                    assert!((found - expected).abs() <= 1e-4, "{name}, prompt {i}");
                }
            }
        }
    }
    // The same numbers as an energy.
    let text = [9i64, 30, 4, 22];
    let nll =
        Nll::after(&lm, &prompts[1]).unwrap().energy(&Text::hard(Tensor::from_slice(&text).unsqueeze(0)));
    let scored = score_completions(&lm, &prompts[1], &[text.to_vec()], &Pass::default()).unwrap();
    assert!((nll.unwrap().double_value(&[0]) + scored[0].total()).abs() <= 1e-3);
}

/// Rows keep the encoder's input that they started from, wherever they are moved.
#[test]
fn rows_take_their_prompt_along() {
    let _guard = tch::no_grad_guard();
    for name in ENCODER_DECODERS {
        let (lm, cases) = (open(name), Cases::open(name));
        let prompt = Prompt::of(&cases, "right");
        let ids = cases.get("right.decoder_input_ids").unwrap();
        let (head, tail) = (ids.narrow(1, 0, 5), ids.narrow(1, 5, 4));
        let mut state = prompt.start(&lm);
        let _ = forward(&lm, LmInput::ids(&head), &mut state);
        let mut kept = state.fork().unwrap();
        let expected = forward(&lm, LmInput::ids(&tail), &mut kept);
        kept.truncate(5).unwrap();
        let again = forward(&lm, LmInput::ids(&tail), &mut kept);
        assert!(difference(&again, &expected, None) <= 1e-5, "{name}: after truncate");
        // Moved twice, so that a second move starts from the first; the last keeps every row's prompt in its place.
        for moves in
            [vec![vec![2i64, 0, 2, 1]], vec![vec![1, 1, 2], vec![2, 0]], vec![vec![0, 0, 1], vec![1, 0, 2]]]
        {
            let (mut moved, mut at) = (state.fork().unwrap(), vec![0i64, 1, 2]);
            for picks in moves {
                moved.reorder(&picks).unwrap();
                at = picks.iter().map(|&row| at[row as usize]).collect();
            }
            let index = Tensor::from_slice(&at);
            let found = forward(&lm, LmInput::ids(&tail.index_select(0, &index)), &mut moved);
            assert!(difference(&found, &expected.index_select(0, &index), None) <= 1e-4, "{name}, {at:?}");
        }
    }
}

#[test]
fn gradients_reach_the_encoders_embeddings() {
    for name in ENCODER_DECODERS {
        // In f64, so that differences are sharp.
        let double = Placement::new(Device::Cpu, Kind::Double);
        let (lm, cases) = (models::open(&folder(name), double).unwrap(), Cases::open(name));
        let ids = cases.get("plain.input_ids").unwrap().narrow(0, 0, 1).narrow(1, 0, 6);
        let decoder = cases.get("plain.decoder_input_ids").unwrap().narrow(0, 0, 1).narrow(1, 0, 4);
        let point = lm.embeddings().index_select(0, &ids.flatten(0, -1)).unsqueeze(0).detach();
        let value = |e: &Tensor| {
            let mut state = lm.start(Source::Encoder(LmInput::embeds(e)), &Pass::default()).unwrap();
            // In two passes, through the cache.
            let _ = forward(&*lm, LmInput::ids(&decoder.narrow(1, 0, 3)), &mut state);
            forward(&*lm, LmInput::ids(&decoder.narrow(1, 3, 1)), &mut state)
                .log_softmax(-1, None)
                .get(0)
                .get(0)
                .get(9)
        };
        let _gradients = EnableGrad::new();
        let leaf = point.detach().set_requires_grad(true);
        let gradient = &Tensor::run_backward(&[value(&leaf)], &[&leaf], false, false)[0];
        let direction = Tensor::arange(point.numel() as i64, tch::kind::DOUBLE_CPU).sin().view_as(&point);
        let slope = (gradient * &direction).sum(Kind::Double).double_value(&[]);
        let at = |h: f64| value(&(&point + &direction * h)).double_value(&[]);
        let expected = (at(1e-6) - at(-1e-6)) / 2e-6;
        assert!((slope - expected).abs() <= 1e-5 * expected.abs().max(0.1), "{name}: {slope} for {expected}");
    }
}

/// config.json with fields changed (removed where null).
fn changed(name: &str, changes: &[(&str, serde_json::Value)]) -> Config {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    for (field, value) in changes {
        fields.insert((*field).into(), value.clone());
    }
    Config::from_fields("config.json", fields)
}

/// config.json as the original checkpoints have it says by `tie_word_embeddings` whether states are scaled; and a
/// checkpoint without an output of its own has the table, whatever is said.
#[test]
fn original_configurations_are_read() {
    let _guard = tch::no_grad_guard();
    for name in ENCODER_DECODERS {
        let cases = Cases::open(name);
        let old = [
            ("scale_decoder_outputs", serde_json::Value::Null),
            ("dense_act_fn", serde_json::Value::Null),
            ("tie_word_embeddings", (name == "t5_v1_0").into()),
        ];
        let lm = load(&changed(name, &old), &Safetensors::open(folder(name)).unwrap()).unwrap();
        let ids = cases.get("plain.decoder_input_ids").unwrap();
        let found = forward(&lm, LmInput::ids(&ids), &mut Prompt::of(&cases, "plain").start(&lm));
        assert!(difference(&found, &cases.get("plain.logits").unwrap(), None) <= 1e-4, "{name}");
        assert_eq!((lm.spec().decoder_start, &lm.spec().eos[..]), (Some(0), &[1][..]));
    }
    // The encoder alone, stored under its own name for the table.
    let name = "t5_v1_1";
    let source = Safetensors::open(folder(name)).unwrap();
    let mut tensors = Vec::new();
    for name in
        source.names().into_iter().filter(|name| name.starts_with("encoder.") || name == "shared.weight")
    {
        let info = source.info(&name).unwrap();
        let mut tensor = Tensor::empty(info.shape, (info.kind, Device::Cpu));
        source.read(&name, &mut tensor).unwrap();
        tensors.push((name.replace("shared.weight", "encoder.embed_tokens.weight"), tensor));
    }
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("encoder.safetensors");
    save(&file, &tensors, &[]).unwrap();
    let config = Config::open(&folder(name).join("config.json")).unwrap();
    let encoder = models::load_encoder(&config, &Safetensors::open(&file).unwrap(), Placement::CPU).unwrap();
    let ids = Cases::open(name).get("plain.input_ids").unwrap();
    let text = EncoderInput::Text { tokens: Tokens::Ids(&ids), keep: None };
    let found = encoder.encode(text, &Pass::default()).unwrap().hidden;
    let expected = Cases::open(name).get("plain.encoder_last_hidden_state").unwrap();
    assert!(difference(&found, &expected, None) <= 1e-4);
    assert!(
        load(&config, &Safetensors::open(&file).unwrap()).is_err_and(|e| matches!(e, Error::Keys { .. }))
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let _guard = tch::no_grad_guard();
    let lm = open("t5_v1_0");
    let ids = Tensor::from_slice(&[5i64, 6, 7, 8]).view([2, 2]);
    fn encoded(lm: &T5, input: LmInput<'_>) -> Result<State, Error> {
        lm.start(Source::Encoder(input), &Pass::default())
    }
    assert!(matches!(lm.start(Source::Rows(2), &Pass::default()), Err(Error::Unsupported { .. })));
    assert!(matches!(encoded(&lm, LmInput::ids(&(&ids + 50))), Err(Error::Value { .. })));
    assert!(matches!(encoded(&lm, LmInput::ids(&ids).positions(Some(&ids))), Err(Error::Unsupported { .. })));
    let padding = Tensor::from_slice(&[true, true, false, false]).view([2, 2]);
    assert!(matches!(encoded(&lm, LmInput::ids(&ids).keep(Some(&padding))), Err(Error::Value { .. })));
    let classifier = models::open_classifier(&folder("t5_v1_0"), Placement::CPU);
    assert!(matches!(classifier, Err(Error::Unsupported { .. })));
    assert!(matches!(models::first_layers(&lm, 1), Err(Error::Unsupported { .. })));
    let mut foreign = encoded(&lm, LmInput::ids(&ids)).unwrap();
    let other = open("t5_v1_0").forward(LmInput::ids(&ids), &mut foreign, &Pass::default());
    assert!(matches!(other, Err(Error::ForeignState { .. })), "another model of the same kind");
    let source = Safetensors::open(folder("t5_v1_0")).unwrap();
    for (field, value) in [
        ("feed_forward_proj", "gated-gleu".into()),
        ("relative_attention_num_buckets", 3.into()),
        ("relative_attention_max_distance", 4.into()),
        ("decoder_start_token_id", 53.into()),
        ("d_kv", 0.into()),
    ] {
        let error = load(&changed("t5_v1_0", &[(field, value)]), &source).err().unwrap();
        assert!(matches!(error, Error::Config { .. }), "{field}: {error}");
    }
    let unstarted =
        [("decoder_start_token_id", serde_json::Value::Null), ("pad_token_id", serde_json::Value::Null)];
    assert!(matches!(load(&changed("t5_v1_0", &unstarted), &source), Err(Error::Config { .. })));
}
