//! Training, against what is known of its result.

use controlgen_core::Error;
use controlgen_core::progress::CancelToken;
use controlgen_core::train::{AdamW, AdamWConfig, Schedule, Trainer, TrainerConfig};
use controlgen_text::classifiers::{CrossEntropy, Head, accuracy, trainable};
use tch::Tensor;

use super::close;

/// With a feature that is 0 or 1, maximum likelihood is the frequencies of the classes at either.
#[test]
fn a_linear_head_comes_to_the_frequencies() {
    // 10 texts with x = 0, of which 2 are of class 1; 8 with x = 1, of which 6 are.
    let x: Vec<f32> = (0..18).map(|i| if i < 10 { 0.0 } else { 1.0 }).collect();
    let y: Vec<i64> = (0..18).map(|i| i64::from(if i < 10 { i < 2 } else { i < 16 })).collect();
    let x = Tensor::from_slice(&x).view([18, 1]);
    let head = Head::new(1, None, 2, 0).unwrap();
    head.standardise(&x).unwrap();
    let before: Vec<Tensor> = head.parameters().iter().take(2).map(|(_, value)| value.copy()).collect();
    let mut task =
        CrossEntropy::new(y, |rows: &[i64]| head.logits(&x.index_select(0, &Tensor::from_slice(rows))));
    let optimizer = AdamW::new(
        &trainable(head.parameters()).unwrap(),
        AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() },
    )
    .unwrap();
    let config = TrainerConfig::new(600, 18, Schedule::cosine(0.1, 600).unwrap());
    Trainer::new(config, optimizer).unwrap().run(&mut task, &mut (), &CancelToken::new()).unwrap();
    let p =
        head.logits(&Tensor::from_slice(&[0f32, 1.]).view([2, 1])).unwrap().softmax(-1, tch::Kind::Double);
    close(&Vec::<f64>::try_from(p.select(1, 1).contiguous()).unwrap(), &[0.2, 0.75], 1e-3);
    // μ and s are not trained.
    assert!(head.parameters().iter().zip(&before).all(|((_, now), before)| now.equal(before)));
}

#[test]
fn accuracy_is_counted_and_checked() {
    let logits = Tensor::from_slice2(&[[0.1f32, 0.2], [3., 1.], [0., 1.], [1., 0.]]);
    assert_eq!(accuracy(&logits, &[1, 0, 0, 0]).unwrap(), 0.75);
    assert!(matches!(accuracy(&logits, &[1, 0]), Err(Error::Shape { .. })));
    assert!(matches!(accuracy(&logits, &[1, 0, 2, 0]), Err(Error::Value { .. })));
    assert!(matches!(accuracy(&logits.narrow(0, 0, 0), &[]), Err(Error::Value { .. })));
    assert!(matches!(accuracy(&logits.get(0), &[1]), Err(Error::Shape { .. })));
}
