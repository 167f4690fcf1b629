//! Prompts together and alone; rows, lanes and listeners that follow their beams.

use controlgen_core::{
    At, Binding, Control, Controls, Lanes, LanguageModel, Pass, Placement, Result, Rows, SiteKind, SiteMap,
    TokenControls,
};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty};
use controlgen_text::models;
use controlgen_text::search::{BeamSearch, EarlyStopping, Finish, Hypothesis, Task};
use tch::Tensor;

use crate::told::Told;
use crate::{EOS, Search, folder, said, table, task};

fn stack() -> TokenControls {
    TokenControls::new().with(RepetitionPenalty::new(1.2).unwrap()).with(NoRepeatNgram::new(3).unwrap())
}

fn searches() -> [Search; 3] {
    let never = BeamSearch::new(4).unwrap().early_stopping(EarlyStopping::Never);
    [Search::beams(4), Search::Beam(never), Search::groups(4, 2, 0.7)]
}

fn same(a: &Hypothesis, b: &Hypothesis, what: &str) {
    assert_eq!((said(a), &a.finish), (said(b), &b.finish), "{what}");
    assert!((a.score - b.score).abs() < 1e-4, "{what}: {} {}", a.score, b.score);
}

/// Searches end at different steps, and none minds the others; on a table and on a model with a cache.
#[test]
fn a_batch_in_any_order_is_one_by_one() {
    tch::set_num_threads(1);
    let (lm, controls) = (table(7, 5), stack());
    let llama = models::open(&folder("llama_gqa_tied"), Placement::CPU).unwrap();
    let models: [(&dyn LanguageModel, &[i64]); 2] = [(&lm, &[EOS]), (&*llama, &[10, 33, 45])];
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0], vec![0, 5, 5]];
    let reversed: Vec<_> = prompts.iter().rev().cloned().collect();
    for (lm, eos) in models {
        for search in searches() {
            let run = |prompts: &[Vec<i64>]| {
                let task = Task { max_new_tokens: 10, eos, n: 3, ..task(lm, prompts, &controls) };
                search.run(&task, &mut ()).unwrap()
            };
            let (batch, backwards) = (run(&prompts), run(&reversed));
            for (i, prompt) in prompts.iter().enumerate() {
                let alone = run(std::slice::from_ref(prompt));
                assert_eq!(alone.len(), 3);
                for (k, alone) in alone.iter().enumerate() {
                    let what = format!("{search:?}, prompt {i}, hypothesis {k}");
                    same(&batch[3 * i + k], alone, &what);
                    same(&backwards[3 * (prompts.len() - 1 - i) + k], alone, &what);
                    assert_eq!((batch[3 * i + k].prompt, batch[3 * i + k].sample), (i, k));
                }
            }
        }
    }
}

/// Adds to one token's logit, in the rows of the lanes that say so.
struct Bias;

#[derive(Clone)]
struct Biased(Vec<i64>);

impl Rows for Biased {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder(rows)
    }
}

impl Control for Bias {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for site in sites.select(SiteKind::Linear, "lm_head")? {
            to.at(site, 0);
        }
        Ok(())
    }
    fn linear(&self, at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        let tokens = &at.pass.lanes.unwrap().get::<Biased>().unwrap().0;
        assert_eq!(tokens.len() as i64, y.size()[0], "one lane a row");
        for (row, token) in (0i64..).zip(tokens) {
            let _ = y.get(row).narrow(-1, *token, 1).f_add_scalar_(1.5)?;
        }
        Ok(y)
    }
}

#[test]
fn lanes_follow_their_beams() {
    let (lm, none) = (table(7, 2), TokenControls::new());
    let controls = Controls::bind(lm.sites(), vec![Box::new(Bias)]).unwrap();
    let (prompts, tokens) = (vec![vec![0, 3], vec![0, 4, 4], vec![0, 3]], vec![3, 5, 6]);
    for search in searches() {
        let run = |prompts: &[Vec<i64>], tokens: &[i64]| {
            let lanes = Lanes::samples(prompts.len()).with(Biased(tokens.to_vec()));
            let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), ..Pass::default() };
            let task = Task { pass, max_new_tokens: 8, n: 4, ..task(&lm, prompts, &none) };
            search.run(&task, &mut ()).unwrap()
        };
        let batch = run(&prompts, &tokens);
        for i in 0..3 {
            let alone = run(&prompts[i..=i], &tokens[i..=i]);
            for (k, alone) in alone.iter().enumerate() {
                same(&batch[4 * i + k], alone, &format!("{search:?}, prompt {i}, hypothesis {k}"));
            }
        }
        assert_ne!(said(&batch[0]), said(&batch[8]), "the same prompt in other lanes");
    }
}

/// To stop at a sequence is to end at it as at an end token; but that it counts as said.
#[test]
fn what_a_listener_ends_is_finished() {
    let (prompts, controls) = (vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0]], stack());
    for seed in 0..4 {
        let lm = table(7, seed);
        for search in searches() {
            let run = |eos: &[i64], stop: Vec<i64>| {
                let mut told = Told { stop, ..Told::new(3) };
                let task = Task { max_new_tokens: 8, eos, n: 4, ..task(&lm, &prompts, &controls) };
                search.run(&task, &mut told).unwrap()
            };
            let (ended, stopped) = (run(&[4], vec![-1]), run(&[], vec![4]));
            assert!(ended.iter().any(|h| h.finish == Finish::Eos(4)));
            for (ended, stopped) in ended.iter().zip(&stopped) {
                assert_eq!(said(ended), stopped.ids, "seed {seed}, {search:?}");
                assert!((ended.score - stopped.score).abs() < 1e-6);
                assert_eq!(ended.finish == Finish::Eos(4), stopped.finish == Finish::Stopped);
            }
            for stopped in run(&[EOS], vec![4, 5]) {
                let at = stopped.ids.windows(2).position(|w| w == [4, 5]).map(|at| at + 2);
                assert_eq!(at, (stopped.finish == Finish::Stopped).then_some(stopped.ids.len()));
            }
        }
    }
}

#[test]
fn what_there_is_when_cancelled_is_given() {
    let (lm, none, prompts) = (table(7, 1), TokenControls::new(), [vec![0, 3], vec![0]]);
    for search in searches() {
        let mut told = Told { cancel_at: 3, ..Told::new(2) };
        let task = Task { max_new_tokens: 8, eos: &[], n: 4, ..task(&lm, &prompts, &none) };
        let cancelled = search.run(&task, &mut told).unwrap();
        let short = search.run(&Task { max_new_tokens: 3, ..task }, &mut ()).unwrap();
        assert_eq!((told.steps, cancelled.len()), (3, 8));
        for (cancelled, short) in cancelled.iter().zip(&short) {
            assert_eq!((&cancelled.ids, &cancelled.finish), (&short.ids, &Finish::Cancelled));
            assert!((cancelled.score - short.score).abs() < 1e-6);
        }
    }
}
