//! GeDi against Bayes' rule, written out on plain probabilities.

use controlgen_core::testing::{CountingLm, TableLm, contract};
use controlgen_core::{LanguageModel, Placement, Rows, TokenControl, TokenControls};
use controlgen_text::arithmetic::Term;
use controlgen_text::controls::Gedi;
use controlgen_text::models;
use controlgen_text::search::{BeamSearch, Choice, EarlyStopping, Search, Speculative};

use tch::Tensor;

use crate::{PROMPT, enumerate, folder, normalised, p_value, run, said, table};

/// Three classes: a model, another, and the first after a prefix, which a table that looks two tokens back sees only where the
/// prompt is short.
struct Classes {
    lm: TableLm,
    a: TableLm,
    b: TableLm,
}

const SHORT: [i64; 1] = [3];
const PREFIX: [i64; 2] = [4, 2];

impl Classes {
    fn new() -> Self {
        Self { lm: table(5, 30), a: table(5, 31), b: table(5, 32) }
    }

    fn terms(&self) -> Vec<Term> {
        let a = Term::new(self.a.handle());
        vec![a.prompt(), Term::new(self.b.handle()).temperature(2.0), a.after(PREFIX)]
    }

    /// log p of each class's model after what was said.
    fn log_p(&self, prompt: &[i64], said: &[i64]) -> [Vec<f64>; 3] {
        let of = |lm: &TableLm, text: &[&[i64]]| lm.log_probs(&text.concat()).unwrap();
        let warm: Vec<f64> = of(&self.b, &[prompt, said]).iter().map(|z| z / 2.0).collect();
        [of(&self.a, &[prompt, said]), normalised(&warm), of(&self.a, &[&PREFIX, prompt, said])]
    }

    /// P(c | what was said), from the likelihoods of all tokens: `power` of their number, and biases.
    fn posterior(
        &self,
        prompt: &[i64],
        said: &[i64],
        power: &dyn Fn(usize) -> f64,
        biases: [f64; 3],
    ) -> [f64; 3] {
        let mut log_likelihoods = [0.0; 3];
        for (t, &token) in said.iter().enumerate() {
            for (sum, log_p) in log_likelihoods.iter_mut().zip(self.log_p(prompt, &said[..t])) {
                *sum += log_p[token as usize];
            }
        }
        let scores = [0, 1, 2].map(|c| (biases[c] + power(said.len()) * log_likelihoods[c]).exp());
        scores.map(|score| score / scores.iter().sum::<f64>())
    }
}

type Case = (&'static str, Gedi, usize, f64, Box<dyn Fn(usize) -> f64>, [f64; 3]);

fn cases(classes: &Classes) -> Vec<Case> {
    let gedi = |desired, weight| Gedi::new(&classes.terms(), desired, weight).unwrap();
    let biases = [0.3, -0.5, 0.1];
    vec![
        ("as it is", gedi(0, 1.0).whole_likelihood(), 0, 1.0, Box::new(|_| 1.0), [0.0; 3]),
        (
            "with biases and a weight",
            gedi(1, 2.5).whole_likelihood().biases(&biases).unwrap(),
            1,
            2.5,
            Box::new(|_| 1.0),
            biases,
        ),
        ("by length", gedi(2, 4.0), 2, 4.0, Box::new(|t| 1.0 / t as f64), [0.0; 3]),
        (
            "by length, with alpha and biases",
            gedi(0, 3.0).length_scale(1.7).unwrap().biases(&biases).unwrap(),
            0,
            3.0,
            Box::new(|t| 1.7 / t as f64),
            biases,
        ),
    ]
}

#[test]
fn samples_are_of_bayes_rule() {
    let classes = Classes::new();
    for (name, control, desired, weight, power, biases) in cases(&classes) {
        let controls = TokenControls::new().with(control);
        for prompt in [&PROMPT[..], &SHORT] {
            let expected = enumerate(&|said| {
                let mut scores = classes.lm.log_probs(&[prompt, said].concat()).unwrap();
                for (token, score) in (0i64..).zip(&mut scores) {
                    let text = [said, &[token]].concat();
                    *score += weight * classes.posterior(prompt, &text, &power, biases)[desired].ln();
                }
                normalised(&scores)
            });
            let sampled = Choice::Sample { seed: 1, first: 0 };
            let searches: [(&str, Box<dyn Search>, usize); 2] = [
                ("sampling", Box::new(sampled), 20_000),
                ("look-up", Box::new(Speculative::prompt_lookup(sampled, 2, 2).unwrap()), 500),
            ];
            for (search, way, n) in searches {
                let drawn = run(&classes.lm, &[prompt.to_vec()], &controls, &*way, n);
                let p = p_value(&drawn, &expected);
                println!("{name}, after {prompt:?}, {search}: p = {p:.3}");
                assert!(p > 0.001, "{name}, after {prompt:?}, {search}: p = {p}");
            }
        }
    }
}

/// Scores over a text add up to log p + ω log P(c | text), of prompts of different lengths in one batch.
#[test]
fn beams_rank_by_the_class_of_the_whole_text() {
    let classes = Classes::new();
    let search =
        BeamSearch::new(700).unwrap().length_penalty(0.0).unwrap().early_stopping(EarlyStopping::Exhausted);
    let prompts = [PROMPT.to_vec(), SHORT.to_vec()];
    for (name, control, desired, weight, power, biases) in cases(&classes) {
        let controls = TokenControls::new().with(control);
        let found = run(&classes.lm, &prompts, &controls, &search, 10);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut expected: Vec<(Vec<i64>, f64)> =
                enumerate(&|said| classes.lm.log_probs(&[prompt.as_slice(), said].concat()).unwrap());
            for (text, score) in &mut expected {
                *score += weight * classes.posterior(prompt, text, &power, biases)[desired].ln();
            }
            expected.sort_by(|a, b| b.1.total_cmp(&a.1));
            let found: Vec<_> = found.iter().filter(|h| h.prompt == i).collect();
            assert_eq!(found.len(), 10);
            for (found, (text, score)) in found.iter().zip(&expected) {
                assert!((found.score - score).abs() < 1e-4, "{name}: {found:?}, {text:?} {score}");
            }
            assert_eq!(said(found[0]), expected[0].0, "{name}");
        }
    }
}

