//! What classifiers say, against definitions written out.

use controlgen_core::energy::{Energy, Text, gradient};
use controlgen_core::testing::{left_padded, right_padded};
use controlgen_core::{
    At, Binding, Classifier, Control, Controls, LmInput, Pass, Result, Rows, SiteId, SiteKind, SiteMap,
    Source, Taps,
};
use controlgen_text::classifiers::{
    EmbeddingClassifier, Ensemble, Head, LmClassifier, LmStates, NgramClassifier, Pooling,
    PrefixDiscriminator, padded_text,
};
use controlgen_text::controls::FutureDiscriminator;
use tch::{Device, Kind, Tensor};

use super::{close, model, numbers_of, shake};

const SITE: &str = "model.layers.1.self_attn.q_proj";
const CLASSES: [&str; 2] = ["negative", "positive"];

fn one_hot(ids: &Tensor, vocab: i64) -> Tensor {
    ids.one_hot(vocab).to_kind(Kind::Float)
}

/// Leaves the input of a linear site.
struct Input(SiteId);

impl Control for Input {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, _sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        to.at_input(self.0, 0);
        Ok(())
    }
    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        at.pass.taps.unwrap().push(at.site, x.shallow_clone());
        Ok(x)
    }
}

#[test]
fn states_are_what_the_whole_model_s_site_reads() {
    let _guard = tch::no_grad_guard();
    let lm = model("llama_gqa_tied");
    let ids = Tensor::from_slice2(&[[3i64, 5, 8, 2], [1, 1, 30, 58]]);
    for name in [SITE, "model.layers.0.mlp.down_proj", "lm_head"] {
        let site = lm.sites().select(SiteKind::Linear, name).unwrap()[0];
        let controls = Controls::bind(lm.sites(), vec![Box::new(Input(site))]).unwrap();
        let taps = Taps::new();
        let pass = Pass { taps: Some(&taps), ..Pass::with_controls(&controls) };
        let mut state = lm.start(Source::Rows(2), &pass).unwrap();
        let logits = lm.forward(LmInput::ids(&ids), &mut state, &pass).unwrap().logits;
        let expected = taps.take().pop().unwrap().1;
        let states = LmStates::at(&*lm, &[name]).unwrap();
        let found = states.of(&Text::hard(ids.shallow_clone())).unwrap();
        close(&numbers_of(&found), &numbers_of(&expected), 1e-5);
        if name == "lm_head" {
            close(&numbers_of(&found.matmul(&lm.embeddings().tr())), &numbers_of(&logits), 1e-4);
        }
    }
    // Only the blocks that are needed are run.
    let first = LmStates::at(&*lm, &["model.layers.0.self_attn.o_proj"]).unwrap();
    assert!(first.lm().sites().select(SiteKind::Linear, SITE).is_err());
    assert_eq!(LmStates::at(&*lm, &[SITE, "layers.0.mlp.down_proj"]).unwrap().width(), {
        let wide = LmStates::at(&*lm, &["layers.0.mlp.down_proj"]).unwrap().width();
        24 + wide
    });
}

#[test]
fn pooling_leaves_padding_out() {
    let x = Tensor::from_slice(&[1f64, 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12.]).view([2, 3, 2]);
    let keep = Tensor::from_slice(&[true, true, false, false, true, true]).view([2, 3]);
    let pool = |pooling: Pooling, keep| numbers_of(&pooling.pool(&x, keep).unwrap());
    close(&pool(Pooling::Mean, Some(&keep)), &[2., 3., 10., 11.], 1e-12);
    close(&pool(Pooling::Last, Some(&keep)), &[3., 4., 11., 12.], 1e-12);
    close(&pool(Pooling::MeanAndLast, Some(&keep)), &[2., 3., 3., 4., 10., 11., 11., 12.], 1e-12);
    close(&pool(Pooling::Mean, None), &[3., 4., 9., 10.], 1e-12);
    let none = Tensor::from_slice(&[true, true, true, false, false, false]).view([2, 3]);
    assert!(Pooling::Mean.pool(&x, Some(&none)).is_err(), "a row of padding");
    assert!(Pooling::Mean.pool(&x, Some(&none.narrow(1, 0, 2))).is_err());
}

