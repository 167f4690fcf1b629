//! What the tool refuses: one message that says what was expected and found, and exit code 1.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use benches::conformance::USAGE;

use crate::support::{Array, fail, fixture, tool, with_tokenizer, write};

/// Fails, with each of these in the message that the binary would print.
fn refused(arguments: &[&str], said: &[&str]) {
    let owned: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let message = match benches::conformance::run(&owned) {
        Ok(()) => panic!("{arguments:?} ended well, with no word of {said:?}"),
        Err(error) => error.to_string(),
    };
    check(arguments, &message, said);
}

/// The same by the binary, which takes half a second to start.
fn refused_by_binary(arguments: &[&str], said: &[&str]) {
    check(arguments, &fail(tool().args(arguments).env("CUDA_VISIBLE_DEVICES", "")), said);
}

fn check(arguments: &[&str], message: &str, said: &[&str]) {
    for part in said {
        assert!(message.contains(part), "{arguments:?}: expected `{part}` in\n{message}");
    }
    assert!(!message.contains("Exception raised"), "{arguments:?}\n{message}");
    // How the tool is used takes more than a line.
    let lines = if arguments.first().is_some_and(|&a| a == "forward" || a == "generate") {
        1
    } else {
        1 + USAGE.lines().count()
    };
    assert!(message.lines().count() <= lines, "{arguments:?}\n{message}");
}

