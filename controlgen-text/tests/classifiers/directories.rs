//! Saving, opening, and what is refused.

use std::fs;

use controlgen_core::checkpoint::save;
use controlgen_core::{Classifier, Error};
use controlgen_text::classifiers::{
    EmbeddingClassifier, Head, LmClassifier, LmStates, ModelCard, NgramClassifier, Pooling,
    PrefixDiscriminator, padded_text,
};
use tch::{Kind, Tensor};

use super::{close, model, numbers_of, shake};

const SITE: &str = "model.layers.1.self_attn.q_proj";
const CLASSES: [&str; 2] = ["negative", "positive"];

type Named = Vec<(String, Tensor)>;

fn card() -> ModelCard {
    ModelCard {
        title: "Sentiment".into(),
        accuracy: "85 %".into(),
        command: "make it".into(),
        ..ModelCard::default()
    }
}

/// One whose parameters are numbers of f16, so that nothing is lost on the way.
fn of_states() -> LmClassifier {
    let lm = model("llama_gqa_tied");
    let head = Head::new(48, Some(4), 2, 0).unwrap();
    shake(&head.parameters());
    for (_, value) in head.parameters() {
        let _guard = tch::no_grad_guard();
        value.shallow_clone().copy_(&value.to_kind(Kind::Half));
    }
    let states = LmStates::at(&*lm, &[SITE]).unwrap();
    LmClassifier::new(states, Pooling::MeanAndLast, head, &CLASSES).unwrap()
}

#[test]
fn what_is_saved_opens_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let lm = model("llama_gqa_tied");
    let made = of_states();
    made.save(folder.path(), &card()).unwrap();
    let opened = LmClassifier::open(folder.path(), &*lm).unwrap();
    let x = padded_text(&[vec![1i64, 2, 3], vec![4]]).unwrap();
    close(&numbers_of(&opened.logits(&x).unwrap()), &numbers_of(&made.logits(&x).unwrap()), 1e-6);
    assert_eq!(opened.classes(), CLASSES);
    let text = fs::read_to_string(folder.path().join("README.md")).unwrap();
    assert!(text.starts_with("# Sentiment\n") && text.contains("85 %") && text.contains("make it"), "{text}");

    let made = EmbeddingClassifier::new(&*lm, 4, &CLASSES, 1).unwrap();
    shake(&made.parameters());
    made.save(folder.path(), &card()).unwrap();
    let opened = EmbeddingClassifier::open(folder.path(), &*lm).unwrap();
    close(&numbers_of(&opened.logits(&x).unwrap()), &numbers_of(&made.logits(&x).unwrap()), 0.05);

    let head = Head::new(24, None, 2, 0).unwrap();
    shake(&head.parameters());
    let states = LmStates::at(&*lm, &[SITE]).unwrap();
    let made = PrefixDiscriminator::new(states, head, &CLASSES).unwrap();
    made.save(folder.path(), &card()).unwrap();
    let opened = PrefixDiscriminator::open(folder.path(), &*lm).unwrap();
    close(&numbers_of(&opened.logits(&x).unwrap()), &numbers_of(&made.logits(&x).unwrap()), 0.05);
    // One kind is not another.
    assert!(matches!(LmClassifier::open(folder.path(), &*lm), Err(Error::Config { .. })));

    let made = NgramClassifier::new(64, 2, &CLASSES).unwrap();
    shake(&made.parameters());
    made.save(folder.path(), &card()).unwrap();
    let x = ["One fine day".to_owned()];
    let opened = NgramClassifier::open(folder.path()).unwrap();
    close(&numbers_of(&opened.logits(&x[..]).unwrap()), &numbers_of(&made.logits(&x[..]).unwrap()), 0.01);
}

#[test]
fn another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    of_states().save(folder.path(), &card()).unwrap();
    for (name, field) in [("llama_mha_untied", "base_vocab_size"), ("qwen3", "base_model_type")] {
        let error = LmClassifier::open(folder.path(), &*model(name)).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Config { field: found, .. } if found == field), "{name}: {error}");
    }
    // Of another width.
    let path = folder.path().join("config.json");
    let text =
        fs::read_to_string(&path).unwrap().replace("\"base_hidden_size\": 24", "\"base_hidden_size\": 32");
    fs::write(&path, text).unwrap();
    let error = LmClassifier::open(folder.path(), &*model("llama_gqa_tied")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("`base_hidden_size`: expected the model's 24, found 32"), "{error}");
    // A head of another width than the states.
    let states = LmStates::at(&*model("llama_gqa_tied"), &[SITE]).unwrap();
    let head = Head::new(32, None, 2, 0).unwrap();
    assert!(matches!(LmClassifier::new(states, Pooling::Mean, head, &CLASSES), Err(Error::Shape { .. })));
}

#[test]
fn a_damaged_directory_is_refused() {
    let lm = model("llama_gqa_tied");
    let folder = tempfile::tempdir().unwrap();
    let (config, tensors) = (folder.path().join("config.json"), folder.path().join("model.safetensors"));
    let made = of_states();
    let fresh = || made.save(folder.path(), &card()).unwrap();
    let refused = |what: &str| LmClassifier::open(folder.path(), &*lm).map(|_| ()).expect_err(what);

    fresh();
    let bytes = fs::read(&tensors).unwrap();
    fs::write(&tensors, &bytes[..bytes.len() - 10]).unwrap();
    assert!(matches!(refused("cut off"), Error::Format { .. }));
    fs::remove_file(&tensors).unwrap();
    assert!(matches!(refused("no tensors"), Error::Io { .. } | Error::Format { .. }));

    let altered = |change: &dyn Fn(&mut Named)| {
        fresh();
        let mut parameters: Vec<(String, Tensor)> =
            made.head().parameters().into_iter().map(|(name, value)| (name, value.detach())).collect();
        change(&mut parameters);
        save(&tensors, &parameters, &[]).unwrap();
    };
    altered(&|p| {
        p.pop();
    });
    assert!(matches!(refused("a tensor less"), Error::Keys { .. }));
    altered(&|p| p.push(("more".into(), Tensor::from(1f32))));
    assert!(matches!(refused("a tensor more"), Error::Keys { .. }));
    altered(&|p| p[0].1 = p[0].1.narrow(0, 0, 8).contiguous());
    assert!(matches!(refused("another shape"), Error::Shape { .. }));
    altered(&|p| p[2].1 = &p[2].1 * f64::NAN);
    assert!(matches!(refused("NaN"), Error::NotFinite { .. }));

    for (from, to) in [
        ("\"lm_states\"", "\"prefixes\""),
        ("\"mean_and_last\"", "\"max\""),
        ("\"hidden_units\": 4", "\"hidden_units\": -4"),
        ("\"negative\",", "3,"),
    ] {
        fresh();
        let text = fs::read_to_string(&config).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&config, text.replace(from, to)).unwrap();
        assert!(matches!(refused(to), Error::Config { .. }), "{to}: {}", refused(to));
    }
    fresh();
    let text = fs::read_to_string(&config).unwrap().replace(SITE, "model.layers.9.self_attn.q_proj");
    fs::write(&config, text).unwrap();
    assert!(matches!(refused("no such site"), Error::NoSite { .. }));
}
