//! What is refused, and what is said of it.

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::config::Config;
use controlgen_core::{Condition, Denoiser, Error, Pass, Placement, Result};
use controlgen_diffusion::models::load_denoiser;
use serde_json::{Value, json};
use tch::kind::FLOAT_CPU;
use tch::{Kind, Tensor};

use crate::support::{Case, folder, open, predicts};

/// The model of a fixture with other fields in its configuration.
fn changed(name: &str, learned: bool, changes: &[(&str, Value)]) -> Result<Box<dyn Denoiser>> {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    let Value::Object(mut fields) = serde_json::from_str(&text).unwrap() else { panic!("no object") };
    for (field, value) in changes {
        fields.insert((*field).to_owned(), value.clone());
    }
    let config = Config::from_fields("config.json", fields);
    let source = Safetensors::open(folder(name)).unwrap();
    let weights = Weights::new(&source, Placement::CPU.options());
    load_denoiser(&config, &weights, predicts(learned), Placement::CPU)
}

fn said(found: Result<Box<dyn Denoiser>>) -> String {
    match found {
        Ok(_) => panic!("taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn unknown_classes_and_blocks_name_the_known() {
    let cases = [
        ("unet_sd1", "_class_name", json!("UNet3DModel"), "UNet2DConditionModel"),
        (
            "unet_sd1",
            "down_block_types",
            json!(["KCrossAttnDownBlock2D", "DownBlock2D"]),
            "SimpleCrossAttnDownBlock2D",
        ),
        ("unet_sd1", "up_block_types", json!(["UpBlock2D", "SkipUpBlock2D"]), "ResnetUpsampleBlock2D"),
        ("unet_sd1", "mid_block_type", json!("UNetMidBlock3D"), "UNetMidBlock2DSimpleCrossAttn"),
        ("unet_ddpm", "down_block_types", json!(["DownBlock2D", "CrossAttnDownBlock2D"]), "AttnDownBlock2D"),
        ("unet_ddpm", "up_block_types", json!(["SkipUpBlock2D", "UpBlock2D"]), "ResnetUpsampleBlock2D"),
        ("unet_ddpm", "time_embedding_type", json!("fourier"), "positional"),
        ("unet_ddpm", "resnet_time_scale_shift", json!("spatial"), "scale_shift"),
        ("unet_ddpm", "downsample_type", json!("fir"), "resnet"),
        ("unet_sd1", "class_embed_type", json!("one_hot"), "simple_projection"),
        ("unet_sd1", "addition_embed_type", json!("image"), "text_time"),
        ("unet_sd1", "encoder_hid_dim_type", json!("image_proj"), "text_proj"),
        ("unet_sd1", "dual_cross_attention", json!(true), "false"),
        ("unet_sd1", "time_cond_proj_dim", json!(256), "null"),
        ("unet_if1", "cross_attention_norm", json!("rms_norm"), "group_norm"),
    ];
    for (name, field, value, known) in cases {
        let found = said(changed(name, name == "unet_if1", &[(field, value.clone())]));
        assert!(found.contains(known), "{field} {value}: {found}");
        let odd = value.as_array().map_or(&value, |values| {
            values.iter().find(|v| found.contains(v.as_str().unwrap())).unwrap_or(&values[0])
        });
        let odd = odd.as_str().map_or_else(|| odd.to_string(), str::to_owned);
        assert!(found.contains(&odd), "{field} {value}: {found}");
    }
}

#[test]
fn configurations_without_sense_are_refused() {
    let cases = [
        ("unet_sd1", "block_out_channels", json!([8, 10]), "multiples of norm_num_groups"),
        ("unet_sd1", "block_out_channels", json!([]), "1 to 16"),
        ("unet_sd1", "block_out_channels", json!([8, 12, 16]), "down_block_types"),
        ("unet_sd1", "attention_head_dim", json!(3), "a divisor of"),
        ("unet_sd1", "attention_head_dim", json!([4]), "2 integers"),
        ("unet_ddpm", "sample_size", json!(9), "a multiple of"),
        ("unet_sd1", "in_channels", json!(3), "at least 4"),
        ("unet_sd1", "conv_in_kernel", json!(4), "odd"),
        ("unet_sd1", "only_cross_attention", json!([true]), "2 booleans"),
        ("unet_if1", "cross_attention_dim", json!(24), "32"),
        ("unet_if1", "addition_embed_type_num_heads", json!(5), "a divisor of 24"),
        ("unet_if1", "out_channels", json!(5), "even"),
        ("unet_sdxl", "addition_time_embed_dim", Value::Null, "addition_time_embed_dim"),
    ];
    for (name, field, value, expected) in cases {
        let found = changed(name, name == "unet_if1", &[(field, value.clone())]);
        let Err(error @ Error::Config { .. }) = found else { panic!("{field} {value}: {:?}", found.err()) };
        assert!(error.to_string().contains(expected), "{field} {value}: {error}");
    }
    // Another model's weights.
    let found = changed("unet_sd1", false, &[("class_embed_type", json!("timestep"))]);
    let Err(Error::Keys { missing, .. }) = found else { panic!("{:?}", found.err()) };
    assert!(missing.iter().any(|name| name == "class_embedding.linear_1.weight"), "{missing:?}");
    let found = changed("unet_sd1", false, &[("cross_attention_dim", json!(16))]);
    assert!(matches!(found, Err(Error::Shape { .. })));
}

fn prepare(model: &dyn Denoiser, conditions: &[Condition]) -> Error {
    match model.prepare(conditions, &Pass::default()) {
        Ok(_) => panic!("taken"),
        Err(error) => error,
    }
}

fn features(condition: Condition) -> Vec<(String, Tensor)> {
    match condition {
        Condition::Features(features) => features,
        _ => panic!("no features"),
    }
}

/// The condition of a row with one feature replaced, added or left out.
fn with(condition: Condition, name: &str, value: Option<Tensor>) -> Condition {
    let mut rest: Vec<_> = features(condition).into_iter().filter(|feature| feature.0 != name).collect();
    rest.extend(value.map(|value| (name.to_owned(), value)));
    Condition::Features(rest)
}

#[test]
fn conditions_that_are_missing_or_strange_are_refused() {
    let _no_gradients = tch::no_grad_guard();
    for (name, learned) in [("unet_sdxl", false), ("unet_if2", true), ("unet_karlo_decoder", true)] {
        let model = open(name, learned, Placement::CPU);
        let case = Case::of(name, &*model);
        let required: Vec<String> = features(case.condition(0)).into_iter().map(|f| f.0).collect();
        for missing in required.iter().filter(|name| *name != "encoder_attention_mask") {
            let error = prepare(&*model, &[with(case.condition(0), missing, None)]);
            assert!(error.to_string().contains(missing.as_str()), "{name}: {error}");
        }
        for odd in [Condition::Null, Condition::Class(0)] {
            let error = prepare(&*model, &[odd]);
            assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error}");
            assert!(error.to_string().contains("encoder_hidden_states"), "{name}: {error}");
        }
        let stranger = with(case.condition(0), "image_embeds", Some(Tensor::zeros([4], FLOAT_CPU)));
        let error = prepare(&*model, &[stranger]);
        assert!(error.to_string().contains("image_embeds"), "{name}: {error}");
        for odd in required.iter().filter(|name| *name != "encoder_attention_mask") {
            let wrong = with(case.condition(0), odd, Some(Tensor::zeros([1, 2, 3, 4], FLOAT_CPU)));
            let error = prepare(&*model, &[wrong]);
            assert!(matches!(error, Error::Shape { .. }), "{name}, {odd}: {error}");
        }
        let short =
            features(case.condition(1)).into_iter().find(|f| f.0 == "encoder_hidden_states").unwrap().1;
        let short = with(case.condition(1), "encoder_hidden_states", Some(short.narrow(0, 0, 3)));
        let short = with(short, "encoder_attention_mask", None);
        let error = prepare(&*model, &[with(case.condition(0), "encoder_attention_mask", None), short]);
        assert!(matches!(error, Error::Shape { .. }), "{name}: texts of two lengths: {error}");
        let unseen =
            |n| with(case.condition(0), "encoder_attention_mask", Some(Tensor::zeros([n], FLOAT_CPU)));
        let len = features(case.condition(0)).into_iter().find(|f| f.0 == "encoder_hidden_states").unwrap();
        let len = len.1.size()[0];
        assert!(
            matches!(prepare(&*model, &[unseen(len)]), Error::Value { .. }),
            "{name}: nothing to be seen"
        );
        assert!(matches!(prepare(&*model, &[unseen(len + 1)]), Error::Shape { .. }), "{name}");
    }
    let model = open("unet_sdxl", false, Placement::CPU);
    let case = Case::of("unet_sdxl", &*model);
    let fewer = with(case.condition(0), "time_ids", Some(Tensor::zeros([5], FLOAT_CPU)));
    let error = prepare(&*model, &[fewer]);
    assert!(error.to_string().contains("text_embeds") && error.to_string().contains("time_ids"), "{error}");
    // Classes.
    let model = open("unet_adm", true, Placement::CPU);
    for odd in [Condition::Class(7), Condition::Class(-1)] {
        assert!(matches!(prepare(&*model, &[odd]), Error::Value { .. }));
    }
    assert!(matches!(prepare(&*model, &[Condition::Null]), Error::Unsupported { .. }));
    let model = open("unet_ddpm", false, Placement::CPU);
    for odd in [Condition::Class(0), Condition::Features(vec![("concat".into(), Tensor::from(0.0))])] {
        assert!(matches!(prepare(&*model, &[odd]), Error::Unsupported { .. }));
    }
    let model = open("unet_sd_upscaler", false, Placement::CPU);
    let case = Case::of("unet_sd_upscaler", &*model);
    let beyond = with(case.condition(0), "class_labels", Some(Tensor::from(50i64)));
    assert!(matches!(prepare(&*model, &[beyond]), Error::Value { .. }));
}

#[test]
fn samples_that_do_not_fit_are_refused() {
    let _no_gradients = tch::no_grad_guard();
    let model = open("unet_karlo_sr", false, Placement::CPU);
    let case = Case::of("unet_karlo_sr", &*model);
    let prepared = model.prepare(&case.conditions(), &Pass::default()).unwrap();
    let predict = |x: &Tensor| model.predict(x, &case.get("timestep"), &prepared, &Pass::default());
    assert!(predict(&case.x()).is_ok());
    let other = Tensor::zeros([2, 3, 8, 8], FLOAT_CPU);
    let Err(error @ Error::Shape { .. }) = predict(&other) else { panic!("another size than `concat`") };
    assert!(error.to_string().contains("concat"), "{error}");
    for shape in [[2, 4, 8, 12], [2, 3, 7, 12], [2, 3, 8, 11], [1, 3, 8, 12]] {
        assert!(predict(&Tensor::zeros(shape, FLOAT_CPU)).is_err(), "{shape:?}");
    }
    assert!(matches!(predict(&case.x().to_kind(Kind::Int64)), Err(Error::Kind { .. })));
}
