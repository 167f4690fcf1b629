//! Language models against transformers' logits, on small random models of every kind we load.
//!
//! The fixtures are made by `benches/reference/text_fixtures.py`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Cases, MODELS, difference, folder, start};
use controlgen_core::{Error, LanguageModel, LmInput, Pass, Placement, Rows, State};
use controlgen_text::models;
use tch::{Kind, Tensor};

fn open(name: &str) -> Box<dyn LanguageModel> {
    models::open(&folder(name), Placement::CPU).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn forward(lm: &dyn LanguageModel, input: LmInput<'_>, state: &mut State) -> Tensor {
    lm.forward(input, state, &Pass::default()).unwrap().logits
}

#[test]
fn logits_equal_transformers() {
    let _guard = tch::no_grad_guard();
    let mut worst: f64 = 0.0;
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        for case in ["plain", "left", "right", "positions"] {
            let ids = cases.get(&format!("{case}.input_ids")).unwrap();
            let expected = cases.get(&format!("{case}.logits")).unwrap();
            let keep = cases.get(&format!("{case}.attention_mask")).map(|mask| mask.to_kind(Kind::Bool));
            let given = cases.get(&format!("{case}.position_ids"));
            // Ours, counted from the mask, must be those that were given.
            for positions in [given.as_ref(), None] {
                if case == "positions" && positions.is_none() {
                    continue;
                }
                let mut state = start(&*lm, ids.size()[0]);
                let input = LmInput::ids(&ids).keep(keep.as_ref()).positions(positions);
                let logits = forward(&*lm, input, &mut state);
                let diff = difference(&logits, &expected, keep.as_ref());
                assert!(diff <= 1e-4, "{name}, {case}, positions given {}: {diff}", positions.is_some());
                worst = worst.max(diff);
            }
        }
    }
    println!("largest difference from transformers: {worst:.2e}");
}

#[test]
fn greedy_tokens_equal_transformers() {
    let _guard = tch::no_grad_guard();
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        let ids = cases.get("greedy.input_ids").unwrap();
        let keep = cases.get("greedy.attention_mask").unwrap().to_kind(Kind::Bool);
        let expected = cases.get("greedy.new_ids").unwrap();
        let logprobs = cases.get("greedy.logprobs").unwrap();
        let mut state = start(&*lm, ids.size()[0]);
        let mut logits = forward(&*lm, LmInput::ids(&ids).keep(Some(&keep)).last(), &mut state);
        for step in 0..expected.size()[1] {
            let scores = logits.select(1, 0).log_softmax(-1, None);
            let (best, token) = scores.max_dim(-1, false);
            assert!(token.equal(&expected.select(1, step)), "{name}, step {step}");
            let diff = (best - logprobs.select(1, step)).abs().max().double_value(&[]);
            assert!(diff <= 1e-4, "{name}, step {step}: {diff}");
            logits = forward(&*lm, LmInput::ids(&token.unsqueeze(1)).last(), &mut state);
        }
    }
}

#[test]
fn cached_is_uncached() {
    let _guard = tch::no_grad_guard();
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        for case in ["plain", "left"] {
            let ids = cases.get(&format!("{case}.input_ids")).unwrap();
            let keep = cases.get(&format!("{case}.attention_mask")).map(|mask| mask.to_kind(Kind::Bool));
            let (rows, len) = (ids.size()[0], ids.size()[1]);
            let whole = forward(&*lm, LmInput::ids(&ids).keep(keep.as_ref()), &mut start(&*lm, rows));
            // In pieces of one, several, and one.
            for cuts in [vec![1; len as usize], vec![len - 3, 2, 1], vec![2, len - 2]] {
                let (mut state, mut parts, mut at) = (start(&*lm, rows), vec![], 0);
                for n in cuts {
                    let part = ids.narrow(1, at, n);
                    let kept = keep.as_ref().map(|keep| keep.narrow(1, at, n));
                    parts.push(forward(&*lm, LmInput::ids(&part).keep(kept.as_ref()), &mut state));
                    at += n;
                }
                let diff = difference(&Tensor::cat(&parts, 1), &whole, keep.as_ref());
                assert!(diff <= 1e-4, "{name}, {case}: {diff}");
            }
        }
    }
}

