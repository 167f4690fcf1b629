//! Sums of models against the sums written out.

use controlgen_core::testing::{CountingLm, TableLm};
use controlgen_core::{
    At, Binding, Control, Controls, Error, Lane, Lanes, LanguageModel, LmInput, Pass, Placement, Result,
    SiteId, SiteKind, SiteMap, TokenControls,
};
use controlgen_text::arithmetic::{
    Expression, ModelArithmetic, Term, classifier_free_guidance, contrastive_decoding, dexperts,
    improved_contrastive_decoding,
};
use controlgen_text::models;
use controlgen_text::search::{BeamSearch, Choice, EarlyStopping, Search, Smc, Speculative, Task, prefill};
use tch::Tensor;

use crate::{EOS, LENGTH, PROMPT, enumerate, folder, normalised, p_value, run, said, table};

const INSTEAD: [i64; 2] = [4, 2];
const PREFIX: [i64; 4] = [3, 3, 4, 2];

/// Two models, and the terms of the first and of the second.
struct Models {
    a: TableLm,
    b: TableLm,
    of_a: Term,
    of_b: Term,
}

impl Models {
    fn new() -> Self {
        let (a, b) = (table(5, 11), table(5, 12));
        let (of_a, of_b) = (Term::new(a.handle()), Term::new(b.handle()));
        Self { a, b, of_a, of_b }
    }

    /// log p of the two after these contexts and what was said.
    fn a(&self, context: &[i64], said: &[i64]) -> Vec<f64> {
        self.a.log_probs(&[context, said].concat()).unwrap()
    }

    fn b(&self, context: &[i64], said: &[i64]) -> Vec<f64> {
        self.b.log_probs(&[context, said].concat()).unwrap()
    }
}

/// Σ fᵢ xᵢ, token by token.
fn weighted(parts: &[(f64, Vec<f64>)]) -> Vec<f64> {
    (0..parts[0].1.len()).map(|i| parts.iter().map(|(f, x)| f * x[i]).sum()).collect()
}

/// −∞ where the expert gives less than α of its best.
fn plausible(mut scores: Vec<f64>, expert: &[f64], alpha: f64) -> Vec<f64> {
    let best = expert.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for (score, log_p) in scores.iter_mut().zip(expert) {
        if *log_p < best + alpha.ln() {
            *score = f64::NEG_INFINITY;
        }
    }
    scores
}

type Formula<'m> = Box<dyn Fn(&[i64], &[i64]) -> Vec<f64> + 'm>;

/// Expressions, with the scores after a prompt and what was said, written out.
fn cases(m: &Models) -> Vec<(&'static str, Expression, Formula<'_>)> {
    let last = |prompt: &[i64]| vec![prompt[prompt.len() - 1]];
    let after = |prompt: &[i64]| [&PREFIX[..], prompt].concat();
    vec![
        (
            "three terms",
            &m.of_a - 0.6 * m.of_a.instead(INSTEAD) + &m.of_b,
            Box::new(|p, s| weighted(&[(1.0, m.a(p, s)), (-0.6, m.a(&INSTEAD, s)), (1.0, m.b(p, s))])),
        ),
        (
            "three terms over one model",
            1.2 * &m.of_a + 0.5 * m.of_a.after(PREFIX) - 0.7 * m.of_a.last_token(),
            Box::new(move |p, s| {
                weighted(&[(1.2, m.a(p, s)), (0.5, m.a(&after(p), s)), (-0.7, m.a(&last(p), s))])
            }),
        ),
        (
            "a term twice, and one of factor 0",
            &m.of_a + 0.5 * (m.of_a.prompt() - 2.0 * &m.of_b) + &m.of_b,
            Box::new(|p, s| weighted(&[(1.5, m.a(p, s))])),
        ),
        (
            "classifier-free guidance",
            classifier_free_guidance(&m.of_a, &m.of_a.instead(INSTEAD), 1.5),
            Box::new(|p, s| weighted(&[(1.5, m.a(p, s)), (-0.5, m.a(&INSTEAD, s))])),
        ),
        (
            "DExperts",
            dexperts(&m.of_a, &m.of_b, &m.of_a.instead(INSTEAD), 0.8),
            Box::new(|p, s| weighted(&[(1.0, m.a(p, s)), (0.8, m.b(p, s)), (-0.8, m.a(&INSTEAD, s))])),
        ),
        (
            "contrastive decoding",
            contrastive_decoding(&m.of_a, &m.of_b.temperature(0.5), 0.3),
            Box::new(|p, s| {
                let cold = normalised(&m.b(p, s).iter().map(|z| z / 0.5).collect::<Vec<_>>());
                plausible(weighted(&[(1.0, m.a(p, s)), (-1.0, cold)]), &m.a(p, s), 0.3)
            }),
        ),
        (
            "contrastive decoding, improved",
            improved_contrastive_decoding(&m.of_a, &m.of_a.last_token(), 0.2, 0.5),
            Box::new(move |p, s| {
                plausible(weighted(&[(1.5, m.a(p, s)), (-0.5, m.a(&last(p), s))]), &m.a(p, s), 0.2)
            }),
        ),
    ]
}

