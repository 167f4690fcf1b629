//! Beams against all hypotheses that there are.

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{PerRow, Result, RowControl, TokenControl, TokenControls};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty, Suppress};
use controlgen_text::search::{BeamSearch, Choice, EarlyStopping, Finish, Hypothesis, Search as _, Task};
use tch::Tensor;

use crate::{EOS, Search, said, table, task};

const LENGTH: usize = 4;
const PROMPT: [i64; 3] = [0, 2, 3];
const MODES: [EarlyStopping; 3] = [EarlyStopping::Heuristic, EarlyStopping::WhenFull, EarlyStopping::Never];

/// Every hypothesis with its score, best first: `edit` changes log-probabilities, `finish` gives the log-weight.
fn all(
    lm: &TableLm,
    prompt: &[i64],
    length_penalty: f64,
    edit: &dyn Fn(&[i64], &mut [f64]),
    finish: &dyn Fn(&[i64]) -> f64,
) -> Vec<(Vec<i64>, f64)> {
    let (mut open, mut done) = (vec![(Vec::new(), 0.0)], Vec::new());
    while let Some((said, sum)) = open.pop() {
        if said.len() == LENGTH || said.last() == Some(&EOS) {
            let score = (sum + finish(&said)) / (said.len() as f64).powf(length_penalty);
            done.push((said, score));
            continue;
        }
        let text = [prompt, &said].concat();
        let mut scores = lm.log_probs(&text).unwrap();
        edit(&text, &mut scores);
        for (token, score) in (0i64..).zip(scores).filter(|(_, score)| score.is_finite()) {
            open.push(([said.as_slice(), &[token]].concat(), sum + score));
        }
    }
    done.sort_by(|a, b| b.1.total_cmp(&a.1));
    done
}

/// Beams wide enough for everything give everything, in order.
fn full_width(control: &TokenControls, edit: impl Fn(&[i64], &mut [f64]), finish: impl Fn(&[i64]) -> f64) {
    for seed in 0..6 {
        let (lm, prompts) = (table(4, seed), [PROMPT.to_vec()]);
        for (mode, length_penalty) in MODES.iter().zip([0.0, 1.0, -0.5]) {
            let expected = all(&lm, &PROMPT, length_penalty, &edit, &finish);
            let search = BeamSearch::new(256).unwrap().length_penalty(length_penalty).unwrap();
            let search = Search::Beam(search.early_stopping(*mode));
            let wanted = Task { n: 256, ..task(&lm, &prompts, control) };
            let found = search.run(&wanted, &mut ()).unwrap();
            assert_eq!(found.len(), expected.len(), "seed {seed}");
            for (rank, (found, (ids, score))) in found.iter().zip(&expected).enumerate() {
                assert!((found.score - score).abs() < 1e-4, "seed {seed}, rank {rank}: {found:?}, {score}");
                let alone = |with: usize| expected.get(with).is_none_or(|(_, s)| (s - score).abs() > 1e-4);
                if alone(rank + 1) && (rank == 0 || alone(rank - 1)) {
                    assert_eq!(&said(found), ids, "seed {seed}, rank {rank}");
                }
                assert_eq!(found.sample, rank);
                let model: f64 = found.logprobs.iter().sum();
                assert!((model - lm.log_prob(&PROMPT, &found.ids).unwrap()).abs() < 1e-4, "{found:?}");
            }
        }
    }
}

#[test]
fn full_width_is_the_enumeration() {
    full_width(&TokenControls::new(), |_, _| {}, |_| 0.0);
}

#[test]
fn full_width_under_bans_is_the_enumeration() {
    let controls = TokenControls::new().with(NoRepeatNgram::new(2).unwrap());
    let edit = |text: &[i64], scores: &mut [f64]| {
        let last = text[text.len() - 1];
        text.windows(2).filter(|w| w[0] == last).for_each(|w| scores[w[1] as usize] = f64::NEG_INFINITY);
    };
    full_width(&controls, edit, |_| 0.0);
}

/// Penalised log-probabilities are not normalised again.
#[test]
fn full_width_under_penalties_is_the_enumeration() {
    let controls = TokenControls::new().with(RepetitionPenalty::new(1.7).unwrap());
    let edit = |text: &[i64], scores: &mut [f64]| {
        for (token, score) in (0i64..).zip(scores) {
            if text.contains(&token) {
                *score *= 1.7;
            }
        }
    };
    full_width(&controls, edit, |_| 0.0);
}

/// Rewards a text of which the tokens' sum is even, once it is finished.
#[derive(Clone)]
struct Even;

fn reward(said: &[i64]) -> f64 {
    if said.iter().sum::<i64>() % 2 == 0 { 2.5 } else { -0.5 }
}

impl RowControl for Even {
    type State = Vec<i64>;