#[test]
fn a_head_is_its_formula() {
    for hidden in [None, Some(3)] {
        let head = Head::new(2, hidden, 2, 7).unwrap();
        shake(&head.parameters());
        let p: Vec<(String, Vec<f64>)> =
            head.parameters().into_iter().map(|(name, value)| (name, numbers_of(&value))).collect();
        let get = |name: &str| &p.iter().find(|(known, _)| known == name).unwrap().1;
        let x = [0.3, -1.2];
        let mut z: Vec<f64> = (0..2).map(|i| (x[i] - get("mean")[i]) * get("scale")[i]).collect();
        if hidden.is_some() {
            let erf = |x: f64| Tensor::from(x).erf().double_value(&[]);
            let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()));
            let (v, c) = (get("hidden.weight"), get("hidden.bias"));
            z = (0..3).map(|h| gelu(v[2 * h] * z[0] + v[2 * h + 1] * z[1] + c[h])).collect();
        }
        let (w, b) = (get("output.weight"), get("output.bias"));
        let n = z.len();
        let expected: Vec<f64> =
            (0..2).map(|k| b[k] + (0..n).map(|i| w[n * k + i] * z[i]).sum::<f64>()).collect();
        let found = head.logits(&Tensor::from_slice(&[0.3f32, -1.2]).view([1, 2])).unwrap();
        close(&numbers_of(&found), &expected, 1e-5);
    }
}

#[test]
fn a_standardised_feature_has_mean_0_and_variance_1() {
    let head = Head::new(3, None, 2, 0).unwrap();
    let x = Tensor::from_slice(&[1f32, 10., 5., 3., 30., 5., 5., 20., 5.]).view([3, 3]);
    head.standardise(&x).unwrap();
    let p = head.parameters();
    close(&numbers_of(&p[0].1), &[3., 20., 5.], 1e-6);
    let s = 1.5f64.sqrt();
    close(&numbers_of(&p[1].1), &[s / 2.0, s / 10.0, 1.0], 1e-6);
    assert!(head.standardise(&x.narrow(1, 0, 2)).is_err() && head.standardise(&x.narrow(0, 0, 1)).is_err());
    assert!(head.standardise(&(x * f64::NAN)).is_err());
}

/// Padding says nothing, one-hot soft tokens say what tokens say, and the gradient is that of finite differences.
fn keeps_its_promises(classifier: &dyn Classifier<Text>, vocab: i64) {
    let rows = [vec![3i64, 5, 8, 2, 40], vec![7, 1], vec![20, 4, 4]];
    let alone: Vec<f64> = rows
        .iter()
        .flat_map(|row| numbers_of(&classifier.logits(&padded_text(&[row]).unwrap()).unwrap()))
        .collect();
    assert!((alone[0] - alone[2]).abs() > 1e-3, "it says the same of all texts");
    for (ids, keep) in [left_padded(&rows, 0).unwrap(), right_padded(&rows, 9).unwrap()] {
        let soft = Text::soft(one_hot(&ids, vocab)).keeping(keep.shallow_clone());
        let hard = Text::hard(ids).keeping(keep);
        close(&numbers_of(&classifier.logits(&hard).unwrap()), &alone, 1e-4);
        close(&numbers_of(&classifier.logits(&soft).unwrap()), &alone, 1e-4);
    }
    let logits =
        ((Tensor::arange(4 * vocab, (Kind::Float, Device::Cpu)) * 1.3).sin() * 2.0).view([1, 4, vocab]);
    let probs = logits.softmax(-1, None);
    struct Of(Box<dyn Classifier<Text>>);
    impl Clone for Of {
        fn clone(&self) -> Self {
            Self(self.0.handle())
        }
    }
    impl controlgen_core::EnergyFn<Text> for Of {
        fn energy(&self, x: &Text) -> Result<Tensor> {
            Ok(-self.0.logits(x)?.log_softmax(-1, Kind::Float).select(-1, 1))
        }
    }
    let energy = Energy::new(Of(classifier.handle()));
    let (_, slope) = gradient(&energy, &Text::soft(probs.shallow_clone())).unwrap();
    // Moving mass from a token to another.
    let along = (Tensor::arange(4 * vocab, (Kind::Float, Device::Cpu)) * 0.9).cos().view([1, 4, vocab]);
    let along = &along - along.mean_dim(-1, true, Kind::Float);
    let step = 2e-3;
    let at = |t: f64| {
        use controlgen_core::EnergyFn;
        energy.energy(&Text::soft(&probs + &along * t)).unwrap().double_value(&[0])
    };
    let measured = (at(step) - at(-step)) / (2.0 * step);
    let told = (slope * along).sum(Kind::Double).double_value(&[]);
    assert!((measured - told).abs() < 2e-2 * (1.0 + told.abs()), "{measured} instead of {told}");
    assert!(classifier.logits(&Text::hard(Tensor::from_slice(&[vocab]).view([1, 1]))).is_err());
    assert!(
        classifier.logits(&Text::soft(Tensor::ones([1, 2, vocab + 1], (Kind::Float, Device::Cpu)))).is_err()
    );
}