#[test]
fn sampling_draws_the_formula() {
    let m = Models::new();
    for (name, expression, formula) in cases(&m) {
        let lm = ModelArithmetic::new(expression).unwrap();
        let expected = enumerate(&|said| normalised(&formula(&PROMPT, said)));
        let drawn = run(
            &lm,
            &[PROMPT.to_vec()],
            &TokenControls::new(),
            &Choice::Sample { seed: 5, first: 0 },
            20_000,
        );
        let p = p_value(&drawn, &expected);
        println!("{name}: p = {p:.3}");
        assert!(p > 0.001, "{name}: p = {p}");
    }
}

#[test]
fn the_sum_of_factors_divides_where_it_is_asked_to() {
    let m = Models::new();
    let expression = || 1.5 * &m.of_a + 0.5 * &m.of_b;
    let formula = |s: &[i64], by: f64| {
        normalised(&weighted(&[(1.5 / by, m.a(&PROMPT, s)), (0.5 / by, m.b(&PROMPT, s))]))
    };
    for (lm, by) in [
        (ModelArithmetic::new(expression()).unwrap(), 1.0),
        (ModelArithmetic::new(expression()).unwrap().normalised().unwrap(), 2.0),
    ] {
        let search = BeamSearch::new(700).unwrap().length_penalty(0.0).unwrap();
        let best = &run(&lm, &[PROMPT.to_vec()], &TokenControls::new(), &search, 1)[0];
        let mut expected = enumerate(&|s| formula(s, by));
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(said(best), expected[0].0);
        assert!((best.score - expected[0].1).abs() < 1e-4, "{} {}", best.score, expected[0].1);
    }
}

/// Prompts of different lengths, as many beams as there are texts: the best of all, in order.
#[test]
fn beams_find_what_brute_force_finds() {
    let m = Models::new();
    let prompts = [PROMPT.to_vec(), vec![2], vec![4, 4, 0, 2, 3]];
    let search =
        BeamSearch::new(700).unwrap().length_penalty(0.0).unwrap().early_stopping(EarlyStopping::Exhausted);
    for (name, expression, formula) in cases(&m) {
        let lm = ModelArithmetic::new(expression).unwrap();
        let found = run(&lm, &prompts, &TokenControls::new(), &search, 12);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut expected = enumerate(&|said| normalised(&formula(prompt, said)));
            expected.sort_by(|a, b| b.1.total_cmp(&a.1));
            let found: Vec<_> = found.iter().filter(|h| h.prompt == i).collect();
            assert_eq!(found.len(), 12.min(expected.len()), "{name}, prompt {i}");
            for (found, expected) in found.iter().zip(&expected) {
                // Nearly equal texts may change places.
                assert!(
                    (found.score - expected.1).abs() < 1e-4,
                    "{name}, prompt {i}: {found:?} {expected:?}"
                );
            }
            assert_eq!(said(found[0]), expected[0].0, "{name}, prompt {i}");
        }
    }
}

#[test]
fn searches_that_fork_and_forget_draw_it_too() {
    let m = Models::new();
    let (_, expression, formula) = cases(&m).swap_remove(0);
    let lm = ModelArithmetic::new(expression).unwrap();
    let expected = enumerate(&|said| normalised(&formula(&PROMPT, said)));
    let sampled = || Choice::Sample { seed: 9, first: 0 };
    let searches: [(&str, Box<dyn Search>); 3] = [
        ("look-up", Box::new(Speculative::prompt_lookup(sampled(), 2, 3).unwrap())),
        ("a draft model", Box::new(Speculative::draft_model(sampled(), m.a.handle(), 2).unwrap())),
        ("particles", Box::new(Smc::new(20_000, 3).unwrap())),
    ];
    for (name, search) in searches {
        let drawn = run(&lm, &[PROMPT.to_vec()], &TokenControls::new(), &*search, 1000);
        let p = p_value(&drawn, &expected);
        println!("{name}: p = {p:.3}");
        assert!(p > 0.001, "{name}: p = {p}");
    }
}

