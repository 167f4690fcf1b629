//! config.json: every field of every fixture, gone or changed into what it should not be.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use controlgen_core::checkpoint::Safetensors;
use controlgen_core::{Error, LmInput};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::support::{MODELS, fields, folder, forward, ids, load, refused, start, typed, weights};

/// What a field is changed into; the first takes it away.
fn changes() -> Vec<Option<Value>> {
    let big = 1i64 << 40;
    let values = [
        json!(null),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(4096),
        json!(1 << 20),
        json!(big),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(1e30),
        json!(1e-300),
        json!(1e308),
        json!("x"),
        json!(""),
        json!("12"),
        json!(true),
        json!(false),
        json!([]),
        json!([7]),
        json!([[]]),
        json!([big]),
        json!({}),
        json!({ "rope_type": "x" }),
    ];
    std::iter::once(None).chain(values.into_iter().map(Some)).collect()
}

/// The paths of all fields, those of objects inside included.
fn paths(fields: &Map<String, Value>) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (name, value) in fields {
        found.push(vec![name.clone()]);
        if let Value::Object(inner) = value {
            found.extend(paths(inner).into_iter().map(|rest| [vec![name.clone()], rest].concat()));
        }
    }
    found
}

fn change(fields: &mut Map<String, Value>, path: &[String], to: Option<&Value>) {
    match (path, to) {
        ([name], None) => drop(fields.shift_remove(name)),
        ([name], Some(value)) => drop(fields.insert(name.clone(), value.clone())),
        ([name, rest @ ..], _) => change(fields[name].as_object_mut().unwrap(), rest, to),
        ([], _) => {}
    }
}

/// Loads the model and, if there is one, runs it: the end of its context included.
fn exercise(fields: &Map<String, Value>, weights: &Safetensors) -> Result<(), Error> {
    let _guard = tch::no_grad_guard();
    let lm = load(fields, weights)?;
    let spec = lm.spec();
    assert!(spec.vocab > 0 && spec.width > 0 && spec.context > 0);
    let mut state = start(&*lm, 2);
    let prompt = ids(&[2, 3], &[0, 1, 2, 3, 4, 5]);
    let keep = ids(&[2, 3], &[0, 1, 1, 1, 1, 1]).ne(0);
    let logits = forward(&*lm, LmInput::ids(&prompt).keep(Some(&keep)), &mut state)?;
    assert_eq!(logits.size(), [2, 3, spec.vocab]);
    if spec.context < 200 {
        let more = ids(&[1, 1], &[1]).expand([2, spec.context - 2], false);
        refused(forward(&*lm, LmInput::ids(&more), &mut state), &["positions"]);
    }
    Ok(())
}

/// Peaks of resident and of virtual memory, in MB.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) >> 10
    };
    (field("VmHWM:"), field("VmPeak:"))
}

#[test]
fn every_field_changed() {
    let (resident, virtual_) = memory();
    let (mut opened, mut refusals, mut slowest) = (0, 0, Duration::ZERO);
    for name in MODELS {
        let weights = weights(name);
        for file in ["config.json", "config_old.json"] {
            if !folder(name).join(file).exists() {
                continue;
            }
            let original = fields(name, file);
            exercise(&original, &weights).unwrap();
            for path in paths(&original) {
                for to in changes() {
                    let mut changed = original.clone();
                    change(&mut changed, &path, to.as_ref());
                    let what = format!("{name}/{file}: {} = {to:?}", path.join("."));
                    let begin = Instant::now();
                    match catch_unwind(AssertUnwindSafe(|| exercise(&changed, &weights))) {
                        Err(_) => panic!("{what} panicked"),
                        Ok(Ok(())) => opened += 1,
                        Ok(Err(error)) => {
                            println!("{what}: {error}");
                            typed(&error);
                            refusals += 1;
                        }
                    }
                    slowest = slowest.max(begin.elapsed());
                }
            }
        }
    }
    let (resident, virtual_) = (memory().0 - resident, memory().1 - virtual_);
    println!(
        "{refusals} refused, {opened} opened; the slowest took {slowest:.1?}; peaks grew by {resident} MB of memory, \
         {virtual_} MB of addresses"
    );
    assert!(refusals > 1000 && opened > 1000);
    // A loaded machine is slow, but not by this much.
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    assert!(resident < 256 && virtual_ < 4096, "{resident} MB, {virtual_} MB");
}

