//! ContrastiveSearch search against plain Python on transformers' models, and against hidden states that are known.

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{
    At, Binding, Control, Controls, Error, LanguageModel, Pass, Placement, Result, SiteKind, SiteMap, Taps,
    TokenControls,
};
use controlgen_text::controls::{NoRepeatNgram, RepetitionPenalty, Suppress};
use controlgen_text::models;
use controlgen_text::search::{Choice, ContrastiveSearch, Finish, Hypothesis, Search, Task};
use tch::Tensor;

use crate::told::Told;
use crate::{EOS, folder, said, table, task};

fn search(penalty_alpha: f64, top_k: usize) -> ContrastiveSearch {
    ContrastiveSearch::new(penalty_alpha, top_k).unwrap()
}

/// `benches/reference/contrastive_fixtures.py` makes them.
#[test]
fn texts_are_the_references() {
    tch::set_num_threads(1);
    let file = std::fs::read_to_string(folder("contrastive.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&file).unwrap();
    let prompts: Vec<Vec<i64>> = serde_json::from_value(file["prompts"].clone()).unwrap();
    let mut compared = 0;
    for case in file["cases"].as_array().unwrap() {
        let lm = models::open(&folder(case["model"].as_str().unwrap()), Placement::CPU).unwrap();
        let config = &case["config"];
        let mut controls = TokenControls::new();
        if let Some(penalty) = config["repetition_penalty"].as_f64() {
            controls.push(RepetitionPenalty::new(penalty).unwrap());
        }
        if let Some(n) = config["no_repeat_ngram_size"].as_u64() {
            controls.push(NoRepeatNgram::new(n as usize).unwrap());
        }
        let eos: Vec<i64> = serde_json::from_value(config["eos_token_id"].clone()).unwrap();
        let max_new_tokens = config["max_new_tokens"].as_u64().unwrap() as usize;
        let task = Task { max_new_tokens, eos: &eos, ..task(&*lm, &prompts, &controls) };
        let search =
            search(config["penalty_alpha"].as_f64().unwrap(), config["top_k"].as_u64().unwrap() as usize);
        let mut told = Told::new(3);
        let found = search.run(&task, &mut told).unwrap();
        for (i, found) in found.iter().enumerate() {
            if !case["clear"][i].as_bool().unwrap() {
                continue;
            }
            let expected: Vec<i64> = serde_json::from_value(case["expected"][i].clone()).unwrap();
            assert_eq!(said(found), expected, "{}, {config}, prompt {i}", case["model"]);
            assert_eq!((found.prompt, found.sample), (i, 0));
            compared += 1;
            let alone = Task { prompts: &prompts[i..=i], ..task };
            assert_eq!(said(&search.run(&alone, &mut ()).unwrap()[0]), expected, "alone");
        }
    }
    assert!(compared >= 48, "{compared}");
}

/// The hidden state of a table is its token's unit vector, or the pair's with the token before: the cosine is 1 for what
/// was said, and 0 for all else.
#[test]
fn a_table_repeats_nothing() {
    for (order, seed) in (0..10).map(|seed| (1 + seed as usize % 2, seed)) {
        let config = TableLmConfig { vocab: 7, order, seed, ..TableLmConfig::default() };
        let (lm, prompt) = (TableLm::new(&config).unwrap(), vec![0, 2, 3, 2]);
        for (alpha, k, banned) in [(0.0, 3, 7), (0.1, 3, 7), (0.3, 5, 4), (1.0, 7, 7), (0.4, 20, 2)] {
            let mut text = prompt.clone();
            let mut score = 0.0;
            while text.len() < 12 && text.last() != Some(&EOS) {
                let last = text[text.len() - 1];
                let mut p: Vec<f64> = lm.log_probs(&text).unwrap().iter().map(|p| p.exp()).collect();
                if banned < 7 {
                    p[banned] = 0.0;
                }
                let sum: f64 = p.iter().sum();
                p.iter_mut().for_each(|p| *p /= sum);
                let mut order_of: Vec<usize> = (0..7).filter(|&v| p[v] > 0.0).collect();
                order_of.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
                order_of.truncate(k);
                let repeats = |v: usize| match order {
                    1 => text.contains(&(v as i64)),
                    _ => text.windows(2).any(|w| w == [last, v as i64]),
                };
                let value = |v: usize| (1.0 - alpha) * p[v] - alpha * f64::from(repeats(v));
                let best =
                    order_of.iter().copied().reduce(|a, b| if value(b) > value(a) + 1e-6 { b } else { a });
                score += p[best.unwrap()].ln();
                text.push(best.unwrap() as i64);
            }
            let mut controls = TokenControls::new();
            if banned < 7 {
                controls.push(Suppress::new([banned as i64]).unwrap());
            }
            let prompts = [prompt.clone()];
            let task = Task { max_new_tokens: 8, ..task(&lm, &prompts, &controls) };
            let found = search(alpha, k).run(&task, &mut ()).unwrap();
            assert_eq!(said(&found[0]), text[4..], "order {order}, seed {seed}, α {alpha}, k {k}");
            assert!((found[0].score - score).abs() < 1e-4);
        }
    }
}

/// Without a penalty it is greedy search; on ragged prompts, and as the batch shrinks.
#[test]
fn without_penalty_it_is_greedy_search() {
    let prompts = vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0], vec![0, 5, 5]];
    let controls = TokenControls::new().with(NoRepeatNgram::new(3).unwrap());
    let llama = models::open(&folder("llama_gqa_tied"), Placement::CPU).unwrap();
    let lm = table(7, 5);
    let models: [(&dyn LanguageModel, &[i64]); 2] = [(&lm, &[EOS, 6]), (&*llama, &[10, 33, 45])];
    for (lm, eos) in models {
        let task = Task { max_new_tokens: 10, eos, ..task(lm, &prompts, &controls) };
        let expected = Choice::Greedy.run(&task, &mut ()).unwrap();
        let found = search(0.0, 4).run(&task, &mut Told::new(4)).unwrap();
        for (a, b) in found.iter().zip(&expected) {
            assert_eq!((said(a), &a.finish, a.prompt), (said(b), &b.finish, b.prompt));
            assert!((a.score - b.score).abs() < 1e-4);
            assert!(a.logprobs.iter().zip(&b.logprobs).all(|(a, b)| (a - b).abs() < 1e-4));
        }
    }
}