#[test]
fn terms_over_one_model_are_one_call() {
    let counting = CountingLm::new(table(5, 11));
    let a = Term::new(counting.handle());
    let three = &a - 0.6 * a.instead(INSTEAD) + a.after(PREFIX) + 0.5 * a.prompt();
    let lm = ModelArithmetic::new(three).unwrap();
    let prompts = [PROMPT.to_vec(), vec![2]];
    run(&lm, &prompts, &TokenControls::new(), &Choice::Greedy, 1);
    let calls = counting.calls();
    assert_eq!(calls[0], [6, 7], "the prompts: 3 terms of 2 rows");
    assert!(calls.len() <= 4 && calls[1..].iter().all(|call| call[1] == 1 && call[0] <= 6), "{calls:?}");
    assert_eq!(calls[1], [6, 1]);
}

/// The terms of a real architecture are what the model says of each text by itself; an amateur of fewer layers too.
#[test]
fn terms_are_what_the_model_says_alone() {
    tch::set_num_threads(1);
    for name in ["gpt2_gelu_new", "llama_rope_llama3", "qwen3"] {
        let lm = models::open(&folder(name), Placement::CPU).unwrap();
        let a = Term::new(lm.handle());
        let amateur = a.first_layers(1).unwrap();
        let texts: [Vec<i64>; 2] = [vec![5, 17, 40, 8], vec![33, 2]];
        let (prefix, instead) = ([11i64, 30, 9], [7i64, 12, 3, 20, 31, 2, 5]);
        let sum = ModelArithmetic::new(
            &a + 0.5 * a.after(prefix) - 0.25 * a.instead(instead) - 0.5 * amateur.last_token(),
        )
        .unwrap();
        let small = models::first_layers(&*lm, 1).unwrap();
        let more = [vec![4i64, 9, 21], vec![13, 1, 6]];
        let found = scores(&sum, &texts, &more);
        for (i, text) in texts.iter().enumerate() {
            let alone = |lm: &dyn LanguageModel, text: &[i64]| scores(lm, &[text.to_vec()], &more[i..=i]);
            let after = [&prefix[..], text].concat();
            let expected = alone(&*lm, text) + alone(&*lm, &after) * 0.5
                - alone(&*lm, &instead) * 0.25
                - alone(&*small, &text[text.len() - 1..]) * 0.5;
            let worst = (found.narrow(0, i as i64, 1) - expected).abs().max().double_value(&[]);
            assert!(worst < 1e-4, "{name}, text {i}: {worst}");
        }
    }
}

/// Of an encoder–decoder the encoder reads what the terms read, and the decoder what is said.
#[test]
fn terms_of_an_encoder_decoder() {
    tch::set_num_threads(1);
    for name in ["t5_v1_0", "t5_v1_1"] {
        let lm = models::open(&folder(name), Placement::CPU).unwrap();
        let a = Term::new(lm.handle());
        let (prefix, instead) = ([11i64, 30, 9], [7i64, 12, 3, 20, 31, 2, 5]);
        let terms = || &a + 0.5 * a.after(prefix) - 0.25 * a.instead(instead) - 0.5 * a.last_token();
        let sum = ModelArithmetic::new(terms()).unwrap();
        let texts: [Vec<i64>; 2] = [vec![5, 17, 40, 8], vec![33, 2]];
        let more = [vec![4i64, 9, 21], vec![13, 1, 6]];
        let found = scores(&sum, &texts, &more);
        for (i, text) in texts.iter().enumerate() {
            let alone = |text: &[i64]| scores(&*lm, &[text.to_vec()], &more[i..=i]);
            let expected = alone(text) + alone(&[&prefix[..], text].concat()) * 0.5
                - alone(&instead) * 0.25
                - alone(&text[text.len() - 1..]) * 0.5;
            let worst = (found.narrow(0, i as i64, 1) - expected).abs().max().double_value(&[]);
            assert!(worst < 1e-4, "{name}, text {i}: {worst}");
        }
        let search = BeamSearch::new(3).unwrap();
        let together = run(&sum, &texts, &TokenControls::new(), &search, 2);
        let alone = run(&sum, &texts[1..], &TokenControls::new(), &search, 2);
        let of_batch: Vec<_> = together.iter().filter(|h| h.prompt == 1).map(|h| h.ids.clone()).collect();
        assert_eq!(of_batch, alone.iter().map(|h| h.ids.clone()).collect::<Vec<_>>(), "{name}");
        // A decoder-only model has no use for an encoder's input.
        let decoder = Term::new(Box::new(table(lm.spec().vocab, 1)));
        let mixed = ModelArithmetic::new(&a + &decoder).unwrap();
        let begun = prefill(&mixed, &texts, &Pass::default(), 0).map(drop);
        assert!(matches!(begun, Err(Error::Unsupported { .. })), "{begun:?}");
    }
}