/// The error is about the field, and says what it held.
#[test]
fn a_field_that_makes_no_sense_is_named() {
    let absurd = [json!(0), json!(-1), json!(1i64 << 40), json!(1e30), json!(0.5)];
    let other_types = [json!("x"), json!(true), json!([]), json!({})];
    let numbers: Vec<Value> = absurd.iter().chain(&other_types).cloned().collect();
    let dims_of_llama = [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
    ];
    let dims_of_gpt2 = ["n_embd", "n_head", "n_inner", "n_layer", "n_positions", "vocab_size"];
    let rates = [json!(0), json!(-1.5), json!("x"), json!(true), json!([]), json!({})];
    let flags = [json!(0), json!("true"), json!([]), json!({})];
    let tokens =
        [json!(1i64 << 40), json!(53), json!(0.5), json!("x"), json!(true), json!({}), json!([1, "x"])];
    let names = [json!(1), json!(true), json!([]), json!({})];
    let check = |model: &str, path: &str, values: &[Value]| {
        let (original, weights) = (fields(model, "config.json"), weights(model));
        let path: Vec<String> = path.split('.').map(str::to_owned).collect();
        for value in values {
            let mut changed = original.clone();
            change(&mut changed, &path, Some(value));
            match load(&changed, &weights) {
                Err(Error::Config { file, field, found, .. }) => {
                    assert_eq!((file.as_str(), field), ("config.json", path.join(".")));
                    let part = value.as_array().map_or_else(|| value.to_string(), |_| String::new());
                    assert!(found.contains(&part), "{path:?} = {value}: found {found}");
                }
                Ok(_) => panic!("{model}: {path:?} = {value} was accepted"),
                Err(other) => panic!("{model}: {path:?} = {value}: {other}"),
            }
        }
    };
    for field in dims_of_llama {
        check("llama_gqa_tied", field, &numbers);
    }
    for field in dims_of_gpt2 {
        check("gpt2_gelu_new", field, &numbers);
    }
    check("llama_gqa_tied", "rms_norm_eps", &rates);
    check("llama_gqa_tied", "rope_parameters.rope_theta", &rates);
    check("gpt2_gelu_new", "layer_norm_epsilon", &rates);
    check("llama_rope_linear", "rope_parameters.factor", &rates);
    for field in ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] {
        check("llama_rope_llama3", &format!("rope_parameters.{field}"), &rates);
    }
    for field in ["tie_word_embeddings", "attention_bias", "mlp_bias"] {
        check("llama_gqa_tied", field, &flags);
    }
    check("gpt2_gelu_new", "scale_attn_weights", &flags);
    check("qwen2", "use_sliding_window", &flags);
    check("mistral", "sliding_window", &[json!(0), json!(-1), json!("x"), json!(true), json!([])]);
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        check("mistral", field, &tokens);
        check("gpt2_gelu_new", field, &tokens);
    }
    for (model, field) in [
        ("mistral", "hidden_act"),
        ("gpt2_gelu_new", "activation_function"),
        ("mistral", "model_type"),
        ("mistral", "rope_parameters.rope_type"),
    ] {
        check(model, field, &names);
    }
    check("mistral", "rope_parameters", &[json!(1), json!("x"), json!([]), json!(true)]);
}