    fn start(&self, _prompt: &[i64]) -> Result<Vec<i64>> {
        Ok(Vec::new())
    }
    fn score(&self, _said: &Vec<i64>, _row: &mut Tensor) -> Result<()> {
        Ok(())
    }
    fn advance(&self, said: &mut Vec<i64>, token: i64) -> Result<()> {
        said.push(token);
        Ok(())
    }
    fn finish(&self, said: &Vec<i64>) -> Result<f64> {
        Ok(reward(said))
    }
}

#[test]
fn log_weights_of_the_finished_count() {
    full_width(&TokenControls::new().with(PerRow(Even)), |_, _| {}, reward);
}

/// A log-weight of −∞ forbids what is finished; NaN is an error.
#[test]
fn a_log_weight_may_forbid() {
    #[derive(Clone)]
    struct Forbid(f64);
    impl RowControl for Forbid {
        type State = Vec<i64>;
        fn start(&self, _prompt: &[i64]) -> Result<Vec<i64>> {
            Ok(Vec::new())
        }
        fn score(&self, _said: &Vec<i64>, _row: &mut Tensor) -> Result<()> {
            Ok(())
        }
        fn advance(&self, said: &mut Vec<i64>, token: i64) -> Result<()> {
            said.push(token);
            Ok(())
        }
        fn finish(&self, said: &Vec<i64>) -> Result<f64> {
            Ok(if said.contains(&2) { self.0 } else { 0.0 })
        }
    }
    let (lm, prompts) = (table(4, 1), [PROMPT.to_vec()]);
    let run = |weight| {
        let controls = TokenControls::new().with(PerRow(Forbid(weight)));
        Search::beams(256).run(&Task { n: 256, ..task(&lm, &prompts, &controls) }, &mut ())
    };
    let expected = all(&lm, &PROMPT, 1.0, &|_, _| {}, &|_| 0.0);
    let expected: Vec<_> = expected.into_iter().filter(|(ids, _)| !ids.contains(&2)).collect();
    let found = run(f64::NEG_INFINITY).unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(&expected).all(|(h, (_, score))| (h.score - score).abs() < 1e-4));
    for bad in [f64::NAN, f64::INFINITY] {
        let error = run(bad).unwrap_err();
        assert!(matches!(error, controlgen_core::Error::NotFinite { .. }), "{error}");
    }
}

/// A control without memory: all of its state is worked out anew at each step.
#[derive(Clone)]
struct FromScratch<C>(C);

impl<C: TokenControl> TokenControl for FromScratch<C> {
    type State = Vec<Vec<i64>>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        Ok(prompts.to_vec())
    }
    fn score(&self, state: &mut Self::State, logits: Tensor) -> Result<Tensor> {
        self.0.score(&mut self.0.start(state)?, logits)
    }
    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        assert_eq!(state.len(), tokens.len(), "one token a row");
        state.iter_mut().zip(tokens).for_each(|(text, &token)| text.push(token));
        Ok(())
    }
}

#[test]
fn a_controls_state_follows_its_beam() {
    let prompts = [vec![0, 3], vec![0, 2, 4, 5, 3], vec![0, 5, 5]];
    for seed in 0..4 {
        let lm = table(7, seed);
        for search in [Search::beams(3), Search::beams(5), Search::groups(6, 3, 0.4)] {
            let (ngram, penalty) = (NoRepeatNgram::new(2).unwrap(), RepetitionPenalty::new(1.4).unwrap());
            let remembering = TokenControls::new().with(penalty).with(ngram).with(PerRow(Even));
            let from_scratch =
                TokenControls::new().with(FromScratch(penalty)).with(FromScratch(ngram)).with(PerRow(Even));
            let run = |controls: &TokenControls| {
                let task = Task { max_new_tokens: 9, n: 3, ..task(&lm, &prompts, controls) };
                search.run(&task, &mut ()).unwrap()
            };
            let (a, b) = (run(&remembering), run(&from_scratch));
            assert_eq!(a.len(), 9);
            for (a, b) in a.iter().zip(&b) {
                assert_eq!((said(a), &a.finish, a.prompt), (said(b), &b.finish, b.prompt), "seed {seed}");
                assert!((a.score - b.score).abs() < 1e-9, "seed {seed}: {a:?} {b:?}");
            }
        }
    }
}

/// transformers makes one beam greedy search; under the first two ways to stop it is.
#[test]
fn one_beam_is_greedy_search() {
    let prompts = [vec![0, 3], vec![0, 2, 4, 5, 3], vec![0, 5, 5]];
    // Greedy search has the penalty act on logits, beams on log-probabilities.
    let penalty = RepetitionPenalty::new(1.4).unwrap().normalised();
    let stacks =
        [TokenControls::new(), TokenControls::new().with(NoRepeatNgram::new(2).unwrap()).with(penalty)];
    for seed in 0..8 {
        let lm = table(7, seed);
        for controls in &stacks {
            let task = Task { max_new_tokens: 9, ..task(&lm, &prompts, controls) };
            let greedy = Choice::Greedy.run(&task, &mut ()).unwrap();
            for mode in &MODES[..2] {
                let search = BeamSearch::new(1).unwrap().length_penalty(0.0).unwrap().early_stopping(*mode);
                let beam = Search::Beam(search).run(&task, &mut ()).unwrap();
                for (beam, greedy) in beam.iter().zip(&greedy) {
                    assert_eq!((said(beam), &beam.finish), (said(greedy), &greedy.finish), "seed {seed}");
                    assert_eq!(beam.logprobs.len(), beam.ids.len());
                    assert!(beam.logprobs.iter().zip(&greedy.logprobs).all(|(a, b)| (a - b).abs() < 1e-5));
                    if controls.is_empty() {
                        assert!((beam.score - greedy.score).abs() < 1e-4);
                    }
                }
            }
        }
    }
}

