//! Controls that follow the history: against a search of it, and with rows that move.

use std::slice::from_ref;

use controlgen_core::{Rows, TokenControl, TokenControls};
use controlgen_text::controls::*;
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::{after, left, rows, tensor};

const VOCAB: i64 = 6;

fn token() -> std::ops::Range<i64> {
    0..VOCAB
}

fn sequences() -> impl Strategy<Value = Vec<Vec<i64>>> {
    prop::collection::hash_set(prop::collection::vec(token(), 1..4), 1..6)
        .prop_map(|set| set.into_iter().collect())
}

/// What is done to a batch between two steps.
#[derive(Clone, Debug)]
enum Act {
    Advance(Vec<i64>),
    Reorder(Vec<i64>),
}

/// Three rows throughout.
fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => prop::collection::vec(token(), 3).prop_map(Act::Advance),
        1 => prop::collection::vec(0i64..3, 3).prop_map(Act::Reorder),
    ];
    prop::collection::vec(act, 0..25)
}

/// The control's scores after these acts, and the history that each row has.
fn play(control: &impl TokenControl, prompts: &[Vec<i64>], acts: &[Act]) -> (Vec<Vec<f32>>, Histories) {
    let mut state = control.start(prompts).unwrap();
    let mut histories: Histories = prompts.iter().map(|prompt| (prompt.clone(), vec![])).collect();
    for act in acts {
        match act {
            Act::Advance(tokens) => {
                control.advance(&mut state, tokens).unwrap();
                histories.iter_mut().zip(tokens).for_each(|((_, generated), &token)| generated.push(token));
            }
            Act::Reorder(rows) => {
                state.reorder(rows).unwrap();
                histories = rows.iter().map(|&row| histories[row as usize].clone()).collect();
            }
        }
        // Scoring must leave the state as it is.
        let _ = control.score(&mut state, flat()).unwrap();
    }
    (rows(&control.score(&mut state, flat()).unwrap()), histories)
}

/// Prompt and generated tokens of each row.
type Histories = Vec<(Vec<i64>, Vec<i64>)>;

/// Different scores of both signs for every token.
fn flat() -> Tensor {
    let row = (Tensor::arange(VOCAB, (Kind::Float, tch::Device::Cpu)) - 2.5) * 0.7;
    row.repeat([3, 1])
}

fn whole(history: &(Vec<i64>, Vec<i64>)) -> Vec<i64> {
    [history.0.as_slice(), &history.1].concat()
}

fn banned(row: &[f32]) -> Vec<i64> {
    (0..VOCAB).filter(|&id| row[id as usize] == f32::NEG_INFINITY).collect()
}