#[test]
fn required_fields() {
    let required = [
        (
            "llama_gqa_tied",
            vec!["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"],
        ),
        ("llama_gqa_tied", vec!["vocab_size", "max_position_embeddings", "model_type"]),
        ("gpt2_gelu_new", vec!["n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "model_type"]),
    ];
    for (model, names) in required {
        let weights = weights(model);
        for name in names {
            for to in [None, Some(Value::Null)] {
                let mut changed = fields(model, "config.json");
                change(&mut changed, &[name.to_owned()], to.as_ref());
                refused(load(&changed, &weights), &["config.json", &format!("`{name}`"), "found nothing"]);
            }
        }
    }
}

#[test]
fn dimensions_that_disagree() {
    let with = |model: &str, name: &str, value: Value| {
        let mut changed = fields(model, "config.json");
        change(&mut changed, &[name.to_owned()], Some(&value));
        load(&changed, &weights(model))
    };
    refused(with("gpt2_gelu_new", "n_head", json!(5)), &["`n_embd`", "multiple of n_head = 5", "24"]);
    refused(with("llama_gqa_tied", "num_key_value_heads", json!(3)), &["divisor of num_attention_heads = 4"]);
    refused(
        with("llama_gqa_tied", "num_key_value_heads", json!(8)),
        &["`num_key_value_heads`", "1 ..= 4", "8"],
    );
    refused(with("qwen2", "num_attention_heads", json!(5)), &["num_attention_heads"]);
    refused(with("mistral", "sliding_window", json!(16)), &["sliding_window 16", "not supported"]);
    assert!(with("mistral", "sliding_window", json!(4096)).is_ok(), "a window that no sequence fills");
    refused(with("mistral", "hidden_act", json!("mish")), &["activation", "silu", "mish"]);
    refused(with("llama_head_dim", "head_dim", json!(7)), &["head_dim"]);
}

#[test]
fn unknown_architectures_name_the_known() {
    for unknown in ["falcon", "", "LLAMA", "llama "] {
        let mut changed = fields("mistral", "config.json");
        changed["model_type"] = json!(unknown);
        let error = refused(
            load(&changed, &weights("mistral")),
            &[&format!("`{unknown}`"), "gpt2, llama, mistral, qwen2, qwen3"],
        );
        assert!(matches!(error, Error::Unsupported { .. }));
    }
    // A rotary scaling that is not known: likewise.
    let mut changed = fields("mistral", "config.json");
    changed["rope_parameters"]["rope_type"] = json!("yarn");
    refused(load(&changed, &weights("mistral")), &["`yarn`", "default, linear, llama3"]);
}

/// A known architecture that is not this checkpoint's: the checkpoint is not taken for it.
#[test]
fn another_architecture() {
    let mut swapped = 0;
    for name in MODELS {
        for other in ["gpt2", "llama", "mistral", "qwen2", "qwen3"] {
            let mut changed = fields(name, "config.json");
            if changed["model_type"] == other {
                continue;
            }
            changed["model_type"] = json!(other);
            match load(&changed, &weights(name)) {
                // Mistral without a window is a Llama.
                Ok(lm) => {
                    assert!(["llama", "mistral"].contains(&&*lm.spec().architecture), "{name} as {other}");
                }
                Err(error) => {
                    typed(&error);
                    swapped += 1;
                }
            }
        }
    }
    assert!(swapped >= 36, "{swapped}");
}

#[test]
fn files_that_are_no_json_object() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        crate::support::folder("mistral").join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .unwrap();
    let deep = "[".repeat(100_000);
    let texts: [&[u8]; 9] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\"model_type\"",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        deep.as_bytes(),
    ];
    for text in texts {
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        refused(
            controlgen_text::models::open(folder.path(), controlgen_core::Placement::CPU),
            &["config.json"],
        );
    }
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    let error = refused(
        controlgen_text::models::open(folder.path(), controlgen_core::Placement::CPU),
        &["config.json", "No such file"],
    );
    assert!(matches!(error, Error::Io { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// The text of a config.json, with bytes changed, taken away and put in.
    #[test]
    fn damaged_text(
        model in 0..MODELS.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, any::<u8>()), 1..6),
    ) {
        let name = MODELS[model];
        let mut bytes = std::fs::read(folder(name).join("config.json")).unwrap();
        for (at, how, byte) in edits {
            let at = at.index(bytes.len());
            // Mostly digits and punctuation: letters rarely leave JSON that means anything.
            let byte = if byte < 200 { b"0123456789-.eE,:\"[]{}ntf"[usize::from(byte) % 24] } else { byte };
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        if let Ok(Value::Object(fields)) = serde_json::from_slice(&bytes)
            && let Err(error) = exercise(&fields, &weights(name))
        {
            typed(&error);
        }
    }
}
