//! `conformance forward` against the logits of transformers.

use std::path::Path;

use safetensors::Dtype;

use crate::support::{Array, Arrays, ENCODERS, MODELS, cases, fixture, read, succeed, tool, write};

/// Runs the tool over tensors, and gives the logits.
fn forward(model: &str, inputs: &[(&str, &Array)], dtype: &str) -> Array {
    logits_of(model, inputs, dtype, |arguments| benches::conformance::run(arguments).unwrap())
}

/// The same by the binary, which takes half a second to start.
fn forward_by_binary(model: &str, inputs: &[(&str, &Array)], dtype: &str) -> Array {
    logits_of(model, inputs, dtype, |arguments| {
        let said = succeed(tool().args(arguments));
        assert_eq!(said, "", "forward has nothing to say on stdout");
    })
}

fn logits_of(model: &str, inputs: &[(&str, &Array)], dtype: &str, run: impl Fn(&[String])) -> Array {
    let mut outputs = outputs_of(model, inputs, dtype, run);
    assert_eq!(outputs.keys().collect::<Vec<_>>(), ["logits"]);
    outputs.remove("logits").unwrap()
}

fn outputs_of(model: &str, inputs: &[(&str, &Array)], dtype: &str, run: impl Fn(&[String])) -> Arrays {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    write(&from, inputs);
    let paths = [&fixture(model), &from, &to].map(|path| path.to_str().unwrap().to_owned());
    let dtype = ["--dtype", dtype].map(str::to_owned);
    run(&[&["forward".to_owned()], &paths[..], &dtype[..]].concat());
    read(&to)
}

/// The largest difference of two `[B, T, V]`, where the mask `[B, T]` is not 0.
fn difference(found: &Array, expected: &Array, mask: Option<&Array>) -> f32 {
    assert_eq!(found.shape, expected.shape);
    let kept = mask.map_or_else(|| vec![1; found.shape[0] * found.shape[1]], Array::integers);
    let vocab = found.shape[2];
    let (found, expected) = (found.floats(), expected.floats());
    let positions = found.chunks(vocab).zip(expected.chunks(vocab)).zip(kept);
    let kept = positions.filter(|(_, kept)| *kept != 0).flat_map(|((a, b), _)| a.iter().zip(b));
    let differences: Vec<f32> = kept.map(|(a, b)| (a - b).abs()).collect();
    assert!(!differences.is_empty() && differences.iter().all(|d| d.is_finite()));
    differences.into_iter().fold(0.0, f32::max)
}

#[test]
fn logits_equal_those_of_transformers() {
    let mut worst: f32 = 0.0;
    for model in MODELS {
        let cases = cases(model);
        for case in ["plain", "left", "right", "positions"] {
            let get = |name: &str| cases.get(&format!("{case}.{name}"));
            let (ids, mask, positions) =
                (get("input_ids").unwrap(), get("attention_mask"), get("position_ids"));
            let mut inputs = vec![("input_ids", ids)];
            inputs.extend(mask.map(|mask| ("attention_mask", mask)));
            // In the cases that pad, positions are the tool's to count from the mask.
            inputs.extend(positions.filter(|_| case == "positions").map(|p| ("position_ids", p)));
            let run = if case == "left" { forward_by_binary } else { forward };
            let logits = run(model, &inputs, "f32");
            assert_eq!(logits.dtype, Dtype::F32);
            let diff = difference(&logits, get("logits").unwrap(), mask);
            assert!(diff <= 1e-4, "{model}, {case}: {diff}");
            worst = worst.max(diff);
        }
    }
    println!("largest difference from transformers, 12 models of 4 cases: {worst:.2e}");
}

