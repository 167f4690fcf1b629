//! Speculative decoding against decoding token by token.

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{
    At, Binding, Control, Controls, Error, Lanes, LanguageModel, Pass, Placement, Result, Rows, SiteKind,
    SiteMap, TokenControls,
};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty, Suppress, Temperature};
use controlgen_text::models;
use controlgen_text::search::{Choice, Finish, Hypothesis, Search, Speculative, Task};
use tch::Tensor;

use crate::told::Told;
use crate::{EOS, PROMPT, all, cornered, folder, p_value, said, table, task};

const SAMPLE: Choice = Choice::Sample { seed: 3, first: 2 };

fn look_up(choice: Choice, draft_tokens: usize) -> Speculative {
    Speculative::prompt_lookup(choice, 2, draft_tokens).unwrap()
}

fn drafted(choice: Choice, lm: &dyn LanguageModel, draft_tokens: usize) -> Speculative {
    Speculative::draft_model(choice, lm.handle(), draft_tokens).unwrap()
}

fn same(found: &[Hypothesis], expected: &[Hypothesis], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (a, b) in found.iter().zip(expected) {
        assert_eq!((said(a), &a.finish), (said(b), &b.finish), "{what}: {a:?}");
        assert_eq!((a.prompt, a.sample), (b.prompt, b.sample), "{what}");
        assert!((a.score - b.score).abs() < 1e-4, "{what}: {} {}", a.score, b.score);
        assert!(a.logprobs.iter().zip(&b.logprobs).all(|(a, b)| (a - b).abs() < 1e-4), "{what}");
    }
}

/// Greedy search, and look-up under any choice, say what they say token by token: under controls that remember, on
/// ragged prompts, several completions, several ends; on a table and on models with a cache.
#[test]
fn completions_are_those_of_the_choice() {
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3, 2, 4], vec![0], vec![0, 5, 5]];
    let stacks = [
        TokenControls::new(),
        TokenControls::new()
            .with(RepetitionPenalty::new(1.2).unwrap())
            .with(NoRepeatNgram::new(4).unwrap())
            .with(Temperature::new(0.6).unwrap()),
    ];
    let open = |name| models::open(&folder(name), Placement::CPU).unwrap();
    let (llama, gpt2) = (open("llama_gqa_tied"), open("gpt2_gelu_new"));
    for seed in 0..3 {
        let (lm, other) = (table(7, seed), table(7, seed + 50));
        let cut = [models::first_layers(&*llama, 1).unwrap(), models::first_layers(&*gpt2, 1).unwrap()];
        let models: [(&dyn LanguageModel, &dyn LanguageModel, &[i64]); 3] =
            [(&lm, &other, &[EOS, 6]), (&*llama, &*cut[0], &[10, 33, 45]), (&*gpt2, &*cut[1], &[10, 33])];
        for (i, (lm, draft, eos)) in models.into_iter().enumerate() {
            for controls in &stacks {
                let task = Task { max_new_tokens: 24, eos, n: 2, ..task(lm, &prompts, controls) };
                for draft_tokens in [1, 4] {
                    for choice in [Choice::Greedy, SAMPLE] {
                        let expected = choice.run(&task, &mut ()).unwrap();
                        let what = format!("model {i}, seed {seed}, {choice:?}, {draft_tokens} tokens");
                        let mut told = Told::new(8);
                        let found = look_up(choice, draft_tokens).run(&task, &mut told).unwrap();
                        same(&found, &expected, &what);
                    }
                    let expected = Choice::Greedy.run(&task, &mut ()).unwrap();
                    for draft in [draft, lm] {
                        let search = drafted(Choice::Greedy, draft, draft_tokens);
                        let search = search.draft_controls(controls.clone());
                        same(&search.run(&task, &mut Told::new(8)).unwrap(), &expected, "a draft model");
                    }
                }
            }
        }
    }
}

