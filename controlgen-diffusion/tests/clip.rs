//! CLIP's encoders and tokenizer against transformers, and prompts against diffusers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::testing::contract;
use controlgen_core::{
    At, Attn, Binding, Config, Control, Controls, Encoder, EncoderInput, Error, Next, Pass, Placement, Reads,
    SiteId, SiteKind, SiteMap, Tokens,
};
use controlgen_diffusion::models::{
    ClipLayer, ClipText, ClipTextInput, ClipVision, load_encoder, open_encoder,
};
use controlgen_diffusion::prompt::{
    ClipPairPrompt, ClipPrompt, ClipTokenizer, LongPrompts, PromptEncoder, apply_weights,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/clip").join(name)
}

fn tensors(path: impl AsRef<Path>) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

fn config(name: &str) -> Config {
    Config::open(&fixture(name).join("config.json")).unwrap()
}

fn text(name: &str) -> ClipText {
    let source = Safetensors::open(fixture(name)).unwrap();
    ClipText::load(&config(name), &Weights::new(&source, Placement::CPU.options()), Placement::CPU).unwrap()
}

fn vision(name: &str) -> ClipVision {
    let source = Safetensors::open(fixture(name)).unwrap();
    ClipVision::load(&config(name), &Weights::new(&source, Placement::CPU.options()), Placement::CPU).unwrap()
}

const TEXTS: [&str; 3] = ["text_legacy", "text", "text_projection"];

#[test]
fn text_encoders_are_transformers() {
    for name in TEXTS {
        let (encoder, cases) = (text(name), tensors(fixture(name).join("cases.safetensors")));
        for case in ["plain", "masked", "left"] {
            let ids = &cases[&format!("{case}.input_ids")];
            let keep = cases.get(&format!("{case}.attention_mask")).map(|mask| mask.ne(0));
            let shown = |hidden: &Tensor| match &keep {
                Some(keep) => hidden * keep.unsqueeze(-1),
                None => hidden.shallow_clone(),
            };
            let input = ClipTextInput::new(Tokens::Ids(ids), keep.as_ref());
            let found = encoder.forward(input, &Pass::default()).unwrap();
            let d = far(&shown(&found.hidden), &cases[&format!("{case}.last_hidden_state")]);
            assert!(d < 5e-5, "{name} {case}: last_hidden_state {d}");
            let pooled = if encoder.projects() { "text_embeds" } else { "pooler_output" };
            let d = far(&found.pooled.unwrap(), &cases[&format!("{case}.{pooled}")]);
            assert!(d < 5e-5, "{name} {case}: {pooled} {d}");
            for before_last in 0..3 {
                let layer = ClipLayer { before_last, norm: false };
                let found = encoder.forward(ClipTextInput { layer, ..input }, &Pass::default()).unwrap();
                let d = far(&shown(&found.hidden), &cases[&format!("{case}.hidden_states.{before_last}")]);
                assert!(d < 5e-5, "{name} {case}: {before_last} before the last: {d}");
            }
            // Embeddings of the same tokens.
            let embeds = Tensor::embedding(encoder.embeddings().unwrap(), ids, -1, false, false);
            let input = EncoderInput::Text { tokens: Tokens::Embeds(&embeds), keep: keep.as_ref() };
            let found = encoder.encode(input, &Pass::default()).unwrap();
            let d = far(&found.pooled.unwrap(), &cases[&format!("{case}.{pooled}")]);
            assert!(d < 5e-5, "{name} {case}: {pooled} of embeddings {d}");
        }
    }
}