/// Every case of every encoder and encoder-decoder, with the arguments that transformers got: all output fields.
#[test]
fn outputs_of_encoders_equal_those_of_transformers() {
    let (mut worst, mut count): (f32, usize) = (0.0, 0);
    for (model, fields) in ENCODERS {
        let cases = cases(model);
        for case in ["plain", "right", "left", "masked", "types", "positions", "decoder"] {
            let of_case =
                |name: &str| name.split_once('.').filter(|(c, _)| *c == case).map(|(_, n)| n.to_owned());
            let all: Vec<(String, &Array)> =
                cases.iter().filter_map(|(name, array)| Some((of_case(name)?, array))).collect();
            if all.is_empty() {
                continue;
            }
            let given =
                |name: &str| name.contains("input") || name.ends_with("_mask") || name.ends_with("_ids");
            let inputs: Vec<(&str, &Array)> = all
                .iter()
                .filter(|(name, _)| given(name))
                .map(|(name, array)| (name.as_str(), *array))
                .collect();
            let get = |name: &str| all.iter().find(|(found, _)| found == name).map(|(_, array)| *array);
            let found =
                outputs_of(model, &inputs, "f32", |arguments| benches::conformance::run(arguments).unwrap());
            assert_eq!(found.keys().collect::<Vec<_>>(), fields, "{model}, {case}");
            for (field, found) in &found {
                let expected = get(field).unwrap();
                // Of padding nothing is said; what a whole text has, no mask hides.
                let mask = match (field.as_str(), found.shape.len()) {
                    (_, 2) => None,
                    ("logits", _) if model.starts_with("t5") => get("decoder_attention_mask"),
                    _ => get("attention_mask"),
                };
                let three = |array: &Array| match array.shape[..] {
                    [rows, width] => Array::new(array.dtype, &[rows, 1, width], array.bytes.clone()),
                    _ => array.clone(),
                };
                let diff = difference(&three(found), &three(expected), mask);
                assert!(diff <= 1e-4, "{model}, {case}, {field}: {diff}");
                worst = worst.max(diff);
                count += 1;
            }
        }
    }
    assert_eq!(count, 50, "output fields that were there to compare");
    println!("largest difference from transformers, {count} output fields of 7 models: {worst:.2e}");
}

#[test]
fn given_positions_are_the_counted_ones() {
    let cases = cases("llama_rope_linear");
    for case in ["left", "right"] {
        let get = |name: &str| &cases[&format!("{case}.{name}")];
        let (ids, mask) = (("input_ids", get("input_ids")), ("attention_mask", get("attention_mask")));
        let positions = ("position_ids", get("position_ids"));
        assert_eq!(
            forward("llama_rope_linear", &[ids, mask, positions], "f32"),
            forward("llama_rope_linear", &[ids, mask], "f32"),
            "{case}"
        );
    }
}

#[test]
fn a_mask_may_be_of_any_type() {
    let cases = cases("qwen2");
    let ids = ("input_ids", &cases["left.input_ids"]);
    let mask = &cases["left.attention_mask"];
    let expected = forward("qwen2", &[ids, ("attention_mask", mask)], "f32");
    let kept = mask.integers();
    let bools = kept.iter().map(|&k| u8::from(k != 0)).collect();
    let floats = kept.iter().flat_map(|&k| if k != 0 { 1.0f32 } else { 0.0 }.to_le_bytes()).collect();
    let ints = kept.iter().flat_map(|&k| i32::try_from(k).unwrap().to_le_bytes()).collect();
    for (dtype, bytes) in [(Dtype::BOOL, bools), (Dtype::F32, floats), (Dtype::I32, ints)] {
        let mask = Array::new(dtype, &mask.shape, bytes);
        assert_eq!(forward("qwen2", &[ids, ("attention_mask", &mask)], "f32"), expected, "{dtype:?}");
    }
}

#[test]
fn ids_may_be_of_a_narrower_type() {
    let cases = cases("mistral");
    let ids = &cases["plain.input_ids"];
    let narrow = ids.integers().iter().flat_map(|&id| i32::try_from(id).unwrap().to_le_bytes()).collect();
    let narrow = Array::new(Dtype::I32, &ids.shape, narrow);
    assert_eq!(
        forward("mistral", &[("input_ids", &narrow)], "f32"),
        forward("mistral", &[("input_ids", ids)], "f32")
    );
}