/// Drafts of another model, at α = 0.001: alone, under a constraint, a temperature and a ban, with and without controls
/// of the draft's own.
#[test]
fn a_draft_model_leaves_the_distribution() {
    const N: usize = 5000;
    let (lm, draft, prompts) = (table(5, 3), table(5, 77), [PROMPT.to_vec()]);
    let hot = Temperature::new(1.7).unwrap();
    let tail = |_: &[i64], s: &mut [f64]| s.iter_mut().for_each(|s| *s /= 1.7);
    let no_dead_end = Suppress::new([3]).unwrap();
    let none = |_: &[i64], _: &mut [f64]| ();
    let banned = |said: &[i64], s: &mut [f64]| {
        // After 2 nothing but 3 would be left.
        s[2] = f64::NEG_INFINITY;
        if said.len() != 1 {
            s[4] = f64::NEG_INFINITY;
        }
        tail(said, s);
    };
    let odd =
        TokenControls::new().with(Suppress::new([2]).unwrap()).with(controlgen_core::PerRow(OnlySecond));
    type Case<'a> = (&'a str, TokenControls, TokenControls, &'a dyn Fn(&[i64], &mut [f64]));
    let cases: [Case<'_>; 4] = [
        ("nothing", TokenControls::new(), TokenControls::new(), &none),
        ("a temperature", TokenControls::new().with(hot), TokenControls::new(), &tail),
        ("a temperature on both", TokenControls::new().with(hot), TokenControls::new().with(hot), &tail),
        ("bans", odd.with(hot), TokenControls::new().with(no_dead_end), &banned),
    ];
    for (name, controls, of_draft, edit) in cases {
        let expected: Vec<(Vec<i64>, f64)> =
            all(&lm, true, edit).into_iter().map(|(ids, log_p)| (ids, log_p.exp())).collect();
        for draft_tokens in [1, 3] {
            let search = drafted(SAMPLE, &draft, draft_tokens).draft_controls(of_draft.clone());
            let task = Task { n: N, ..task(&lm, &prompts, &controls) };
            let (found, count) = search.complete(&task, &mut ()).unwrap();
            let p = p_value(&found.iter().map(said).collect::<Vec<_>>(), &expected);
            println!("{name}, {draft_tokens} tokens: {count:?}, p = {p:.3}");
            assert!(p > 0.001, "{name}, {draft_tokens} tokens: p = {p}");
            assert!(0 < count.accepted && count.accepted < count.drafted);
        }
    }
}

/// Allows 4 as the second token only.
#[derive(Clone)]
struct OnlySecond;

impl controlgen_core::RowControl for OnlySecond {
    type State = usize;
    fn start(&self, _prompt: &[i64]) -> Result<usize> {
        Ok(0)
    }
    fn score(&self, said: &usize, row: &mut Tensor) -> Result<()> {
        if *said != 1 {
            let _ = row.f_get(4)?.f_fill_(f64::NEG_INFINITY)?;
        }
        Ok(())
    }
    fn advance(&self, said: &mut usize, _token: i64) -> Result<()> {
        *said += 1;
        Ok(())
    }
}

/// The share that is kept is Σ min(p, q), here of the second of two tokens.
#[test]
fn as_much_is_kept_as_two_distributions_share() {
    const N: usize = 6000;
    let (lm, draft, none, prompts) = (table(5, 3), table(5, 9), TokenControls::new(), [PROMPT.to_vec()]);
    let task = Task { n: N, max_new_tokens: 3, eos: &[], ..task(&lm, &prompts, &none) };
    let (_, count) = drafted(SAMPLE, &draft, 1).complete(&task, &mut ()).unwrap();
    let first: Vec<f64> = lm.log_probs(&PROMPT).unwrap().iter().map(|p| p.exp()).collect();
    // The third token is drafted where the second was not kept.
    let share = |text: &[i64]| -> f64 {
        let (p, q) = (lm.log_probs(text).unwrap(), draft.log_probs(text).unwrap());
        p.iter().zip(&q).map(|(p, q)| p.exp().min(q.exp())).sum()
    };
    let expected: f64 = (0..5).map(|t| first[t] * share(&[0, 2, 3, t as i64])).sum();
    assert_eq!(count.drafted, N, "the second token of each, and the third of none");
    let error = (expected * (1.0 - expected) / N as f64).sqrt();
    assert!((count.rate() - expected).abs() < 4.0 * error, "{count:?}: {} of {expected}", count.rate());

    let (found, count) = drafted(SAMPLE, &lm, 4).complete(&task, &mut ()).unwrap();
    assert!(count.rate() > 0.9999, "a model keeps its own draft: {count:?}");
    assert_eq!(count.passes, N, "one pass after the prompt: {}", found.len());
}

/// A text that repeats itself is copied.
#[test]
fn repetition_takes_few_passes() {
    // 2 3 4 2 3 4 …, all but certain.
    let mut logits = vec![0.0; 6 * 6];
    for (from, to) in [(0, 2), (2, 3), (3, 4), (4, 2)] {
        logits[to * 6 + from] = 40.0;
    }
    let config = TableLmConfig { vocab: 6, order: 1, ..TableLmConfig::default() };
    let lm = TableLm::from_logits(&config, &logits).unwrap();
    let (none, prompts) = (TokenControls::new(), [vec![0]]);
    let task = Task { max_new_tokens: 40, ..task(&lm, &prompts, &none) };
    let search = Speculative::prompt_lookup(Choice::Greedy, 3, 5).unwrap();
    let (found, count) = search.complete(&task, &mut ()).unwrap();
    same(&found, &Choice::Greedy.run(&task, &mut ()).unwrap(), "repetition");
    assert_eq!(count.rate(), 1.0);
    assert!(count.passes <= 10, "{count:?}: 4 tokens alone, then 6 a pass");
}