#[test]
fn a_classifier_of_states() {
    let lm = model("llama_gqa_tied");
    for pooling in [Pooling::Mean, Pooling::Last, Pooling::MeanAndLast] {
        let states = LmStates::at(&*lm, &[SITE]).unwrap();
        let head = Head::new(pooling.width(24), Some(5), 2, 1).unwrap();
        shake(&head.parameters());
        keeps_its_promises(&LmClassifier::new(states, pooling, head, &CLASSES).unwrap(), 59);
    }
}

#[test]
fn a_classifier_of_embeddings() {
    let lm = model("llama_gqa_tied");
    let classifier = EmbeddingClassifier::new(&*lm, 4, &CLASSES, 3).unwrap();
    shake(&classifier.parameters());
    keeps_its_promises(&classifier, 59);
    // Its formula, written out for two tokens.
    let p: Vec<(String, Vec<f64>)> =
        classifier.parameters().into_iter().map(|(name, value)| (name, numbers_of(&value))).collect();
    let get = |name: &str| &p.iter().find(|(known, _)| known == name).unwrap().1;
    let u: Vec<Vec<f64>> = [11i64, 42]
        .iter()
        .map(|&id| {
            let e = numbers_of(&lm.embeddings().get(id));
            (0..4).map(|c| (0..24).map(|d| get("projection")[24 * c + d] * e[d]).sum()).collect()
        })
        .collect();
    let erf = |x: f64| Tensor::from(x).erf().double_value(&[]);
    let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()));
    let mut mean = [0.0; 4];
    for t in 0..2i64 {
        for (c, mean) in mean.iter_mut().enumerate() {
            let mut sum = get("convolution.bias")[c];
            for w in 0..3i64 {
                let Some(u) = usize::try_from(t + w - 1).ok().and_then(|t| u.get(t)) else { continue };
                sum += (0..4)
                    .map(|i| get("convolution.weight")[12 * c + 3 * i + w as usize] * u[i])
                    .sum::<f64>();
            }
            *mean += gelu(sum) / 2.0;
        }
    }
    let z: Vec<f64> = (0..4).map(|c| (mean[c] - get("head.mean")[c]) * get("head.scale")[c]).collect();
    let (w, b) = (get("head.output.weight"), get("head.output.bias"));
    let expected: Vec<f64> =
        (0..2).map(|k| b[k] + (0..4).map(|c| w[4 * k + c] * z[c]).sum::<f64>()).collect();
    let ids = Tensor::from_slice(&[11i64, 42]).view([1, 2]);
    close(&numbers_of(&classifier.logits(&Text::hard(ids)).unwrap()), &expected, 1e-4);
}