#[test]
fn vision_encoders_are_transformers() {
    for name in ["vision", "vision_projection"] {
        let (encoder, cases) = (vision(name), tensors(fixture(name).join("cases.safetensors")));
        let pixels = &cases["plain.pixel_values"];
        let found = encoder.forward(pixels, &Pass::default()).unwrap();
        let pooled = if encoder.projects() { "plain.image_embeds" } else { "plain.pooler_output" };
        assert!(far(&found.hidden, &cases["plain.last_hidden_state"]) < 5e-5, "{name}");
        assert!(far(found.pooled.as_ref().unwrap(), &cases[pooled]) < 5e-5, "{name}");
        // Pixels in −1 ..= 1, which the encoder normalises by itself: image_mean and image_std of 0 ..= 1.
        let (mean, deviation) = ClipVision::NORMALISATION;
        let by = |x: &[f64]| Tensor::from_slice(x).to_kind(Kind::Float).view([1, 3, 1, 1]);
        let plain = (pixels * by(&deviation) + by(&mean)) * 2.0 - 1.0;
        let again = encoder.encode(EncoderInput::Image(&plain), &Pass::default()).unwrap();
        assert!(far(&again.pooled.unwrap(), &found.pooled.unwrap()) < 5e-5, "{name}");
        for site in [SiteKind::Conv, SiteKind::Linear, SiteKind::Attention, SiteKind::Hidden] {
            assert!(encoder.sites().of_kind(site).count() > 0);
        }
        for (bad, of) in [([2, 3, 12, 13], "size"), ([2, 1, 13, 13], "channels"), ([3, 13, 13, 1], "batch")] {
            let image = Tensor::zeros(bad, (Kind::Float, Device::Cpu));
            let found = encoder.encode(EncoderInput::Image(&image), &Pass::default());
            assert!(matches!(found, Err(Error::Shape { .. })), "{of}");
        }
        let bytes = Tensor::zeros([1, 3, 13, 13], (Kind::Uint8, Device::Cpu));
        assert!(matches!(
            encoder.encode(EncoderInput::Image(&bytes), &Pass::default()),
            Err(Error::Kind { .. })
        ));
        let ids = Tensor::zeros([1, 3], (Kind::Int64, Device::Cpu));
        let words = EncoderInput::Text { tokens: Tokens::Ids(&ids), keep: None };
        assert!(matches!(encoder.encode(words, &Pass::default()), Err(Error::Unsupported { .. })));
        assert!(vision(name).with_normalisation(&[0.0; 3], &[1.0, 0.0, 1.0]).is_err());
        assert!(vision(name).with_normalisation(&[0.0; 2], &[1.0; 2]).is_err());
    }
}

#[test]
fn towers_of_a_whole_clip_are_transformers() {
    let cases = tensors(fixture("whole/cases.safetensors"));
    let (text, vision) = (text("whole"), vision("whole"));
    let input = ClipTextInput::new(Tokens::Ids(&cases["input_ids"]), None);
    let found = text.forward(input, &Pass::default()).unwrap().pooled.unwrap();
    assert!(text.projects() && far(&found, &cases["text_embeds"]) < 5e-5);
    let found = vision.forward(&cases["pixel_values"], &Pass::default()).unwrap().pooled.unwrap();
    assert!(vision.projects() && far(&found, &cases["image_embeds"]) < 5e-5);
}