/// The first group is a search of its own, and a great penalty leaves the others no token of its.
#[test]
fn groups_begin_undisturbed_and_differ() {
    let (prompts, none) = ([PROMPT.to_vec(), vec![0]], TokenControls::new());
    for seed in 0..6 {
        let lm = table(9, seed);
        let task = |n| Task { n, max_new_tokens: 5, eos: &[], ..task(&lm, &prompts, &none) };
        let alone = Search::beams(2).run(&task(2), &mut ()).unwrap();
        let grouped = Search::groups(6, 3, 1000.0).run(&task(6), &mut ()).unwrap();
        for prompt in 0..2 {
            let of = |all: &[Hypothesis]| -> Vec<Vec<i64>> {
                all.iter().filter(|h| h.prompt == prompt).map(said).collect()
            };
            let (alone, grouped) = (of(&alone), of(&grouped));
            assert!(alone.iter().all(|first| grouped.contains(first)), "seed {seed}: {alone:?} {grouped:?}");
            for others in grouped.iter().filter(|ids| !alone.contains(ids)) {
                for (step, token) in others.iter().enumerate() {
                    assert!(alone.iter().all(|first| first[step] != *token), "seed {seed}, step {step}");
                }
            }
        }
    }
}

#[test]
fn dead_ends_are_dropped() {
    // After 2 or 3 nothing may follow, and nothing may end but after 4.
    #[derive(Clone)]
    struct Ends;
    impl RowControl for Ends {
        type State = Option<i64>;
        fn start(&self, _prompt: &[i64]) -> Result<Option<i64>> {
            Ok(None)
        }
        fn score(&self, last: &Option<i64>, row: &mut Tensor) -> Result<()> {
            match last {
                Some(2 | 3) => drop(row.f_fill_(f64::NEG_INFINITY)?),
                Some(4) => {}
                _ => drop(row.f_get(EOS)?.f_fill_(f64::NEG_INFINITY)?),
            }
            Ok(())
        }
        fn advance(&self, last: &mut Option<i64>, token: i64) -> Result<()> {
            *last = Some(token);
            Ok(())
        }
    }
    let (lm, prompts) = (table(5, 3), [vec![0]]);
    let controls = TokenControls::new().with(Suppress::new([0]).unwrap()).with(PerRow(Ends));
    let task = Task { max_new_tokens: 3, n: 20, ..task(&lm, &prompts, &controls) };
    let found = Search::beams(20).run(&task, &mut ()).unwrap();
    let mut ids: Vec<Vec<i64>> = found.iter().map(said).collect();
    ids.sort();
    // 4 4 x for x in 1 2 3 4, and 4 1: fewer than the twenty asked for.
    assert_eq!(ids, [vec![4, 1], vec![4, 4, 1], vec![4, 4, 2], vec![4, 4, 3], vec![4, 4, 4]]);
    // The one beam goes where nothing follows.
    let nothing = TokenControls::new().with(Suppress::new([0, 1, 4]).unwrap()).with(PerRow(Ends));
    let error = Search::beams(4).run(&Task { controls: &nothing, n: 1, ..task }, &mut ()).unwrap_err();
    assert!(matches!(error, controlgen_core::Error::AllBanned { row: 0, step: 1 }), "{error}");
}

#[test]
fn the_context_ends_hypotheses() {
    let config = TableLmConfig { vocab: 6, context: 5, seed: 11, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    let prompts = [vec![0, 2, 3]];
    let long = Task { max_new_tokens: usize::MAX, n: 3, ..task(&lm, &prompts, &controls) };
    for mode in MODES {
        let search = Search::Beam(BeamSearch::new(3).unwrap().early_stopping(mode));
        let found = search.run(&long, &mut ()).unwrap();
        let just = search.run(&Task { max_new_tokens: 3, ..long }, &mut ()).unwrap();
        for (found, just) in found.iter().zip(&just) {
            assert_eq!((found.ids.len(), &found.finish), (3, &Finish::Context));
            assert_eq!((&found.ids, found.score, &just.finish), (&just.ids, just.score, &Finish::Length));
        }
    }
    let none = Search::beams(3).run(&Task { max_new_tokens: 0, ..long }, &mut ()).unwrap();
    assert_eq!((none.len(), none[0].ids.len(), none[0].score), (1, 0, 0.0));
}