/// The tokens for which `bans` holds.
fn those(bans: impl Fn(i64) -> bool) -> Vec<i64> {
    (0..VOCAB).filter(|&id| bans(id)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_ngram_is_repeated(
        n in 1usize..5, prompts in prop::collection::vec(prop::collection::vec(token(), 1..10), 3), acts in acts(),
    ) {
        let (found, histories) = play(&NoRepeatNgram::new(n).unwrap(), &prompts, &acts);
        for (row, history) in found.iter().zip(&histories) {
            let history = whole(history);
            let repeats = |id: i64| {
                let next = [history.as_slice(), &[id]].concat();
                next.len() > n && history.windows(n).any(|gram| gram == &next[next.len() - n..])
            };
            prop_assert_eq!(banned(row), those(repeats));
        }
    }

    #[test]
    fn banned_words_are_never_completed(
        words in sequences(), prompts in prop::collection::vec(prop::collection::vec(token(), 1..5), 3), acts in acts(),
    ) {
        let (found, histories) = play(&BannedWords::new(&words).unwrap(), &prompts, &acts);
        for (row, history) in found.iter().zip(&histories) {
            let completes = |id: i64| words.iter().any(|w| [whole(history), vec![id]].concat().ends_with(w));
            prop_assert_eq!(banned(row), those(completes));
        }
    }

    #[test]
    fn biases_add_up(
        words in sequences(), biases in prop::collection::vec(-3f64..3.0, 6),
        prompts in prop::collection::vec(prop::collection::vec(token(), 1..5), 3), acts in acts(),
    ) {
        let pairs: Vec<(Vec<i64>, f64)> = words.iter().cloned().zip(biases).collect();
        let (found, histories) = play(&LogitBias::sequences(pairs.clone()).unwrap(), &prompts, &acts);
        let plain = rows(&flat());
        for (row, history) in found.iter().zip(&histories) {
            for id in 0..VOCAB {
                let next = [whole(history), vec![id]].concat();
                let bias: f64 = pairs.iter().filter(|(w, _)| next.ends_with(w)).map(|(_, bias)| bias).sum();
                let expected = f64::from(plain[0][id as usize]) + bias;
                prop_assert!((f64::from(row[id as usize]) - expected).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn penalties_follow_the_tokens_that_occurred(
        penalty in 0.5f64..2.0, frequency in -2f64..2.0, presence in -2f64..2.0,
        prompts in prop::collection::vec(prop::collection::vec(token(), 1..5), 3), acts in acts(),
    ) {
        let raw = RepetitionPenalty::new(penalty).unwrap();
        let (found, histories) = play(&raw, &prompts, &acts);
        let (only, _) = play(&raw.generated_only(), &prompts, &acts);
        let (counted, _) = play(&FrequencyPresence::new(frequency, presence).unwrap(), &prompts, &acts);
        let plain = rows(&flat());
        for (row, history) in histories.iter().enumerate() {
            for id in 0..VOCAB {
                let x = f64::from(plain[0][id as usize]);
                let lower = if x < 0.0 { x * penalty } else { x / penalty };
                let at = |found: &[Vec<f32>]| f64::from(found[row][id as usize]);
                let expected = if whole(history).contains(&id) { lower } else { x };
                prop_assert!((at(&found) - expected).abs() < 1e-5);
                let expected = if history.1.contains(&id) { lower } else { x };
                prop_assert!((at(&only) - expected).abs() < 1e-5);
                let count = history.1.iter().filter(|&&token| token == id).count() as f64;
                let expected = x - frequency * count - if count > 0.0 { presence } else { 0.0 };
                prop_assert!((at(&counted) - expected).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn lengths_and_prefixes_follow_their_rows(
        n in 0usize..8, prefix in prop::collection::vec(token(), 1..5),
        prompts in prop::collection::vec(prop::collection::vec(token(), 1..5), 3), acts in acts(),
    ) {
        let (new, histories) = play(&MinLength::new(n, [1, 4]).unwrap(), &prompts, &acts);
        let (total, _) = play(&MinLength::total(n, [4, 1, 4]).unwrap(), &prompts, &acts);
        let (forced, _) = play(&ForcedPrefix::new(prefix.clone()).unwrap(), &prompts, &acts);
        let plain = rows(&flat());
        for (row, (prompt, generated)) in histories.iter().enumerate() {
            let eos = |short: bool| if short { vec![1, 4] } else { vec![] };
            prop_assert_eq!(banned(&new[row]), eos(generated.len() < n));
            prop_assert_eq!(banned(&total[row]), eos(prompt.len() + generated.len() < n));
            match prefix.get(generated.len()) {
                None => prop_assert_eq!(&forced[row], &plain[0]),
                Some(&token) => {
                    prop_assert_eq!(left(&forced[row]), [token as usize]);
                    prop_assert_eq!(forced[row][token as usize], plain[0][token as usize]);
                }
            }
        }
    }

    /// The state of a stack whose rows moved is that of its rows' own histories.
    #[test]
    fn moved_rows_equal_recomputed_rows(
        words in sequences(), prompts in prop::collection::vec(prop::collection::vec(token(), 1..6), 3), acts in acts(),
    ) {
        let stack = TokenControls::new()
            .with(LogitBias::sequences(words.iter().map(|w| (w, 0.3))).unwrap())
            .with(RepetitionPenalty::new(1.3).unwrap().normalised())
            .with(FrequencyPresence::new(0.2, 0.1).unwrap())
            .with(NoRepeatNgram::new(2).unwrap())
            .with(BannedWords::new(&words).unwrap())
            .with(MinLength::new(6, [0]).unwrap())
            .with(Suppress::new([3]).unwrap())
            .with(Temperature::new(0.9).unwrap())
            .with(TopP::new(0.9).unwrap());
        let (found, histories) = play(&stack, &prompts, &acts);
        for (row, (prompt, generated)) in found.iter().zip(&histories) {
            let alone = after(&stack, from_ref(prompt), from_ref(generated), &flat().narrow(0, 0, 1)).unwrap();
            super::assert_near("recomputed", row, &rows(&alone)[0], 1e-5);
        }
    }
}

/// Rows may be of different lengths in a stack of any history.
#[test]
fn rows_of_unequal_length_are_banned_one_by_one() {
    let control = MinLength::total(4, [2]).unwrap();
    let prompts = [vec![0], vec![0, 0, 0, 0], vec![0, 0]];
    let mut state = control.start(&prompts).unwrap();
    control.advance(&mut state, &[0, 0, 0]).unwrap();
    let found = rows(&control.score(&mut state, flat()).unwrap());
    assert_eq!([banned(&found[0]), banned(&found[1]), banned(&found[2])], [vec![2], vec![], vec![2]]);
    // Rows may also become more, as where hypotheses fork.
    state.reorder(&[1, 0, 0, 2]).unwrap();
    let found = rows(&control.score(&mut state, Tensor::cat(&[flat(), flat().narrow(0, 0, 1)], 0)).unwrap());
    assert_eq!(banned(&found[0]), [0i64; 0]);
    assert_eq!(banned(&found[1]), [2]);
}

#[test]
fn contradicting_controls_leave_nothing() {
    let stack = TokenControls::new().with(Suppress::new([2]).unwrap()).with(ForcedPrefix::new([2]).unwrap());
    let found = after(&stack, &[vec![0]], &[vec![]], &tensor(&[vec![1.0; 4]])).unwrap();
    assert!(left(&rows(&found)[0]).is_empty());
}

/// Tokens that only the input has, such as those of an image, are passed over.
#[test]
fn prompts_may_hold_tokens_beyond_the_scores() {
    let stack = TokenControls::new()
        .with(RepetitionPenalty::new(2.0).unwrap())
        .with(NoRepeatNgram::new(1).unwrap())
        .with(FrequencyPresence::new(1.0, 1.0).unwrap());
    let found = after(&stack, &[vec![1, 900]], &[vec![]], &tensor(&[vec![1.0; 4]])).unwrap();
    assert_eq!(rows(&found)[0], [1.0, f32::NEG_INFINITY, 1.0, 1.0]);
}