/// Multiplies what it is shown of one site, or of none.
struct Alter(Option<SiteId>);
impl Alter {
    fn on(&self, at: At<'_>, t: Tensor) -> Tensor {
        if self.0 == Some(at.site) { t * 1.3 + 0.1 } else { t }
    }
}
impl Control for Alter {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> controlgen_core::Result<()> {
        sites.iter().for_each(|(site, _)| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, at: At<'_>, _: &Tensor, y: Tensor) -> controlgen_core::Result<Tensor> {
        Ok(self.on(at, y))
    }
    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> controlgen_core::Result<Tensor> {
        Ok(self.on(at, next.run(attn)?))
    }
    fn hidden(&self, at: At<'_>, h: Tensor, _: &Tensor) -> controlgen_core::Result<Tensor> {
        Ok(self.on(at, h))
    }
}

#[test]
fn controls_and_weights_act_at_every_site_of_a_vision_encoder() {
    let encoder = vision("vision_projection");
    let pixels = &tensors(fixture("vision_projection/cases.safetensors"))["plain.pixel_values"];
    let read = |encoder: &dyn Encoder, controls: Option<&Controls>| {
        let pass = Pass { controls, ..Pass::default() };
        encoder.encode(EncoderInput::Image(pixels), &pass).unwrap().pooled.unwrap()
    };
    let plain = read(&encoder, None);
    let under = |site| {
        let controls = Controls::bind(encoder.sites(), vec![Box::new(Alter(site))]).unwrap();
        read(&encoder, Some(&controls))
    };
    assert!(under(None).equal(&plain));
    let mut offered = Vec::new();
    let same = encoder.map_weights(&mut |site, _| {
        offered.push(site);
        Ok(None)
    });
    assert!(read(&*same.unwrap(), None).equal(&plain));
    for (site, about) in encoder.sites().iter() {
        assert!(far(&under(Some(site)), &plain) > 1e-4, "a control at {}", about.name);
        if matches!(about.kind(), SiteKind::Linear | SiteKind::Conv) {
            assert!(offered.contains(&site), "{}", about.name);
            let mapped = encoder.map_weights(&mut |id, w| Ok((id == site).then(|| w * 0.5))).unwrap();
            assert!(far(&read(&*mapped, None), &plain) > 1e-4, "a weight of {}", about.name);
        }
    }
    // Gradients reach the pixels.
    let leaf = pixels.detach().set_requires_grad(true);
    let found = encoder.encode(EncoderInput::Image(&leaf), &Pass::default()).unwrap();
    let gradient =
        Tensor::run_backward(&[found.pooled.unwrap().square().sum(Kind::Float)], &[&leaf], false, false);
    assert!(
        gradient[0].abs().min().double_value(&[]) >= 0.0 && gradient[0].abs().max().double_value(&[]) > 1e-3
    );
}

#[test]
fn text_encoders_keep_the_contract() {
    for name in TEXTS {
        // Of embeddings the highest id is not known: where it says how a text ends, the contract's random rows must not.
        let mut fields: serde_json::Map<String, Value> =
            serde_json::from_str(&std::fs::read_to_string(fixture(name).join("config.json")).unwrap())
                .unwrap();
        fields.insert("eos_token_id".into(), json!(1));
        let config = Config::from_fields(name, fields);
        let source = Safetensors::open(fixture(name)).unwrap();
        let weights = Weights::new(&source, Placement::CPU.options());
        let encoder = load_encoder(&config, &weights, Placement::CPU).unwrap();
        contract::encoder(&*encoder).unwrap_or_else(|violation| panic!("{name}: {violation}"));
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let encoder = text("text");
    let ids = Tensor::from_slice(&[732i64, 5, 733]).view([1, 3]);
    let input = ClipTextInput::new(Tokens::Ids(&ids), None);
    let deep = ClipLayer { before_last: 3, norm: false };
    let found = encoder.forward(ClipTextInput { layer: deep, ..input }, &Pass::default());
    assert!(matches!(found, Err(Error::Value { .. })));
    let ends = Tensor::from_slice(&[3i64]);
    let found = encoder.forward(ClipTextInput { ends: Some(&ends), ..input }, &Pass::default());
    assert!(matches!(found, Err(Error::Value { .. })));
    // An end that is said.
    let (said, last) = (Tensor::from_slice(&[1i64]), ClipTextInput { layer: ClipLayer::LAST, ..input });
    let found = encoder.forward(ClipTextInput { ends: Some(&said), ..last }, &Pass::default()).unwrap();
    assert!(found.pooled.unwrap().equal(&found.hidden.select(1, 1)));
    let other = Config::from_fields("x", json!({"model_type": "bert"}).as_object().unwrap().clone());
    let source = Safetensors::open(fixture("text")).unwrap();
    let weights = Weights::new(&source, Placement::CPU.options());
    assert!(matches!(load_encoder(&other, &weights, Placement::CPU), Err(Error::Unsupported { .. })));
    assert!(matches!(open_encoder(&fixture("nowhere"), Placement::CPU), Err(Error::Io { .. })));
    // A model that should project, without the projection.
    let mut fields = json!({"architectures": ["CLIPTextModelWithProjection"]}).as_object().unwrap().clone();
    let own: serde_json::Map<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(fixture("text").join("config.json")).unwrap()).unwrap();
    own.into_iter().filter(|(k, _)| k != "architectures").for_each(|(k, v)| drop(fields.insert(k, v)));
    let found = load_encoder(
        &Config::from_fields("x", fields),
        &Weights::new(&source, Placement::CPU.options()),
        Placement::CPU,
    );
    assert!(matches!(found, Err(Error::Keys { missing, .. }) if missing == ["text_projection.weight"]));
}

#[test]
fn tokens_are_transformers() {
    for name in ["tokenizer_sd1", "tokenizer_sd2", "tokenizer_json"] {
        let tokenizer = ClipTokenizer::open(fixture(name)).unwrap();
        let cases: Value =
            serde_json::from_str(&std::fs::read_to_string(fixture(name).join("cases.json")).unwrap())
                .unwrap();
        let ids = |value: &Value| -> Vec<i64> {
            value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
        };
        assert_eq!(tokenizer.pad(), cases["pad"].as_i64().unwrap());
        for case in cases["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{name}: {text:?}");
        }
        for case in cases["padded"].as_array().unwrap() {
            let found = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
            assert_eq!(tokenizer.framed(&found), ids(&case["ids"]), "{name}");
            let rest = found.get(75..).unwrap_or_default();
            assert_eq!(tokenizer.decode(rest).unwrap(), case["truncated"].as_str().unwrap());
        }
    }
    assert!(matches!(ClipTokenizer::open(fixture("text")), Err(Error::Io { .. })));
    assert!(ClipTokenizer::open(fixture("tokenizer_sd1")).unwrap().decode(&[734]).is_err());
}