#[test]
fn a_batch_of_unequal_prompts_is_one_by_one() {
    let _guard = tch::no_grad_guard();
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        let ids = cases.get("left.input_ids").unwrap();
        let keep = cases.get("left.attention_mask").unwrap().to_kind(Kind::Bool);
        let more = ids.narrow(1, 0, 2); // any two tokens, to go on with
        let mut state = start(&*lm, ids.size()[0]);
        let first = forward(&*lm, LmInput::ids(&ids).keep(Some(&keep)).last(), &mut state);
        let second = forward(&*lm, LmInput::ids(&more), &mut state);
        for row in 0..ids.size()[0] {
            let len = keep.get(row).to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
            let alone = ids.narrow(0, row, 1).narrow(1, ids.size()[1] - len, len);
            let mut state = start(&*lm, 1);
            let a = forward(&*lm, LmInput::ids(&alone).last(), &mut state);
            let b = forward(&*lm, LmInput::ids(&more.narrow(0, row, 1)), &mut state);
            assert!(difference(&a, &first.narrow(0, row, 1), None) <= 1e-4, "{name}, row {row}");
            assert!(difference(&b, &second.narrow(0, row, 1), None) <= 1e-4, "{name}, row {row}");
        }
    }
}

#[test]
fn a_fork_goes_its_own_way() {
    let _guard = tch::no_grad_guard();
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        let ids = cases.get("plain.input_ids").unwrap();
        let rows = ids.size()[0];
        let (head, a, b) = (ids.narrow(1, 0, 4), ids.narrow(1, 4, 2), ids.narrow(1, 6, 2));
        let recomputed = |tail: &Tensor| {
            let whole = Tensor::cat(&[&head, tail], 1);
            forward(&*lm, LmInput::ids(&whole), &mut start(&*lm, rows)).narrow(1, 4, 2)
        };
        let mut one = start(&*lm, rows);
        let _ = forward(&*lm, LmInput::ids(&head), &mut one);
        let mut other = one.fork().unwrap();
        let x = forward(&*lm, LmInput::ids(&a), &mut one);
        let y = forward(&*lm, LmInput::ids(&b), &mut other);
        assert!(difference(&x, &recomputed(&a), None) <= 1e-4, "{name}");
        assert!(difference(&y, &recomputed(&b), None) <= 1e-4, "{name}");
        // Cut back to the head and go the other way, over what was written.
        one.truncate(4).unwrap();
        let z = forward(&*lm, LmInput::ids(&b), &mut one);
        assert!(difference(&z, &recomputed(&b), None) <= 1e-4, "{name}");
    }
}

#[test]
fn reordered_rows_go_on_as_themselves() {
    let _guard = tch::no_grad_guard();
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        let ids = cases.get("left.input_ids").unwrap();
        let keep = cases.get("left.attention_mask").unwrap().to_kind(Kind::Bool);
        let token = Tensor::from_slice(&[5i64, 7, 5, 9]).unsqueeze(1);
        let picks = [2i64, 0, 2, 1];
        let mut state = start(&*lm, 3);
        let _ = forward(&*lm, LmInput::ids(&ids).keep(Some(&keep)), &mut state);
        state.reorder(&picks).unwrap();
        let got = forward(&*lm, LmInput::ids(&token), &mut state);
        let index = Tensor::from_slice(&picks);
        let (ids, keep) = (ids.index_select(0, &index), keep.index_select(0, &index));
        let mut state = start(&*lm, 4);
        let _ = forward(&*lm, LmInput::ids(&ids).keep(Some(&keep)), &mut state);
        let expected = forward(&*lm, LmInput::ids(&token), &mut state);
        assert!(difference(&got, &expected, None) <= 1e-4, "{name}");
        assert!(state.reorder(&[4]).is_err() && state.reorder(&[-1]).is_err());
    }
}

