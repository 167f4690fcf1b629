//! Scores of given texts against a model whose every probability is known.

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, Pass};
use controlgen_text::{score_completions, score_text};

fn lm() -> TableLm {
    TableLm::new(&TableLmConfig { vocab: 6, seed: 4, context: 16, ..TableLmConfig::default() }).unwrap()
}

#[test]
fn completions_of_any_length_are_scored_token_by_token() {
    let lm = lm();
    let prompt = [0, 2, 5];
    let completions = vec![vec![3], vec![4, 4, 2, 1], vec![5, 2]];
    let scored = score_completions(&lm, &prompt, &completions, &Pass::default()).unwrap();
    for (completion, scored) in completions.iter().zip(&scored) {
        assert_eq!(scored.logprobs.len(), completion.len());
        for n in 1..=completion.len() {
            let sum: f64 = scored.logprobs[..n].iter().sum();
            let expected = lm.log_prob(&prompt, &completion[..n]).unwrap();
            assert!((sum - expected).abs() < 1e-5, "{completion:?}, {n} tokens");
        }
        let mean = scored.total() / completion.len() as f64;
        assert!((scored.perplexity() - (-mean).exp()).abs() < 1e-12);
    }
}

#[test]
fn a_text_longer_than_the_window_is_scored_whole() {
    // The model looks two tokens back, so windows that overlap by two lose nothing.
    let lm = lm();
    let text: Vec<i64> = [0, 2, 5, 3, 3, 4, 2, 1, 5, 4, 0, 3, 2, 2, 5, 1, 4, 3, 0, 5, 2, 4].to_vec();
    let expected = lm.log_prob(&text[..1], &text[1..]).unwrap();
    for (window, stride) in [(16, 14), (16, 1), (8, 6), (4, 2), (5, 3)] {
        let scored = score_text(&lm, &text, window, stride, &Pass::default()).unwrap();
        assert_eq!(scored.logprobs.len(), text.len() - 1);
        assert!((scored.total() - expected).abs() < 1e-4, "window {window}, stride {stride}");
    }
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let (lm, pass) = (lm(), Pass::default());
    let completions =
        |prompt: &[i64], given: &[Vec<i64>]| score_completions(&lm, prompt, given, &pass).unwrap_err();
    assert!(matches!(completions(&[], &[vec![1]]), Error::Value { .. }));
    assert!(matches!(completions(&[0], &[]), Error::Value { .. }));
    assert!(matches!(completions(&[0], &[vec![1], vec![]]), Error::Value { .. }));
    assert!(matches!(completions(&[0], &[vec![6]]), Error::Value { .. }));
    assert!(matches!(completions(&[0], &[vec![2; 17]]), Error::Context { .. }));
    let text = |ids: &[i64], window, stride| score_text(&lm, ids, window, stride, &pass).unwrap_err();
    assert!(matches!(text(&[0], 4, 2), Error::Value { .. }));
    assert!(matches!(text(&[0, 1], 17, 2), Error::Value { .. }));
    assert!(matches!(text(&[0, 1], 4, 0), Error::Value { .. }));
    assert!(matches!(text(&[0, 1], 4, 4), Error::Value { .. }));
}