fn sd() -> ClipPrompt {
    ClipPrompt::new(ClipTokenizer::open(fixture("tokenizer_sd1")).unwrap(), text("text_legacy")).unwrap()
}

fn xl() -> ClipPairPrompt {
    let second = ClipTokenizer::open(fixture("tokenizer_sd2")).unwrap();
    let second = ClipPrompt::new(second, text("text_projection")).unwrap();
    let layer = |prompt: ClipPrompt| prompt.with_layer(ClipLayer::PENULTIMATE);
    ClipPairPrompt::new(layer(sd()), layer(second)).unwrap()
}

fn texts() -> Vec<String> {
    serde_json::from_str(&std::fs::read_to_string(fixture("prompts.json")).unwrap()).unwrap()
}

#[test]
fn prompts_are_diffusers() {
    let (cases, texts) = (tensors(fixture("prompts.safetensors")), texts());
    let prompts = [texts[0].as_str(), texts[1].as_str(), ""];
    let check = |name: &str, encoder: &dyn PromptEncoder| {
        let encoded = encoder.encode(&prompts).unwrap();
        for (i, one) in encoded.iter().enumerate() {
            assert_eq!(one.truncated.is_some(), i == 1, "{name}");
            // diffusers skips no blocks for negative prompts, whatever it is asked.
            if i == 2 && name.ends_with("skip") {
                continue;
            }
            let (of, row) = if i == 2 { (format!("{name}.empty"), 0) } else { (name.to_owned(), i as i64) };
            for (feature, tensor) in &one.features {
                let (expected, found) = if feature == "text_embeds" {
                    (cases[&format!("{of}.pooled")].get(row), tensor.shallow_clone())
                } else {
                    (cases[&of].get(row), tensor.slice(0, 0, None, 7))
                };
                let d = far(&found, &expected);
                assert!(d < 5e-5, "{of} {feature}: {d}");
            }
        }
        assert_eq!(encoded[0].features.len(), if name.starts_with("xl") { 2 } else { 1 });
    };
    check("sd.plain", &sd());
    check("sd.skip", &sd().with_clip_skip(1));
    check("xl.plain", &xl());
    check("xl.skip", &xl().with_clip_skip(1));
    check("sd.plain", &*sd().handle());
    assert!(matches!(sd().encode(&[]), Err(Error::Value { .. })));
    let first = || ClipTokenizer::open(fixture("tokenizer_sd1")).unwrap();
    assert!(ClipPairPrompt::new(sd(), sd()).is_err(), "the second must project");
    assert!(matches!(text("text").spec().reads, Reads::Text { vocab: 734, context: Some(77) }));
    assert_eq!(first().context(), 77);
}

