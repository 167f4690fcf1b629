//! Masks against brute force, samples against enumeration, jump-forward against token by token.

use std::collections::HashMap;

use controlgen_core::testing::{CountingLm, chi_square, contract};
use controlgen_core::{LanguageModel, LmInput, Pass, Rows, Source, TokenControl, TokenControls};
use controlgen_text::controls::{NoRepeatNgram, Temperature, TopP};
use controlgen_text::grammar::{Grammar, Vocabulary};
use controlgen_text::search::{BeamSearch, Choice, Finish, Search, Task};
use controlgen_text::{Completion, TextModel};
use serde_json::json;
use tch::{Kind, Tensor, kind};

use crate::{EOS, compiled, model, model_of, tokenizer};

const CHOICES: [&str; 5] = ["the cat", "the car", "then", "a dog", "a dogma \u{e9}\u{1F600}"];

/// The choices, with every spelling of them.
fn any_spelling() -> Grammar {
    let all: Vec<String> = CHOICES.iter().map(|choice| format!("{choice:?}")).collect();
    let all = all.join(" | ").replace("\\u{e9}", "é");
    Grammar::lark(&format!("%llguidance {{\"no_forcing\": true}}\nstart: C\nC: {all}")).unwrap()
}

fn allowed(scores: &Tensor) -> Vec<i64> {
    Vec::try_from(scores.gt(f64::NEG_INFINITY).get(0).nonzero().view(-1)).unwrap()
}

/// What may follow `said`: what keeps it the beginning of a choice, and the ends where it is one.
fn may_follow(model: &TextModel, said: &[u8]) -> Vec<i64> {
    let begins = |bytes: &[u8]| CHOICES.iter().any(|choice| choice.as_bytes().starts_with(bytes));
    let whole = CHOICES.iter().any(|choice| choice.as_bytes() == said);
    let follows = |&id: &i64| {
        if model.eos().contains(&id) {
            return whole;
        }
        let bytes = model.tokenizer().token_bytes(id).filter(|_| !model.tokenizer().is_special(id));
        bytes.is_some_and(|bytes| !bytes.is_empty() && begins(&[said, &bytes].concat()))
    };
    (0..model.lm().spec().vocab).filter(follows).collect()
}

#[test]
fn masks_are_brute_force() {
    for family in ["byte_level", "pieces"] {
        let model = model_of(family);
        let vocab = model.lm().spec().vocab;
        let control = compiled(&model, &any_spelling());
        let (mut states, mut ends) = (0, 0);
        let mut left: Vec<Vec<i64>> = vec![vec![]];
        while let Some(ids) = left.pop() {
            let mut state = control.start(&[vec![5]]).unwrap();
            for &id in &ids {
                control.advance(&mut state, &[id]).unwrap();
            }
            let said: Vec<u8> =
                ids.iter().flat_map(|&id| model.tokenizer().token_bytes(id).unwrap()).collect();
            let found =
                allowed(&control.score(&mut state, Tensor::zeros([1, vocab], kind::FLOAT_CPU)).unwrap());
            let expected = may_follow(&model, &said);
            assert_eq!(found, expected, "{family}, after {:?}", String::from_utf8_lossy(&said));
            let whole = CHOICES.iter().any(|choice| choice.as_bytes() == said);
            assert_eq!(control.finish(&state, 0).unwrap() == 0.0, whole);
            states += 1;
            ends += usize::from(whole);
            let ordinary = expected.iter().filter(|id| !model.eos().contains(id));
            // All spellings up to four tokens, and one of each longer.
            let keep = if ids.len() < 4 { usize::MAX } else { 1 };
            left.extend(ordinary.take(keep).map(|&id| [&ids[..], &[id]].concat()));
        }
        println!("{family}: {states} states, {ends} ends");
        assert!(states > 20 && ends >= CHOICES.len(), "{family}: {states} states, {ends} ends");
    }
}