#[test]
fn a_classifier_of_n_grams_is_its_formula() {
    let classifier = NgramClassifier::new(1000, 2, &CLASSES).unwrap();
    // FNV-1a of "a ", "a fine ", "fine ", modulo 1000, computed elsewhere.
    assert_eq!(classifier.buckets("A fine, a fine"), {
        let mut all = vec![836, 396, 615];
        all.extend(classifier.buckets("fine a").into_iter().filter(|b| ![836, 615].contains(b)));
        all.sort_unstable();
        all
    });
    shake(&classifier.parameters());
    let p = classifier.parameters();
    let (w, b) = (numbers_of(&p[0].1), numbers_of(&p[1].1));
    let expected: Vec<f64> = (0..2)
        .map(|k| b[k] + [836, 396, 615].iter().map(|g| w[2 * g + k]).sum::<f64>() / 3f64.sqrt())
        .collect();
    let found = classifier.logits(&["A fine".to_owned()][..]).unwrap();
    close(&numbers_of(&found), &expected, 1e-5);
    // No words: the bias alone.
    close(&numbers_of(&classifier.logits(&["!".to_owned()][..]).unwrap()), &b, 1e-6);
    assert!(classifier.logits_of(&[[1000i64]]).is_err());
}

#[test]
fn an_ensemble_sums_log_probabilities() {
    let members: Vec<NgramClassifier> =
        (1..3).map(|n| NgramClassifier::new(50, n, &CLASSES).unwrap()).collect();
    members.iter().for_each(|member| shake(&member.parameters()));
    let x = ["One fine day".to_owned(), "no".to_owned()];
    let ensemble = Ensemble::new(vec![(1.0, members[0].handle()), (0.5, members[1].handle())]).unwrap();
    let expected = members[0].logits(&x[..]).unwrap().log_softmax(-1, Kind::Float)
        + members[1].logits(&x[..]).unwrap().log_softmax(-1, Kind::Float) * 0.5;
    close(&numbers_of(&ensemble.logits(&x[..]).unwrap()), &numbers_of(&expected), 1e-6);
    let other = NgramClassifier::new(50, 1, &["a", "b"]).unwrap();
    assert!(Ensemble::new(vec![(1.0, members[0].handle()), (1.0, other.handle())]).is_err());
    assert!(Ensemble::<[String]>::new(Vec::new()).is_err());
}

#[test]
fn a_discriminator_asked_step_by_step_says_what_it_says_of_the_whole_text() {
    let _guard = tch::no_grad_guard();
    let lm = model("llama_gqa_tied");
    let head = Head::new(24, Some(6), 2, 5).unwrap();
    shake(&head.parameters());
    let states = LmStates::at(&*lm, &[SITE]).unwrap();
    let negative = PrefixDiscriminator::new(states, head, &CLASSES).unwrap();
    let positive = negative.of("positive").unwrap();
    assert!(negative.of("neutral").is_err());
    let mut texts = vec![vec![3i64, 9, 12], vec![7], vec![1, 2]];
    let mut state = positive.start(&texts).unwrap();
    for step in 0..3i64 {
        let rows = texts.len() as i64;
        let candidates =
            (Tensor::arange(rows * 4, (Kind::Int64, Device::Cpu)) * 7 + step).remainder(59).view([rows, 4]);
        let told = positive.log_probs(&mut state, &candidates).unwrap();
        for (i, text) in texts.iter().enumerate() {
            for k in 0..4 {
                let token = candidates.int64_value(&[i as i64, k]);
                let whole = [&text[..], &[token]].concat();
                let logits =
                    positive.logits(&padded_text(&[&whole]).unwrap()).unwrap().log_softmax(-1, Kind::Float);
                let expected = logits.double_value(&[0, whole.len() as i64 - 1, 1]);
                let found = told.double_value(&[i as i64, k]);
                assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
            }
        }
        // Other tokens than were asked for, and other rows.
        let tokens: Vec<i64> = (0..rows).map(|row| 50 + row - step).collect();
        positive.advance(&mut state, &tokens).unwrap();
        texts.iter_mut().zip(tokens).for_each(|(text, token)| text.push(token));
        let order = [2i64, 0, 0];
        state.reorder(&order).unwrap();
        texts = order.iter().map(|&row| texts[row as usize].clone()).collect();
    }
    assert_eq!(positive.vocab(), 59);
    assert!(positive.log_probs(&mut state, &Tensor::from_slice(&[1i64])).is_err());
}
