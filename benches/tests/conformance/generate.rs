//! `conformance generate`: its line of JSON, and its tokens against those of transformers.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{MODELS, cases, fixture, spelled, succeed, tool, with_tokenizer};

fn joined(ids: &[i64]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Runs the tool with a configuration.
fn generate(model: &Path, config: &Value, arguments: &[&str]) -> Value {
    let file = model.join("test_config.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let said = succeed(tool().arg("generate").arg(model).arg("--config").arg(&file).args(arguments));
    assert_eq!(said.matches('\n').count(), 1, "one line: {said}");
    serde_json::from_str(&said).unwrap()
}

fn ids(sequence: &Value) -> Vec<i64> {
    sequence["ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn numbers(sequence: &Value, field: &str) -> Vec<f64> {
    sequence[field].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn sequences(line: &Value) -> &Vec<Value> {
    line["sequences"].as_array().unwrap()
}

/// The fixture's prompts, without their padding.
fn prompts(name: &str) -> Vec<Vec<i64>> {
    let cases = cases(name);
    let (ids, mask) = (cases["greedy.input_ids"].rows(), cases["greedy.attention_mask"].rows());
    let kept = |(ids, mask): (&Vec<i64>, &Vec<i64>)| {
        ids.iter().zip(mask).filter(|(_, kept)| **kept != 0).map(|(id, _)| *id).collect()
    };
    ids.iter().zip(&mask).map(kept).collect()
}

/// `--input-ids` of several prompts.
fn flags(prompts: &[Vec<i64>]) -> Vec<String> {
    prompts.iter().flat_map(|ids| ["--input-ids".to_owned(), joined(ids)]).collect()
}

fn as_strs(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

#[test]
fn the_line_is_as_promised() {
    let model = with_tokenizer("llama_gqa_tied");
    let config = json!({ "max_new_tokens": 6, "eos_token_id": [] });
    // ` ABC…Zabc…z` are tokens 0, 1, 2, …: d is 30, e 31.
    let line = generate(model.path(), &config, &["--prompt", "de A"]);
    let fields: Vec<_> = line.as_object().unwrap().keys().collect();
    assert_eq!(
        fields,
        ["sequences", "prompt_tokens", "prefill_seconds", "decode_seconds", "tokens_per_second"]
    );
    assert_eq!(line["prompt_tokens"], 4);
    assert_eq!(sequences(&line).len(), 1);
    let sequence = &sequences(&line)[0];
    let fields: Vec<_> = sequence.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["ids", "text", "logprobs", "score"]);
    let new = ids(sequence);
    assert_eq!(new.len(), 6);
    assert_eq!(sequence["text"], spelled(&new), "text of the new tokens, without the prompt");
    let logprobs = numbers(sequence, "logprobs");
    assert_eq!(logprobs.len(), 6);
    assert!(logprobs.iter().all(|&x| x < 0.0));
    assert!((logprobs.iter().sum::<f64>() - sequence["score"].as_f64().unwrap()).abs() < 1e-9);
    let seconds = |field: &str| line[field].as_f64().unwrap();
    let (prefill, decode) = (seconds("prefill_seconds"), seconds("decode_seconds"));
    assert!(prefill > 0.0 && decode > 0.0);
    assert!((seconds("tokens_per_second") * (prefill + decode) - 6.0).abs() < 1e-6);

    let same = generate(model.path(), &config, &["--input-ids", "30,31,0,1"]);
    assert_eq!(same["sequences"], line["sequences"], "a text is its ids");
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let mut worst: f64 = 0.0;
    for name in MODELS {
        let (model, cases) = (with_tokenizer(name), cases(name));
        let config = json!({ "max_new_tokens": 32, "eos_token_id": [] });
        let prompts = prompts(name);
        let line = generate(model.path(), &config, &as_strs(&flags(&prompts)));
        assert_eq!(line["prompt_tokens"], prompts.iter().map(Vec::len).sum::<usize>());
        let expected = cases["greedy.new_ids"].rows();
        let logprobs = cases["greedy.logprobs"].floats();
        for (row, sequence) in sequences(&line).iter().enumerate() {
            assert_eq!(ids(sequence), expected[row], "{name}, prompt {row}");
            for (a, b) in numbers(sequence, "logprobs").into_iter().zip(&logprobs[row * 32..]) {
                worst = worst.max((a - f64::from(*b)).abs());
            }
        }
    }
    assert!(worst <= 1e-4, "log-probabilities differ by {worst}");
    println!("36 of 36 continuations; log-probabilities differ by at most {worst:.2e}");
}

/// The cases of `benches/reference/guidance_fixtures.py`.
#[test]
fn guided_texts_equal_those_of_transformers() {
    let fixture: Value = serde_json::from_slice(&std::fs::read(fixture("guidance.json")).unwrap()).unwrap();
    let numbers = |value: &Value| -> Vec<i64> {
        value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
    };
    let prompts: Vec<Vec<i64>> = fixture["prompts"].as_array().unwrap().iter().map(numbers).collect();
    let mut same = 0;
    // All of them are run by controlgen-text's own tests.
    for case in fixture["cases"].as_array().unwrap().iter().step_by(5) {
        let model = with_tokenizer(case["model"].as_str().unwrap());
        let mut config = case["config"].clone();
        config["eos_token_id"] = json!([]);
        let line = generate(model.path(), &config, &as_strs(&flags(&prompts)));
        for (sequence, expected) in sequences(&line).iter().zip(case["expected"].as_array().unwrap()) {
            assert_eq!(ids(sequence), numbers(&expected["ids"]), "{config}");
            same += 1;
        }
    }
    assert_eq!(same, 21);
    // A negative prompt in words is its ids: ` ABC…Zabc…z` are tokens 0, 1, 2, ….
    let model = with_tokenizer("llama_gqa_tied");
    let config = |negative: Value| {
        let mut config = json!({ "max_new_tokens": 8, "eos_token_id": [], "guidance_scale": 2.5 });
        config.as_object_mut().unwrap().extend(negative.as_object().unwrap().clone());
        generate(model.path(), &config, &["--prompt", "de A"])["sequences"].clone()
    };
    let said = config(json!({ "negative_prompt": "e AB" }));
    assert_eq!(said, config(json!({ "negative_prompt_ids": [31, 0, 1, 2] })));
    assert_ne!(said, config(json!({})));
}

/// transformers pads with 0 after the end token; ours end before it.
#[test]
fn an_end_token_ends_its_row_alone() {
    for name in MODELS {
        let (model, cases) = (with_tokenizer(name), cases(name));
        let eos = cases["stop.eos_token_id"].integers()[0];
        let config = json!({ "max_new_tokens": 32, "eos_token_id": eos });
        let line = generate(model.path(), &config, &as_strs(&flags(&prompts(name))));
        let expected = cases["stop.new_ids"].rows();
        assert!(expected.iter().any(|row| row.contains(&eos)));
        for (sequence, row) in sequences(&line).iter().zip(expected) {
            let end = row.iter().position(|&id| id == eos).unwrap_or(row.len());
            assert_eq!(ids(sequence), row[..end], "{name}");
            let (score, counted) =
                (sequence["score"].as_f64().unwrap(), numbers(sequence, "logprobs").iter().sum::<f64>());
            // The end token's own log-probability is in the score, and not among the tokens'.
            assert_eq!(score < counted - 1e-9, end < row.len(), "{name}: {score}, {counted}");
        }
    }
}

#[test]
fn the_least_length_holds_the_end_token_back() {
    let name = "llama_gqa_tied";
    let (model, cases) = (with_tokenizer(name), cases(name));
    let eos = cases["stop.eos_token_id"].integers()[0];
    let config = json!({ "max_new_tokens": 16, "min_new_tokens": 9, "eos_token_id": [eos] });
    let line = generate(model.path(), &config, &["--input-ids", &joined(&prompts(name)[0])]);
    let new = ids(&sequences(&line)[0]);
    assert!(new.len() >= 9 && !new.contains(&eos), "{new:?}");
}

#[test]
fn several_sequences_of_a_prompt_follow_their_seed() {
    let model = with_tokenizer("mistral");
    let config = |n: usize| json!({ "max_new_tokens": 8, "do_sample": true, "num_return_sequences": n, "eos_token_id": [] });
    let run = |n, seed| generate(model.path(), &config(n), &["--input-ids", "5,6,7", "--seed", seed]);
    let three = run(3, "1");
    let sets: Vec<_> = sequences(&three).iter().map(ids).collect();
    assert_eq!(sets.len(), 3);
    assert_eq!(three["prompt_tokens"], 3, "the prompt is read once");
    assert!(sets[0] != sets[1] && sets[1] != sets[2], "{sets:?}");
    assert_eq!(run(3, "1")["sequences"], three["sequences"], "the same seed draws the same");
    assert_ne!(run(3, "2")["sequences"], three["sequences"]);
    assert_eq!(ids(&sequences(&run(1, "1"))[0]), sets[0], "the first of three is the one of one");

    let two_prompts =
        generate(model.path(), &config(2), &["--input-ids", "5,6,7", "--input-ids", "9", "--seed", "1"]);
    let all: Vec<_> = sequences(&two_prompts).iter().map(ids).collect();
    assert_eq!(all.len(), 4, "prompt by prompt, sample by sample");
    assert_eq!(all[..2], sets[..2]);
}

/// The configurations of the fixture are transformers' own, and given to the tool as they are.
#[test]
fn beams_equal_those_of_the_reference() {
    let fixture: Value = serde_json::from_slice(&std::fs::read(fixture("beams.json")).unwrap()).unwrap();
    let prompts: Vec<Vec<i64>> = serde_json::from_value(fixture["prompts"].clone()).unwrap();
    let name = "gpt2_gelu_new";
    let model = with_tokenizer(name);
    let (mut lists, mut worst) = (0, 0f64);
    let cases = fixture["cases"].as_array().unwrap().iter().filter(|case| case["model"] == name);
    for case in cases.step_by(3) {
        let line = generate(model.path(), &case["config"], &as_strs(&flags(&prompts)));
        let expected: Vec<&Value> =
            case["expected"].as_array().unwrap().iter().flat_map(|list| list.as_array().unwrap()).collect();
        assert_eq!(sequences(&line).len(), expected.len());
        for (sequence, expected) in sequences(&line).iter().zip(expected) {
            // The token that ended it is not among our ids.
            let (new, mut whole) = (ids(sequence), ids(expected));
            if new.len() < whole.len() {
                let end = whole.pop().unwrap();
                assert!(case["config"]["eos_token_id"].as_array().unwrap().contains(&json!(end)));
            }
            assert_eq!(new, whole, "{}", case["config"]);
            assert_eq!(sequence["text"], spelled(&new));
            let score = |sequence: &Value| sequence["score"].as_f64().unwrap();
            worst = worst.max((score(sequence) - score(expected)).abs());
        }
        lists += 1;
    }
    assert!(lists > 8 && worst <= 1e-3, "{lists} configurations; scores differ by {worst}");
    println!("{lists} configurations; scores differ by at most {worst:.1e}");
}

#[test]
fn the_most_probable_of_one_is_greedy() {
    let model = with_tokenizer("gpt2_gelu_new");
    let base = json!({ "max_new_tokens": 8, "eos_token_id": [] });
    let greedy = generate(model.path(), &base, &["--input-ids", "5,6,7"]);
    let one =
        json!({ "max_new_tokens": 8, "eos_token_id": [], "do_sample": true, "top_k": 1, "temperature": 3.0 });
    let drawn = generate(model.path(), &one, &["--input-ids", "5,6,7", "--seed", "3"]);
    assert_eq!(ids(&sequences(&drawn)[0]), ids(&sequences(&greedy)[0]));
    // The temperature is in the score, and not in the model's own log-probabilities.
    let (a, b) = (numbers(&sequences(&drawn)[0], "logprobs"), numbers(&sequences(&greedy)[0], "logprobs"));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    assert!(sequences(&drawn)[0]["score"].as_f64().unwrap().abs() < 1e-6, "one token left is certain");
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let model = with_tokenizer("qwen3");
    let config = json!({ "max_new_tokens": 24, "eos_token_id": [] });
    let whole = generate(model.path(), &config, &["--input-ids", "5,6,7"]);
    let text = sequences(&whole)[0]["text"].as_str().unwrap().to_owned();
    let stop = &text[9..11];
    let config = json!({ "max_new_tokens": 24, "eos_token_id": [], "stop": [stop] });
    let cut = generate(model.path(), &config, &["--input-ids", "5,6,7"]);
    assert_eq!(sequences(&cut)[0]["text"], text[..text.find(stop).unwrap()], "{text} cut at {stop}");
}

#[test]
fn every_field_of_the_configuration_is_taken() {
    let model = with_tokenizer("llama_gqa_tied");
    let config = json!({
        "max_new_tokens": 6, "min_new_tokens": 2, "min_length": 1, "max_length": 20, "do_sample": true,
        "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95,
        "epsilon_cutoff": 0.0001, "eta_cutoff": 0.0001, "repetition_penalty": 1.1,
        "normalised_repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "no_repeat_ngram_size": 3, "bad_words": ["AB"], "bad_words_ids": [[7, 8]], "suppress_tokens": [9],
        "forced_prefix": "xy", "sequence_bias": [[[3], 1.0], [[4, 5], -2.0]], "num_return_sequences": 2,
        "num_beams": 1, "stop": ["QQQ"], "stop_strings": "RRR", "eos_token_id": [2], "bos_token_id": 1,
        "pad_token_id": 0, "use_cache": true, "transformers_version": "5.23.0", "_from_model_config": true,
    });
    let line = generate(model.path(), &config, &["--prompt", "de", "--seed", "5", "--device", "cpu"]);
    assert_eq!(sequences(&line).len(), 2);
    for sequence in sequences(&line) {
        assert!(sequence["text"].as_str().unwrap().starts_with("xy"), "{sequence}");
        assert!(!ids(sequence).contains(&9));
    }
}

/// More tokens than there are positions: the completion ends with the context.
#[test]
fn the_context_ends_a_completion() {
    let model = with_tokenizer("mistral");
    for most in [json!({ "max_new_tokens": u64::MAX }), json!({ "max_length": u64::MAX })] {
        let mut config = most;
        config["eos_token_id"] = json!([]);
        let line = generate(model.path(), &config, &["--input-ids", "5,6"]);
        // Of 64 positions two hold the prompt; the last token needs none.
        assert_eq!(ids(&sequences(&line)[0]).len(), 63);
    }
}

/// Constraints of the configuration hold of what is written, and what cannot hold is told.
#[test]
fn constraints_are_read_from_the_configuration() {
    let model = with_tokenizer("llama_gqa_tied");
    let ends =
        ids(&sequences(&generate(model.path(), &json!({ "max_new_tokens": 1 }), &["--prompt", "z"]))[0]);
    let base = json!({ "max_new_tokens": 6, "eos_token_id": ends });
    let text = |more: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let line = generate(model.path(), &config, &["--prompt", "de A", "--seed", "3"]);
        sequences(&line)[0].clone()
    };
    let matched = text(json!({ "method": "sample", "regex": "[BCD]{2}[ab]" }));
    let bytes = matched["text"].as_str().unwrap().as_bytes();
    assert!(
        bytes.len() == 3 && bytes[..2].iter().all(|b| b"BCD".contains(b)) && b"ab".contains(&bytes[2]),
        "{matched}"
    );
    for method in ["beam", "neurologic", "grid_beam", "smc"] {
        let said = text(json!({ "method": method, "clauses": [["b"], ["!C", "b"]], "clause_reward": 3.0 }));
        assert!(
            said["text"].as_str().unwrap().split(' ').any(|word| word.eq_ignore_ascii_case("b")),
            "{method}: {said}"
        );
        assert!(said["unmet"].is_null());
    }
    let many: Vec<Value> = (b'b'..=b'h').map(|letter| json!([char::from(letter).to_string()])).collect();
    let short = text(json!({ "method": "neurologic", "num_beams": 4, "clauses": many }));
    assert!(!short["unmet"].as_array().unwrap().is_empty(), "{short}");
}

/// An encoder-decoder's prompt goes to its encoder, and processors see what the decoder said.
#[test]
fn encoder_decoders_say_what_generate_says() {
    for name in ["t5_v1_0", "t5_v1_1"] {
        let (model, cases) = (with_tokenizer(name), cases(name));
        let prompts = flags(&prompts(name));
        let run = |config: &Value| generate(model.path(), config, &as_strs(&prompts));
        let said = |line: &Value| sequences(line).iter().map(ids).collect::<Vec<_>>();
        // Lengths count the token that the decoder starts with.
        for length in [json!({ "max_new_tokens": 20 }), json!({ "max_length": 21 })] {
            let mut config = length;
            config["eos_token_id"] = json!([]);
            assert_eq!(said(&run(&config)), cases["greedy.new_ids"].rows(), "{name}");
            config["repetition_penalty"] = json!(1.7);
            config["no_repeat_ngram_size"] = json!(2);
            assert_eq!(said(&run(&config)), cases["processed.new_ids"].rows(), "{name}");
        }
        let eos = cases["stop.eos_token_id"].integers()[0];
        let line = run(&json!({
            "max_new_tokens": 20, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7, "eos_token_id": eos,
        }));
        let expected: Vec<Vec<i64>> = cases["beams.new_ids"].rows();
        for (found, expected) in said(&line).iter().zip(&expected) {
            // The reference ends with the end token, and padding after it.
            let end = expected.iter().position(|&id| id == eos).unwrap_or(expected.len());
            assert_eq!(found, &expected[..end], "{name}");
        }
        assert_eq!(sequences(&line).len(), expected.len());
    }
}