#[test]
fn samples_are_the_masked_models() {
    const N: usize = 4000;
    let model = model();
    let prompt = vec![40i64, 41];
    let controls = TokenControls::new().with(compiled(&model, &any_spelling()));
    // Every text with its probability, written out: softmax over what may follow.
    let mut texts: HashMap<Vec<i64>, f64> = HashMap::new();
    let mut left = vec![(Vec::new(), 1.0)];
    while let Some((ids, p)) = left.pop() {
        let said: Vec<u8> = ids.iter().flat_map(|&id| model.tokenizer().token_bytes(id).unwrap()).collect();
        let read = Tensor::from_slice(&[&prompt[..], &ids].concat()).unsqueeze(0);
        let mut state = model.lm().start(Source::Rows(1), &Pass::default()).unwrap();
        let logits =
            model.lm().forward(LmInput::ids(&read).last(), &mut state, &Pass::default()).unwrap().logits;
        let logits: Vec<f64> = Vec::try_from(logits.view(-1).to_kind(Kind::Double)).unwrap();
        let may = may_follow(&model, &said);
        let sum: f64 = may.iter().map(|&id| logits[id as usize].exp()).sum();
        for id in may {
            let p = p * logits[id as usize].exp() / sum;
            let ids = [&ids[..], &[id]].concat();
            if model.eos().contains(&id) {
                texts.insert(ids, p);
            } else if p > 1e-5 {
                left.push((ids, p));
            }
        }
    }
    let task = Task {
        lm: model.lm(),
        prompts: &[prompt],
        controls: &controls,
        pass: Pass::default(),
        max_new_tokens: 30,
        eos: model.eos(),
        n: N,
    };
    let drawn = Choice::Sample { seed: 3, first: 0 }.run(&task, &mut ()).unwrap();
    let mut counts: HashMap<Vec<i64>, u64> = HashMap::new();
    for hypothesis in &drawn {
        let Finish::Eos(end) = hypothesis.finish else { panic!("{hypothesis:?}") };
        *counts.entry([&hypothesis.ids[..], &[end]].concat()).or_default() += 1;
    }
    let (mut observed, mut expected) = (vec![0], vec![0.0]);
    for (ids, p) in &texts {
        let count = counts.remove(ids).unwrap_or(0);
        if p * N as f64 >= 5.0 {
            observed.push(count);
            expected.push(*p);
        } else {
            observed[0] += count;
        }
    }
    // What was too improbable to be written out.
    observed[0] += counts.values().sum::<u64>();
    expected[0] = 1.0 - expected.iter().sum::<f64>();
    let p = chi_square(&observed, &expected).unwrap();
    println!("{} texts, {} bins, p = {p:.3}", texts.len(), observed.len());
    assert!(observed.len() > 10 && p > 0.001, "p = {p}");
}