/// Rows of the table of embeddings, looked up here, in place of the ids.
#[test]
fn embeddings_stand_for_ids() {
    let cases = cases("llama_gqa_tied");
    let ids = &cases["plain.input_ids"];
    let table = &read(&fixture("llama_gqa_tied").join("model.safetensors"))["model.embed_tokens.weight"];
    let (width, values) = (table.shape[1], table.floats());
    let rows = ids.integers().into_iter().flat_map(|id| {
        let start = usize::try_from(id).unwrap() * width;
        values[start..start + width].iter().flat_map(|v| v.to_le_bytes())
    });
    let embeds = Array::new(Dtype::F32, &[ids.shape[0], ids.shape[1], width], rows.collect());
    let by_ids = forward("llama_gqa_tied", &[("input_ids", ids)], "f32");
    assert_eq!(forward("llama_gqa_tied", &[("inputs_embeds", &embeds)], "f32"), by_ids);
    // In a run of another type they are rounded to it, as the model's own are.
    assert_eq!(
        forward("llama_gqa_tied", &[("inputs_embeds", &embeds)], "bf16"),
        forward("llama_gqa_tied", &[("input_ids", ids)], "bf16"),
    );
}

#[test]
fn bf16_runs_near_f32() {
    for model in MODELS {
        let cases = cases(model);
        let (ids, mask) = (&cases["left.input_ids"], &cases["left.attention_mask"]);
        let logits = forward(model, &[("input_ids", ids), ("attention_mask", mask)], "bf16");
        assert_eq!(logits.dtype, Dtype::BF16);
        let expected = &cases["left.logits"];
        let diff = difference(&logits, expected, Some(mask));
        let scale = expected.floats().iter().fold(0.0f32, |a, b| a.max(b.abs()));
        println!("{model}: bf16 differs by {diff:.3}, logits go up to {scale:.1}");
        // 8 bits of mantissa; a few dozen roundings.
        assert!(diff <= 0.1 * scale, "{model}: {diff} of {scale}");
    }
}

#[test]
fn configurations_of_transformers_4_are_read() {
    for model in ["llama_gqa_tied", "llama_rope_linear", "llama_rope_llama3"] {
        let folder = tempfile::tempdir().unwrap();
        let copy = |from: &str, to: &str| {
            std::fs::copy(fixture(model).join(from), folder.path().join(to)).unwrap();
        };
        copy("model.safetensors", "model.safetensors");
        copy("config_old.json", "config.json");
        let cases = cases(model);
        let ids = ("input_ids", &cases["plain.input_ids"]);
        // An absolute path replaces the folder of the fixtures.
        let logits = forward(Path::new(folder.path()).to_str().unwrap(), &[ids], "f32");
        assert!(difference(&logits, &cases["plain.logits"], None) <= 1e-4, "{model}");
    }
}

#[test]
fn denoisers_predict_what_those_of_diffusers_do() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    for name in ["unet_ddpm", "unet_adm", "unet_sdxl", "unet_if1", "unet_if2", "unet_karlo_decoder"] {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-diffusion/tests/fixtures");
        let model = model.join(name);
        let mut inputs = read(&model.join("cases.safetensors"));
        let expected = inputs.remove("output").unwrap();
        write(&from, &inputs.iter().map(|(name, array)| (name.as_str(), array)).collect::<Vec<_>>());
        let paths = [&model, &from, &to].map(|path| path.to_str().unwrap().to_owned());
        benches::conformance::run(&[&["forward".to_owned()], &paths[..]].concat()).unwrap();
        let outputs = read(&to);
        assert_eq!(outputs.keys().collect::<Vec<_>>(), ["sample"], "{name}");
        let found = &outputs["sample"];
        assert_eq!(found.shape, expected.shape, "{name}");
        let pairs = found.floats().into_iter().zip(expected.floats());
        let distance = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(distance <= 2e-4, "{name}: {distance}");
    }
}