/// Section 3.1, token by token.
#[test]
fn the_filter_leaves_what_the_paper_leaves() {
    let classes = Classes::new();
    let (weight, desired) = (1.5, 0);
    let (mut by_mass, mut by_class) = (0, 0);
    for (rho, tau) in [(0.6, 0.5), (0.1, 0.3)] {
        let control = Gedi::new(&classes.terms(), desired, weight).unwrap().filter(rho, tau).unwrap();
        let controls = TokenControls::new().with(control);
        let decided = std::cell::Cell::new((0, 0));
        let expected = enumerate(&|said| {
            let mut scores = classes.lm.log_probs(&[&PROMPT[..], said].concat()).unwrap();
            let of = |token: usize| {
                let text = [said, &[token as i64]].concat();
                classes.posterior(&PROMPT, &text, &|t| 1.0 / t as f64, [0.0; 3])[desired]
            };
            let posterior: Vec<f64> = (0..scores.len()).map(of).collect();
            scores.iter_mut().zip(&posterior).for_each(|(s, p)| *s += weight * p.ln());
            let p: Vec<f64> = normalised(&scores).iter().map(|s| s.exp()).collect();
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| posterior[b].total_cmp(&posterior[a]));
            let mut mass = 0.0;
            for i in order {
                let (in_mass, in_class) = (mass < rho, posterior[i] > tau);
                let (m, c) = decided.get();
                decided.set((m + usize::from(in_mass && !in_class), c + usize::from(!in_mass && in_class)));
                mass += p[i];
                if !in_mass && !in_class {
                    scores[i] = f64::NEG_INFINITY;
                }
            }
            normalised(&scores)
        });
        by_mass += decided.get().0;
        by_class += decided.get().1;
        let sampled = Choice::Sample { seed: 6, first: 0 };
        let drawn = run(&classes.lm, &[PROMPT.to_vec()], &controls, &sampled, 20_000);
        let p = p_value(&drawn, &expected);
        println!("{} texts, p = {p:.3}", expected.len());
        assert!(p > 0.001, "p = {p}");
    }
    assert!(
        by_mass > 0 && by_class > 0,
        "either part of the filter decides somewhere: {by_mass}, {by_class}"
    );
}

#[test]
fn classes_of_one_model_are_one_call() {
    let counting = CountingLm::new(table(5, 31));
    let term = Term::new(counting.handle());
    let control = Gedi::new(&[term.after([4]), term.after([2, 3]), term.prompt()], 1, 2.0).unwrap();
    let controls = TokenControls::new().with(control);
    let found = run(&table(5, 30), &[PROMPT.to_vec(), vec![2]], &controls, &Choice::Greedy, 1);
    let calls = counting.calls();
    assert_eq!(calls[0], [6, 5], "the prompts: 3 classes of 2 rows");
    let longest = found.iter().map(|h| said(h).len()).max().unwrap();
    assert_eq!(calls.len(), longest, "one call a step, none after the last: {calls:?}");
    assert!(calls[1..].iter().all(|call| call[1] == 1));
}

/// Tokens that were taken without asking are read in one call, and count like all others.
#[test]
fn tokens_that_nothing_was_asked_of() {
    let counting = CountingLm::new(table(5, 31));
    let term = Term::new(counting.handle());
    let control = Gedi::new(&[term.after([4]), term.after([2, 3])], 1, 2.0).unwrap();
    let prompts = [PROMPT.to_vec(), vec![2]];
    let logits = || Tensor::zeros([2, 5], (tch::Kind::Float, tch::Device::Cpu));
    let (mut asked, mut quiet) = (control.start(&prompts).unwrap(), control.start(&prompts).unwrap());
    counting.take();
    for tokens in [[2, 3], [4, 4], [0, 2]] {
        let _ = control.score(&mut asked, logits()).unwrap();
        control.advance(&mut asked, &tokens).unwrap();
        control.advance(&mut quiet, &tokens).unwrap();
    }
    quiet.reorder(&[1, 0]).unwrap();
    counting.take();
    let found = control.score(&mut quiet, logits()).unwrap();
    assert_eq!(counting.calls(), [[4, 3]]);
    let expected = control.score(&mut asked, logits()).unwrap().flip([0]);
    assert!(found.allclose(&expected, 1e-5, 1e-5, false), "{found} {expected}");
}

#[test]
fn contracts() {
    tch::set_num_threads(1);
    let lm = models::open(&folder("llama_gqa_tied"), Placement::CPU).unwrap();
    let (vocab, term) = (lm.spec().vocab, Term::new(lm));
    let amateur = term.first_layers(1).unwrap();
    for control in [
        Gedi::new(&[term.after([4]), term.after([2, 3])], 1, 2.0).unwrap(),
        Gedi::new(&[term.instead([4, 1]), amateur, term.last_token()], 0, 8.0).unwrap().whole_likelihood(),
        Gedi::new(&[term.after([4]), term.after([2, 3])], 0, 30.0).unwrap().filter(0.2, 0.8).unwrap(),
    ] {
        contract::token_control(&control, vocab).unwrap();
    }
}