#[test]
fn the_binary_prints_one_message_and_exits_with_1() {
    let folder = fixture("mistral");
    let model = folder.to_str().unwrap();
    refused_by_binary(
        &[],
        &[
            "forward, generate, schedule, text-to-image or shapes-read",
            "nothing",
            "conformance forward MODEL_DIR",
        ],
    );
    refused_by_binary(&["generate", model, "--top-k", "5"], &["--top-k", "--prompt", "--config"]);
    refused_by_binary(&["generate", "/absent", "--prompt", "A"], &["/absent", "No such file"]);
    // The variable hides the devices that there may be.
    refused_by_binary(
        &["generate", model, "--prompt", "A", "--device", "cuda:0"],
        &["device `cuda:0` is not available"],
    );
    let model = with_tokenizer("mistral");
    let config = model.path().join("test_config.json");
    fs::write(&config, r#"{"max_tokens": 5}"#).unwrap();
    let (model, config) = (model.path().to_str().unwrap(), config.to_str().unwrap());
    refused_by_binary(
        &["generate", model, "--input-ids", "5", "--config", config],
        &["test_config.json", "unknown field `max_tokens`", "max_new_tokens"],
    );
    // What only running finds.
    fs::write(config, json!({ "suppress_tokens": (0..53).collect::<Vec<_>>() }).to_string()).unwrap();
    refused_by_binary(
        &["generate", model, "--input-ids", "5", "--config", config],
        &["row 0, step 0: every token is banned"],
    );
}

#[test]
fn command_lines() {
    let folder = fixture("mistral");
    let model = folder.to_str().unwrap();
    refused(&[], &["forward, generate, schedule, text-to-image or shapes-read", "nothing"]);
    refused(&["train", model], &["forward, generate, schedule, text-to-image or shapes-read", "train"]);
    refused(&["forward", model], &["MODEL_DIR INPUTS.safetensors OUTPUTS.safetensors", "1 of them"]);
    refused(&["generate"], &["MODEL_DIR", "0 of them"]);
    refused(&["generate", model, "x"], &["MODEL_DIR", "2 of them"]);
    refused(&["generate", model, "--top-k", "5"], &["--top-k", "--prompt", "--config"]);
    refused(&["forward", model, "a", "b", "--seed", "5"], &["--seed", "--dtype, --device"]);
    refused(&["generate", model, "--prompt"], &["--prompt", "a value", "nothing"]);
    refused(&["generate", model, "--prompt", "A", "--seed", "-1"], &["--seed", "≥ 0", "-1"]);
    refused(&["generate", model, "--prompt", "A", "--dtype", "int8"], &["f32, f64, f16 or bf16", "int8"]);
    refused(&["generate", model, "--prompt", "A", "--device", "tpu"], &["cpu, cuda", "tpu"]);
    refused(&["generate", model, "--input-ids", "1,two"], &["--input-ids", "1,two"]);
    refused(&["generate", model, "--input-ids", ""], &["--input-ids"]);
}

#[test]
fn help_is_no_error() {
    for argument in ["help", "--help"] {
        let text = crate::support::succeed(tool().arg(argument));
        assert!(text.contains("conformance forward") && text.contains("conformance generate"), "{text}");
    }
}

#[test]
fn prompts() {
    let model = with_tokenizer("mistral");
    let path = model.path().to_str().unwrap();
    let refused = |arguments: &[&str], said: &[&str]| {
        refused(&[&["generate", path], arguments].concat(), said);
    };
    refused(&[], &["--prompt or --input-ids", "neither"]);
    refused(&["--prompt", "A", "--input-ids", "1"], &["--prompt or --input-ids", "both"]);
    refused(&["--input-ids", "1,53"], &["token id in prompt 0", "0 .. 53", "53"]);
    refused(&["--input-ids", "1", "--input-ids", "-4"], &["token id in prompt 1", "0 .. 53", "-4"]);
    let long = vec!["7"; 65].join(",");
    refused(&["--input-ids", &long], &["64 positions", "65"]);
}

#[test]
fn models() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    refused(&["generate", &at("absent"), "--prompt", "A"], &["absent", "No such file"]);
    refused(&["generate", &at("absent.gguf"), "--prompt", "A"], &["absent.gguf", "No such file"]);
    refused(&["forward", &at("absent"), "a", "b"], &["No such file"]);
    // No tokenizer beside the model.
    let bare = fixture("mistral");
    refused(&["generate", bare.to_str().unwrap(), "--prompt", "A"], &["tokenizer.json", "No such file"]);

    let write = |config: &str| fs::write(folder.path().join("config.json"), config).unwrap();
    let model = at("");
    write("{");
    refused(&["generate", &model, "--prompt", "A"], &["config.json", "EOF"]);
    write("[]");
    refused(&["generate", &model, "--prompt", "A"], &["config.json", "JSON object"]);
    write("{}");
    refused(
        &["generate", &model, "--prompt", "A"],
        &["model.safetensors", "neither this file nor its index"],
    );
    fs::copy(fixture("mistral").join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    refused(
        &["generate", &model, "--prompt", "A"],
        &["model_type", "gpt2, llama, mistral, qwen2, qwen3", "nothing"],
    );
    write(r#"{"model_type":"falcon"}"#);
    refused(&["generate", &model, "--prompt", "A"], &["falcon", "gpt2, llama, mistral, qwen2, qwen3"]);
    let config = fs::read_to_string(fixture("mistral").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["hidden_size"] = json!(0);
    write(&config.to_string());
    refused(&["generate", &model, "--prompt", "A"], &["config.json", "`hidden_size`", "1 ..=", "0"]);
    config["hidden_size"] = json!(32);
    write(&config.to_string());
    refused(&["generate", &model, "--prompt", "A"], &["model.safetensors", "[53, 32]", "[53, 24]"]);
}

#[test]
fn generation_configurations() {
    let model = with_tokenizer("mistral");
    let path = model.path().join("test_config.json");
    let refused = |config: &Value, said: &[&str]| {
        fs::write(&path, config.to_string()).unwrap();
        let (model, config) = (model.path().to_str().unwrap(), path.to_str().unwrap());
        refused(&["generate", model, "--input-ids", "5,6", "--config", config], said);
    };
    refused(
        &json!({ "max_tokens": 5 }),
        &["test_config.json", "unknown field `max_tokens`", "max_new_tokens"],
    );
    refused(&json!({ "max_new_tokens": -5 }), &["test_config.json", "-5"]);
    refused(&json!({ "max_new_tokens": "5" }), &["test_config.json", "string"]);
    refused(&json!([1]), &["test_config.json", "expected a JSON object"]);
    refused(&json!({ "num_beams": 4, "do_sample": true }), &["do_sample with num_beams = 4"]);
    refused(&json!({ "num_beams": 4, "num_return_sequences": 5 }), &["at most num_beams = 4", "5"]);
    refused(&json!({ "num_beams": 0 }), &["num_beams", "at least 1"]);
    refused(&json!({ "early_stopping": "always" }), &["test_config.json", "early_stopping", "always"]);
    refused(&json!({ "num_return_sequences": 0 }), &["at least 1"]);
    for n in [2_000_000, 100_000_000_000, u64::MAX] {
        refused(&json!({ "num_return_sequences": n }), &["at most 1048576", &n.to_string()]);
    }
    refused(&json!({ "max_length": 2 }), &["max_length", "more than the prompt's 2 tokens"]);
    for (field, bad) in [
        ("temperature", json!(0)),
        ("temperature", json!(-1.0)),
        ("top_p", json!(1.5)),
        ("min_p", json!(-0.1)),
        ("typical_p", json!(2)),
    ] {
        refused(&json!({ "do_sample": true, field: bad }), &["expected", "found"]);
    }
    refused(&json!({ "repetition_penalty": 0.0 }), &["expected", "found 0"]);
    refused(
        &json!({ "suppress_tokens": (0..53).collect::<Vec<_>>() }),
        &["row 0, step 0: every token is banned"],
    );
    refused(&json!({ "suppress_tokens": [53] }), &["53"]);
    refused(&json!({ "bad_words_ids": [[]] }), &["expected"]);
    refused(&json!({ "eos_token_id": 53 }), &["EOS token id", "0 .. 53", "53"]);
    refused(&json!({ "stop": [""] }), &["stop"]);
    refused(&json!({ "negative_prompt_ids": [5] }), &["guidance_scale of a negative prompt"]);
    refused(
        &json!({ "guidance_scale": 2, "negative_prompt": "A", "negative_prompt_ids": [5] }),
        &["negative_prompt or negative_prompt_ids", "both"],
    );
    refused(&json!({ "guidance_scale": 2, "negative_prompt_ids": [53] }), &["token id of a term", "0 .. 53"]);
    refused(&json!({ "guidance_scale": 2, "negative_prompt_ids": [] }), &["text in the prompt's place"]);
    refused(
        &json!({ "guidance_scale": 2, "negative_prompt_ids": (0..65).map(|_| 5).collect::<Vec<_>>() }),
        &["64 positions", "65"],
    );
    let absent = model.path().join("absent.json");
    let model = model.path().to_str().unwrap();
    crate::refusals::refused(
        &["generate", model, "--input-ids", "5", "--config", absent.to_str().unwrap()],
        &["absent.json", "No such file"],
    );
}

#[test]
fn inputs() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let model = fixture("gpt2_gelu_new");
    let refused = |said: &[&str]| {
        refused(&["forward", model.to_str().unwrap(), from.to_str().unwrap(), to.to_str().unwrap()], said);
        assert!(!to.exists(), "an output after {said:?}");
    };
    refused(&["in.safetensors", "No such file"]);
    fs::write(&from, b"not a safetensors file").unwrap();
    refused(&["in.safetensors"]);

    let ids = Array::ids(&[1, 3], &[5, 6, 7]);
    let ones = Array::ids(&[1, 3], &[1, 1, 1]);
    let given = |arrays: &[(&str, &Array)], said: &[&str]| {
        write(&from, arrays);
        refused(said);
    };
    given(&[], &["input_ids or inputs_embeds", "neither"]);
    given(&[("ids", &ids)], &["input_ids, inputs_embeds, attention_mask, position_ids", "ids"]);
    given(&[("input_ids", &Array::ids(&[3], &[5, 6, 7]))], &["[B, T]", "[3]"]);
    given(&[("input_ids", &Array::ids(&[1, 3], &[5, 6, 53]))], &["token id", "0 .. 53", "53"]);
    given(&[("input_ids", &Array::ids(&[1, 3], &[5, 6, -1]))], &["token id", "0 .. 53", "-1"]);
    given(&[("input_ids", &Array::ids(&[1, 0], &[]))], &["at least one row and one token", "[1, 0]"]);
    given(&[("input_ids", &Array::ids(&[0, 3], &[]))], &["at least"]);
    given(&[("input_ids", &Array::ids(&[1, 65], &[5; 65]))], &["64 positions", "65"]);
    given(&[("input_ids", &ids), ("attention_mask", &Array::ids(&[1, 2], &[1, 1]))], &["[1, 3]", "[1, 2]"]);
    given(&[("input_ids", &ids), ("position_ids", &Array::ids(&[3], &[0, 1, 2]))], &["[1, 3]", "[3]"]);
    given(
        &[("input_ids", &ids), ("position_ids", &Array::ids(&[1, 3], &[0, 1, 64]))],
        &["64 positions", "65"],
    );
    given(&[("input_ids", &ids), ("position_ids", &Array::ids(&[1, 3], &[-1, 0, 1]))], &["-1"]);
    let float = Array::new(Dtype::F32, &[1, 3], [1.0f32; 3].iter().flat_map(|x| x.to_le_bytes()).collect());
    given(&[("input_ids", &float)], &["input_ids", "an integer type", "Float"]);
    let embeds =
        Array::new(Dtype::F32, &[1, 1, 8], [1.0f32; 8].iter().flat_map(|x| x.to_le_bytes()).collect());
    given(&[("inputs_embeds", &embeds)], &["embeddings", "[1, 1, 24]", "[1, 1, 8]"]);
    given(&[("input_ids", &ids), ("inputs_embeds", &embeds)], &["input_ids or inputs_embeds", "both"]);
    given(&[("attention_mask", &ones)], &["input_ids or inputs_embeds", "neither"]);

    write(&from, &[("input_ids", &ids)]);
    let nowhere = folder.path().join("absent/out.safetensors");
    crate::refusals::refused(
        &["forward", model.to_str().unwrap(), from.to_str().unwrap(), nowhere.to_str().unwrap()],
        &["absent", "No such file"],
    );
}

/// A damaged file of weights is refused before anything is written.
#[test]
fn truncated_weights() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture("mistral").join("model.safetensors")).unwrap();
    fs::copy(fixture("mistral").join("config.json"), folder.path().join("config.json")).unwrap();
    fs::write(folder.path().join("model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    let inputs = folder.path().join("in.safetensors");
    write(&inputs, &[("input_ids", &Array::ids(&[1, 1], &[5]))]);
    let out = folder.path().join("out.safetensors");
    let paths = [folder.path(), &inputs, &out].map(|path| path.to_str().unwrap());
    refused(&["forward", paths[0], paths[1], paths[2]], &["model.safetensors"]);
    assert!(!out.exists());
}