#[test]
fn listeners_end_and_cancel() {
    let (lm, other, none, prompts) =
        (table(7, 1), table(7, 2), TokenControls::new(), vec![vec![0, 3], vec![0]]);
    let ways = [look_up(SAMPLE, 4), drafted(Choice::Greedy, &other, 4)];
    for search in ways {
        let run = |eos: &[i64], stop: i64| {
            let mut told = Told { stop: vec![stop], ..Told::new(6) };
            search
                .run(&Task { max_new_tokens: 12, eos, n: 3, ..task(&lm, &prompts, &none) }, &mut told)
                .unwrap()
        };
        let (ended, stopped) = (run(&[6, 1], -1), run(&[1], 6));
        for (ended, stopped) in ended.iter().zip(&stopped) {
            assert_eq!(said(ended), said(stopped));
            assert_eq!(ended.finish == Finish::Eos(6), stopped.finish == Finish::Stopped);
        }
        let mut told = Told { cancel_at: 2, ..Told::new(6) };
        let task = Task { max_new_tokens: 50, eos: &[], n: 3, ..task(&lm, &prompts, &none) };
        let found = search.run(&task, &mut told).unwrap();
        assert_eq!((told.steps, found.len()), (2, 6));
        assert!(found.iter().all(|h| h.finish == Finish::Cancelled));
        assert!(found[0].ids.len() >= 2 && found[1..].iter().all(|h| h.ids.is_empty()));
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
        sites.select(SiteKind::Linear, "lm_head")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        for (row, token) in (0i64..).zip(&at.pass.lanes.unwrap().get::<Biased>().unwrap().0) {
            let _ = y.get(row).narrow(-1, *token, 1).f_add_scalar_(1.5)?;
        }
        Ok(y)
    }
}

#[test]
fn lanes_follow_their_prompts() {
    let (lm, none) = (table(7, 2), TokenControls::new());
    let controls = Controls::bind(lm.sites(), vec![Box::new(Bias)]).unwrap();
    let lanes = Lanes::samples(2).with(Biased(vec![3, 6]));
    let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), ..Pass::default() };
    let prompts = [vec![0, 3], vec![0, 3]];
    let task = Task { pass, max_new_tokens: 12, n: 2, ..task(&lm, &prompts, &none) };
    let found = look_up(SAMPLE, 3).run(&task, &mut ()).unwrap();
    same(&found, &SAMPLE.run(&task, &mut ()).unwrap(), "lanes");
    assert_ne!(said(&found[0]), said(&found[2]), "the same prompt in other lanes");
}

#[test]
fn the_context_ends_completions() {
    let context = |context, seed| {
        TableLm::new(&TableLmConfig { vocab: 6, context, seed, ..TableLmConfig::default() }).unwrap()
    };
    let (lm, short) = (context(12, 11), context(6, 12));
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    let prompts = [PROMPT.to_vec()];
    for max_new_tokens in [0, 1, 2, 9, 10, 11, usize::MAX] {
        let task = Task { max_new_tokens, ..task(&lm, &prompts, &controls) };
        let expected = Choice::Greedy.run(&task, &mut ()).unwrap();
        // A draft whose context ends before the text does drafts no more.
        for search in [look_up(Choice::Greedy, 5), drafted(Choice::Greedy, &short, 5)] {
            same(&search.run(&task, &mut ()).unwrap(), &expected, "the context");
        }
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let (lm, none, prompts) = (table(6, 1), TokenControls::new(), [vec![0], vec![0, 2]]);
    assert!(matches!(Speculative::prompt_lookup(SAMPLE, 0, 3), Err(Error::Value { .. })));
    assert!(matches!(Speculative::prompt_lookup(SAMPLE, 2, 0), Err(Error::Value { .. })));
    assert!(matches!(Speculative::draft_model(SAMPLE, lm.handle(), 0), Err(Error::Value { .. })));
    let run = |search: &Speculative, lm: &dyn LanguageModel, controls: &TokenControls| {
        search.run(&task(lm, &prompts, controls), &mut ()).unwrap_err()
    };
    let other = run(&drafted(SAMPLE, &table(7, 1), 3), &lm, &none).to_string();
    assert!(other.contains("vocabulary") && other.contains("6 tokens") && other.contains('7'), "{other}");
    let nan = lm.map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    let dead = cornered().with(Suppress::new([0, 1, 2, 4, 5]).unwrap());
    for search in [look_up(SAMPLE, 3), look_up(Choice::Greedy, 3), drafted(SAMPLE, &lm, 3)] {
        assert!(matches!(run(&search, &*nan, &none), Error::NotFinite { .. }));
        let error = run(&search, &lm, &dead);
        assert!(matches!(error, Error::AllBanned { row: 0, step: 2 }), "{error}");
    }
    assert!(matches!(run(&drafted(SAMPLE, &*nan, 3), &lm, &none), Error::NotFinite { .. }));
}