/// Leaves the output product's input where it finds taps, as the search's own does.
struct Other;

impl Control for Other {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "lm_head")?.into_iter().for_each(|site| to.at_input(site, 0));
        Ok(())
    }
    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        at.pass.taps.unwrap().push(at.site, x.f_zeros_like()?);
        Ok(x)
    }
}

#[test]
fn other_controls_and_taps_are_left_alone() {
    let (lm, none, prompts) = (table(7, 2), TokenControls::new(), [vec![0, 3], vec![0, 4, 4]]);
    let run = |pass: Pass<'_>| -> Vec<Hypothesis> {
        search(0.4, 4).run(&Task { pass, max_new_tokens: 6, ..task(&lm, &prompts, &none) }, &mut ()).unwrap()
    };
    let (controls, taps) = (Controls::bind(lm.sites(), vec![Box::new(Other)]).unwrap(), Taps::new());
    let plain = run(Pass::default());
    let tapped = run(Pass { controls: Some(&controls), taps: Some(&taps), ..Pass::default() });
    assert!(plain.iter().zip(&tapped).all(|(a, b)| said(a) == said(b)));
    let seen = taps.take();
    assert!(
        seen.len() > 1
            && seen.iter().all(|(_, x)| x.count_nonzero(0).sum(tch::Kind::Int64).int64_value(&[]) == 0)
    );
}

#[test]
fn listeners_end_and_cancel() {
    let (lm, none, prompts) = (table(7, 1), TokenControls::new(), vec![vec![0, 3], vec![0, 2, 4]]);
    let run = |eos: &[i64], stop: i64| {
        let mut told = Told { stop: vec![stop], ..Told::new(2) };
        search(0.3, 4).run(&Task { max_new_tokens: 9, eos, ..task(&lm, &prompts, &none) }, &mut told).unwrap()
    };
    let mut stops = 0;
    for token in 2..7 {
        for (ended, stopped) in run(&[token], -1).iter().zip(&run(&[], token)) {
            assert_eq!(said(ended), said(stopped));
            assert_eq!(ended.finish == Finish::Eos(token), stopped.finish == Finish::Stopped);
            stops += usize::from(stopped.finish == Finish::Stopped);
        }
    }
    assert!(stops > 0);
    let mut told = Told { cancel_at: 3, ..Told::new(2) };
    let task = Task { max_new_tokens: 9, eos: &[], ..task(&lm, &prompts, &none) };
    let found = search(0.3, 4).run(&task, &mut told).unwrap();
    assert!(found.iter().all(|h| h.ids.len() == 3 && h.finish == Finish::Cancelled));
}

#[test]
fn what_cannot_be_run_is_refused() {
    for (alpha, k) in [(-0.1, 4), (1.1, 4), (f64::NAN, 4), (0.5, 0)] {
        assert!(matches!(ContrastiveSearch::new(alpha, k), Err(Error::Value { .. })));
    }
    let (lm, none, prompts) = (table(6, 1), TokenControls::new(), [vec![0], vec![0, 2]]);
    let run = |lm: &dyn LanguageModel, controls: &TokenControls, k, n| {
        search(0.5, k).run(&Task { n, ..task(lm, &prompts, controls) }, &mut ())
    };
    assert!(run(&lm, &none, 4, 2).unwrap_err().to_string().contains("n, completions of each prompt"));
    assert!(run(&lm, &none, usize::MAX, 1).unwrap_err().to_string().contains("1048576"));
    let banned = TokenControls::new().with(Suppress::new(0..6).unwrap());
    let error = run(&lm, &banned, 4, 1).unwrap_err();
    assert!(matches!(error, Error::AllBanned { row: 0, step: 0 }), "{error}");
    let nan = lm.map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    assert!(matches!(run(&*nan, &none, 4, 1), Err(Error::NotFinite { .. })));

    // Each token is read, so that the last position is the last token's.
    let config = TableLmConfig { vocab: 6, context: 5, seed: 11, ..TableLmConfig::default() };
    let lm = TableLm::new(&config).unwrap();
    let controls = TokenControls::new().with(Suppress::new([EOS]).unwrap());
    for (prompt, ids) in [(vec![0, 2, 3], 2), (vec![0, 2, 3, 4, 5], 0)] {
        let long = Task { max_new_tokens: usize::MAX, ..task(&lm, std::slice::from_ref(&prompt), &controls) };
        let found = search(0.5, 3).run(&long, &mut ()).unwrap();
        assert_eq!((found[0].ids.len(), &found[0].finish), (ids, &Finish::Context));
    }
    let none = Task { max_new_tokens: 0, ..task(&lm, &prompts, &controls) };
    assert_eq!(search(0.5, 3).run(&none, &mut ()).unwrap()[0].finish, Finish::Length);
}