#[test]
fn gradients_flow_to_embeddings_through_the_cache() {
    for name in MODELS {
        let (lm, cases) = (open(name), Cases::open(name));
        let ids = cases.get("plain.input_ids").unwrap().narrow(1, 0, 6);
        let embeds = lm.embeddings().index_select(0, &ids.flatten(0, -1)).view([3, 6, -1]);
        let embeds = embeds.detach().set_requires_grad(true);
        let mut state = start(&*lm, 3);
        let a = forward(&*lm, LmInput::embeds(&embeds.narrow(1, 0, 4)), &mut state);
        let b = forward(&*lm, LmInput::embeds(&embeds.narrow(1, 4, 2)), &mut state);
        let logits = Tensor::cat(&[a, b], 1);
        let tokens = forward(&*lm, LmInput::ids(&ids), &mut start(&*lm, 3));
        assert!(difference(&logits.detach(), &tokens, None) <= 1e-4, "{name}: embeddings are tokens");
        // The last logit depends on every position; position 5's on none after it.
        let gradient = Tensor::run_backward(
            &[logits.narrow(1, 5, 1).square().sum(Kind::Float)],
            &[&embeds],
            true,
            false,
        );
        let by_position = gradient[0].abs().sum_dim_intlist(&[0i64, 2][..], false, Kind::Float);
        assert!(by_position.min().double_value(&[]) > 0.0, "{name}: {by_position:?}");
        let gradient = Tensor::run_backward(
            &[logits.narrow(1, 2, 1).square().sum(Kind::Float)],
            &[&embeds],
            false,
            false,
        );
        let later = gradient[0].narrow(1, 3, 3).abs().max().double_value(&[]);
        assert_eq!(later, 0.0, "{name}: a later position reached an earlier one's logits");
    }
}

/// The first layers are the model that a configuration of so many layers makes of the same checkpoint; with sites of
/// their own, over the same weights.
#[test]
fn first_layers_are_a_smaller_model() {
    tch::set_num_threads(1);
    let ids = Tensor::from_slice(&[5i64, 17, 40, 8, 33, 2]).view([2, 3]);
    for (name, field) in [
        ("gpt2_gelu_new", "n_layer"),
        ("gpt2_relu_untied", "n_layer"),
        ("llama_gqa_tied", "num_hidden_layers"),
    ] {
        let whole = models::open(&folder(name), Placement::CPU).unwrap();
        let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
        let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
        let layers = fields[field].as_u64().unwrap() as usize;
        fields.insert(field.into(), 1.into());
        let config = models::Config::from_fields("config.json", fields);
        let source = controlgen_core::checkpoint::Safetensors::open(folder(name)).unwrap();
        let weights = controlgen_core::checkpoint::Weights::new(&source, Placement::CPU.options());
        let expected: Box<dyn LanguageModel> = if name.starts_with("gpt2") {
            Box::new(models::Gpt2::load(&config, &weights, Placement::CPU).unwrap())
        } else {
            Box::new(models::Llama::load(&config, &weights, Placement::CPU).unwrap())
        };
        let cut = models::first_layers(&*whole, 1).unwrap();
        let logits = |lm: &dyn LanguageModel| {
            let mut state = start(lm, 2);
            lm.forward(LmInput::ids(&ids), &mut state, &Pass::default()).unwrap().logits
        };
        assert!(logits(&*cut).equal(&logits(&*expected)), "{name}");
        assert!(!logits(&*cut).equal(&logits(&*whole)), "{name}");
        let names = |lm: &dyn LanguageModel| -> Vec<String> {
            lm.sites().iter().map(|(_, site)| format!("{:?} {}", site.kind(), site.name)).collect()
        };
        assert_eq!(names(&*cut), names(&*expected), "{name}");
        assert_eq!(cut.embeddings().data_ptr(), whole.embeddings().data_ptr(), "{name}");
        controlgen_core::testing::contract::language_model(&*cut).unwrap_or_else(|v| panic!("{name}: {v}"));
        assert!(logits(&*models::first_layers(&whole, layers).unwrap()).equal(&logits(&*whole)), "{name}");
        for bad in [0, layers + 1] {
            assert!(matches!(models::first_layers(&*whole, bad), Err(Error::Value { .. })), "{name}");
        }
    }
    let table = controlgen_core::testing::TableLm::random(4, 0).unwrap();
    assert!(matches!(models::first_layers(&table, 1), Err(Error::Unsupported { .. })));
}