#[test]
fn long_prompts_go_in_chunks() {
    let (texts, prompt) = (texts(), sd());
    let tokens = prompt.tokenizer().encode(&texts[1]).unwrap();
    let chunked = sd().with_long(LongPrompts::Chunks);
    let encoded = chunked.encode(&[&texts[1], "a cat"]).unwrap();
    let chunks: Vec<&[i64]> = tokens.chunks(75).collect();
    assert!(chunks.len() >= 2 && encoded.iter().all(|one| one.truncated.is_none()));
    let hidden = &encoded[0].features[0].1;
    assert_eq!(hidden.size(), [77 * chunks.len() as i64, 16]);
    assert_eq!(encoded[1].features[0].1.size(), hidden.size(), "all prompts are equally long");
    for (i, chunk) in chunks.iter().enumerate() {
        let ids = Tensor::from_slice(&prompt.tokenizer().framed(chunk)).view([1, 77]);
        let alone = prompt.encoder().forward(ClipTextInput::new(Tokens::Ids(&ids), None), &Pass::default());
        assert!(far(&hidden.narrow(0, 77 * i as i64, 77), &alone.unwrap().hidden.get(0)) < 1e-5, "chunk {i}");
    }
    // A short prompt's further chunks are empty ones.
    let empty = &sd().encode(&[""]).unwrap()[0].features[0].1;
    assert!(far(&encoded[1].features[0].1.narrow(0, 77, 77), empty) < 1e-5);
}

#[test]
fn weights_are_multiplied_in() {
    let plain = sd();
    let encoded = plain.encode(&["a red cat on a hill"]).unwrap();
    let found = sd().with_weights().encode(&["a (red:1.5) cat [on] a hill"]).unwrap();
    let ids = |text: &str| plain.tokenizer().encode(text).unwrap().len();
    let counts = [("a ", 1.0), ("red", 1.5), (" cat ", 1.0), ("on", 1.0 / 1.1), (" a hill", 1.0)];
    let mut weights = vec![1.0];
    counts.iter().for_each(|(text, w)| weights.extend(std::iter::repeat_n(*w, ids(text))));
    weights.resize(77, 1.0);
    let weights = Tensor::from_slice(&weights).view([1, 77]);
    let expected = apply_weights(&encoded[0].features[0].1.unsqueeze(0), &weights).unwrap().get(0);
    assert!(far(&found[0].features[0].1, &expected) < 1e-6);
    assert!(far(&expected, &encoded[0].features[0].1) > 0.1, "it makes a difference");
    // Without being asked for, brackets are characters.
    let literal = plain.encode(&["a (red:1.5) cat [on] a hill"]).unwrap();
    assert!(far(&literal[0].features[0].1, &encoded[0].features[0].1) > 0.1);
}

#[test]
fn old_directories_say_their_tokens_in_a_map() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt", "special_tokens_map.json"] {
        std::fs::copy(fixture("tokenizer_sd2").join(name), folder.path().join(name)).unwrap();
    }
    let plain = r#"{"pad_token": "<|endoftext|>", "model_max_length": 77}"#;
    let config = folder.path().join("tokenizer_config.json");
    std::fs::write(&config, plain).unwrap();
    // transformers 5.23 pads with the map's token, and with the configuration's where that lists the tokens.
    let old = ClipTokenizer::open(folder.path()).unwrap();
    assert_eq!(old.pad(), old.encode("!").unwrap()[0]);
    std::fs::write(&config, plain.replace('}', r#", "added_tokens_decoder": {}}"#)).unwrap();
    let new = ClipTokenizer::open(folder.path()).unwrap();
    assert_eq!(new.pad(), new.eos());
}