#[test]
fn the_contract_of_controls() {
    let model = model();
    let vocab = model.lm().spec().vocab;
    let schema = json!({"type": "object", "properties": {"name": {"enum": ["Anna", "Bo"]}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": false});
    for (name, grammar) in [
        ("every spelling", any_spelling()),
        ("choices", Grammar::choices(CHOICES).unwrap()),
        ("regex", Grammar::regex("[a-c]{2,}( [xyz]+)*").unwrap()),
        ("json", Grammar::json_schema(&schema).unwrap()),
    ] {
        let control = compiled(&model, &grammar);
        contract::token_control(&control, vocab).unwrap_or_else(|violation| panic!("{name}: {violation}"));
        contract::token_control(&control.jump_forward(false), vocab).unwrap();
    }
}

#[test]
fn ends_and_padding() {
    let model = model();
    let vocab = model.lm().spec().vocab;
    let zeros = || Tensor::zeros([1, vocab], kind::FLOAT_CPU);
    let control = compiled(&model, &Grammar::regex("[ab]{1,2}").unwrap());
    let mut state = control.start(&[vec![5]]).unwrap();
    let token = |text: &str| model.tokenizer().token_to_id(text).unwrap();
    let all = |with: &[i64]| {
        let mut all = [model.eos(), with].concat();
        all.sort_unstable();
        all
    };
    assert!(model.eos().contains(&EOS) && model.eos().len() == 2);
    // One letter may end, two must.
    control.advance(&mut state, &[token("a")]).unwrap();
    assert_eq!(allowed(&control.score(&mut state, zeros()).unwrap()), all(&[token("a"), token("b")]));
    control.advance(&mut state, &[token("b")]).unwrap();
    assert_eq!(allowed(&control.score(&mut state, zeros()).unwrap()), all(&[]));
    assert_eq!(control.forced(&mut state, 0).unwrap(), None, "two ends are a choice");
    control.advance(&mut state, &[EOS]).unwrap();
    assert_eq!(allowed(&control.score(&mut state, zeros()).unwrap()), all(&[]));
    // With one end, it is forced.
    let one = Vocabulary::new(model.tokenizer(), &[EOS]).unwrap();
    let control = controlgen_text::grammar::GrammarControl::new(&Grammar::regex("a").unwrap(), &one).unwrap();
    let mut state = control.start(&[vec![5]]).unwrap();
    assert_eq!(control.forced(&mut state, 0).unwrap(), Some(token("a")));
    control.advance(&mut state, &[token("a")]).unwrap();
    assert_eq!(control.forced(&mut state, 0).unwrap(), Some(EOS));
    assert_eq!(allowed(&control.score(&mut state, zeros()).unwrap()), [EOS]);
}

/// What no token spells is an end without an end: nothing follows.
#[test]
fn bytes_without_a_token() {
    // The tokenizer of WordPiece is refused as a whole; one of bytes spells everything. SentencePiece's spells even
    // what it has no piece for, by bytes.
    let model = model_of("pieces");
    let text = "日本 é \u{1}";
    let grammar = Grammar::choices([text]).unwrap();
    let generation = model.generate_ids([vec![5]]).grammar(&grammar).sample(0).run().unwrap();
    assert_eq!(generation.text(), text);
    assert!(Vocabulary::new(&tokenizer("wordpiece"), &[3]).is_err());
}

fn same(a: &Completion, b: &Completion, at: &str) {
    assert_eq!((&a.ids, &a.text, &a.finish), (&b.ids, &b.text, &b.finish), "{at}");
    assert_eq!(a.logprobs.len(), a.ids.len(), "{at}");
    assert_eq!(b.logprobs.len(), b.ids.len(), "{at}");
    let near = |a: f64, b: f64| a == b || (a - b).abs() < 1e-4;
    assert!(near(a.score, b.score), "{at}: {} and {}", a.score, b.score);
    assert!(
        a.logprobs.iter().zip(&b.logprobs).all(|(&a, &b)| near(a, b)),
        "{at}: {:?} {:?}",
        a.logprobs,
        b.logprobs
    );
}

#[test]
fn jump_forward_changes_nothing() {
    tch::set_num_threads(1);
    let plain = model();
    let counting = CountingLm::new(plain.lm().handle());
    let model = TextModel::new(counting.handle(), plain.tokenizer().handle()).unwrap();
    let schema = json!({"type": "object", "properties": {
        "first name": {"enum": ["Anna", "Bo"]},
        "the age in years": {"type": "integer", "minimum": 0, "maximum": 99},
        "a list of things": {"type": "array", "items": {"const": "something"}, "maxItems": 3}},
        "required": ["first name", "the age in years", "a list of things"], "additionalProperties": false});
    let control = compiled(&model, &Grammar::json_schema(&schema).unwrap());
    let mut lengths = Vec::new();
    for (prompts, n) in [(&["x"][..], 1), (&["The sky"], 3), (&["a", "We see", "The sky"], 2)] {
        for seed in 0..6 {
            // Ended by itself, cut off, and ended by a stop string within what is forced.
            for (most, stop) in [(200, None), (9, None), (200, Some("the age"))] {
                let run = |jump| {
                    counting.take();
                    let generate = model.generate_batch(prompts.iter().copied()).n(n).sample(seed);
                    let generate = generate.with(control.clone().jump_forward(jump)).max_new_tokens(most);
                    let generate =
                        generate.with(Temperature::new(1.5).unwrap()).with(TopP::new(0.99).unwrap());
                    let ran = generate.stop(stop).run().unwrap();
                    (ran.completions, counting.take().len())
                };
                let ((slow, all), (fast, fewer)) = (run(false), run(true));
                let at = format!("{prompts:?}, n {n}, seed {seed}, at most {most}, stop {stop:?}");
                slow.iter().zip(&fast).for_each(|(slow, fast)| same(slow, fast, &at));
                assert!(fewer <= all + 1, "{at}: {fewer} passes for {all}");
                if most == 200 && stop.is_none() && slow.len() == 1 {
                    lengths.push((all, fewer));
                }
            }
        }
    }
    println!("passes without and with: {lengths:?}");
    assert!(lengths.iter().all(|(all, fewer)| fewer * 2 < *all), "{lengths:?}");
}

/// A control after the grammar that may ban what it forces is asked token by token.
#[test]
fn jump_forward_asks_who_may_ban() {
    let model = model();
    let control = compiled(&model, &Grammar::choices(["ab ab ab ab ab"]).unwrap());
    let run = |jump| {
        let generate = model.generate_ids([vec![5]]).with(control.clone().jump_forward(jump));
        generate.with(NoRepeatNgram::new(2).unwrap()).sample(1).run().unwrap_err().to_string()
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn beams_are_whole_texts() {
    let model = model();
    let grammar = Grammar::regex("[ab]{3,5}(c|the [0-9]{2})").unwrap();
    let valid = regex::Regex::new("^(?:[ab]{3,5}(c|the [0-9]{2}))$").unwrap();
    let search = || BeamSearch::new(4).unwrap();
    let all = model.generate_batch(["The sky", "a"]).grammar(&grammar).search(search()).n(4);
    let all = all.max_new_tokens(30).run().unwrap().completions;
    assert_eq!(all.len(), 8);
    for completion in &all {
        assert!(valid.is_match(&completion.text), "{completion:?}");
    }
    // What the length cuts off is dropped: three tokens at least are an `a` or `b` each, or two of one token.
    let cut = model.generate_ids([vec![5]]).grammar(&Grammar::regex("[ab]{30}").unwrap()).search(search());
    assert!(cut.max_new_tokens(3).run().is_err());
    let cut = model.generate_ids([vec![5]]).grammar(&Grammar::regex("[ab]{30}").unwrap()).sample(0);
    let cut = cut.max_new_tokens(3).run().unwrap().completions.remove(0);
    assert_eq!((cut.finish, cut.score), (Finish::Length, f64::NEG_INFINITY));
}

/// A grammar acts first, whenever it is added.
#[test]
fn grammars_come_first() {
    let model = model();
    let grammar = Grammar::regex("(aa){2,4}").unwrap();
    for seed in 0..5 {
        let run = model.generate_ids([vec![5]]).with(TopP::new(0.01).unwrap()).sample(seed);
        let run = run.grammar(&grammar).run().unwrap();
        assert!(["aaaa", "aaaaaa", "aaaaaaaa"].contains(&run.text()), "{}", run.text());
    }
}

/// Row by row as the search would have it alone; a search by hand, over forks.
#[test]
fn forks_go_their_own_ways() {
    let model = model();
    let control = compiled(&model, &any_spelling());
    let vocab = model.lm().spec().vocab;
    let mut state = control.start(&[vec![5]]).unwrap();
    state.reorder(&[0, 0, 0]).unwrap();
    let tokens = ["t", "a", "th"].map(|text| model.tokenizer().token_to_id(text).unwrap());
    control.advance(&mut state, &tokens).unwrap();
    state.reorder(&[2, 0, 1, 2]).unwrap();
    let scores = control.score(&mut state, Tensor::zeros([4, vocab], kind::FLOAT_CPU)).unwrap();
    for (row, said) in ["th", "t", "a", "th"].iter().enumerate() {
        let row = scores.get(row as i64).unsqueeze(0);
        assert_eq!(allowed(&row), may_follow(&model, said.as_bytes()), "{said}");
    }
    assert!(state.reorder(&[4]).is_err());
}