/// Adds to the score of token 3 what the lane's sample says.
struct ByLane(SiteId);

impl Control for ByLane {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, _sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        to.at(self.0, 0);
        Ok(())
    }
    fn linear(&self, at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        let lanes = at.pass.lanes.unwrap().rows();
        assert_eq!(lanes.len() as i64, y.size()[0], "one lane a row");
        for (row, lane) in (0i64..).zip(lanes) {
            let _ = y.get(row).select(-1, 3).g_add_scalar_(f64::from(lane.sample));
        }
        Ok(y)
    }
}

/// Controls at sites act on every term over their model, on each row with its own lane, and follow the rows.
#[test]
fn lanes_go_with_all_terms() {
    let m = Models::new();
    let lm = ModelArithmetic::new(&m.of_a - 0.5 * m.of_a.instead(INSTEAD) + 0.7 * &m.of_b).unwrap();
    let head = lm.sites().of_kind(SiteKind::Linear).last().unwrap().0;
    let stack = Controls::bind(lm.sites(), vec![Box::new(ByLane(head))]).unwrap();
    let lane = |sample| Lane { sample, ..Lane::default() };
    let lanes = Lanes::new(vec![lane(2), lane(0), lane(1)]);
    let prompts = [PROMPT.to_vec(), vec![2], vec![4, 0]];
    let pass = Pass { controls: Some(&stack), lanes: Some(&lanes), ..Pass::default() };
    let controls = TokenControls::new();
    let (max_new_tokens, eos, n) = (LENGTH, &[EOS][..], 3);
    let task = Task { lm: &lm, prompts: &prompts, controls: &controls, pass, max_new_tokens, eos, n };
    let search =
        BeamSearch::new(700).unwrap().length_penalty(0.0).unwrap().early_stopping(EarlyStopping::Exhausted);
    let found = search.run(&task, &mut ()).unwrap();
    for (i, prompt) in prompts.iter().enumerate() {
        let shifted = |mut log_p: Vec<f64>| {
            log_p[3] += [2.0, 0.0, 1.0][i];
            normalised(&log_p)
        };
        let mut expected = enumerate(&|s| {
            let a = shifted(m.a(prompt, s));
            normalised(&weighted(&[(1.0, a), (-0.5, shifted(m.a(&INSTEAD, s))), (0.7, m.b(prompt, s))]))
        });
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        let found: Vec<_> = found.iter().filter(|h| h.prompt == i).collect();
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found.score - expected.1).abs() < 1e-4, "prompt {i}: {found:?} {expected:?}");
        }
    }
}

/// log p `[B, T, V]` after the texts and after each of the tokens that follow, but the last.
fn scores(lm: &dyn LanguageModel, texts: &[Vec<i64>], more: &[Vec<i64>]) -> Tensor {
    let is_sum = (lm as &dyn std::any::Any).is::<ModelArithmetic>();
    let pass = Pass::default();
    let (mut state, first) = prefill(lm, texts, &pass, 0).unwrap();
    let ids = Tensor::from_slice(&more.concat()).view([texts.len() as i64, -1]);
    let rest = lm.forward(LmInput::ids(&ids), &mut state, &pass).unwrap().logits;
    let all = Tensor::cat(&[first.unsqueeze(1), rest], 1);
    if is_sum { all } else { all.log_softmax(-1, tch::Kind::Float) }
}
