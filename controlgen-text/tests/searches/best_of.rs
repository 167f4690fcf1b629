//! The best of n samples.

use controlgen_core::energy::{Energy, Text};
use controlgen_core::{Error, TokenControls};
use controlgen_text::controls::{NoRepeatNgram, Suppress};
use controlgen_text::search::{BestOf, Choice, Finish, Hypothesis, Search, Task};
use tch::{Kind, Tensor};

use crate::told::Told;
use crate::{PROMPT, all, p_value, said, table, task};

fn fives(hypothesis: &Hypothesis) -> f64 {
    hypothesis.ids.iter().filter(|&&id| id == 5).count() as f64
}

/// The samples are those of sampling, and what is given are the best of them, in order.
#[test]
fn the_best_samples_are_given() {
    let (lm, prompts) = (table(7, 3), vec![vec![0, 3], vec![0, 2, 4, 5, 3], vec![0]]);
    let controls = TokenControls::new().with(NoRepeatNgram::new(3).unwrap());
    let task = Task { max_new_tokens: 8, n: 3, ..task(&lm, &prompts, &controls) };
    let drawn = Choice::Sample { seed: 4, first: 0 }.run(&Task { n: 9, ..task }, &mut ()).unwrap();
    let mean =
        |h: &Hypothesis| h.score / (h.ids.len() + usize::from(matches!(h.finish, Finish::Eos(_)))) as f64;
    let energy = Energy::from_fn(|x: &Text| {
        let Text::Hard { ids, keep } = x else { panic!("token ids") };
        let fives = ids.eq(5).logical_and(keep.as_ref().unwrap());
        Ok(-fives.sum_dim_intlist(&[1i64][..], false, Kind::Double))
    });
    let best_of = || BestOf::new(9, 4).unwrap();
    type Way<'a> = (BestOf, &'a dyn Fn(&Hypothesis) -> f64);
    let ways: [Way<'_>; 3] =
        [(best_of(), &mean), (best_of().by_energy(energy), &fives), (best_of().by(|h| Ok(fives(h))), &fives)];
    for (search, score) in ways {
        let mut told = Told::new(3);
        let found = search.run(&task, &mut told).unwrap();
        assert_eq!(found.len(), 9);
        for (prompt, found) in found.chunks(3).enumerate() {
            let mut of_prompt: Vec<&Hypothesis> = drawn[9 * prompt..9 * prompt + 9].iter().collect();
            of_prompt.sort_by(|a, b| score(b).total_cmp(&score(a)));
            for (k, (found, expected)) in found.iter().zip(of_prompt).enumerate() {
                assert_eq!((found.prompt, found.sample), (prompt, k));
                assert_eq!((said(found), &found.finish), (said(expected), &expected.finish));
                assert!((found.score - score(expected)).abs() < 1e-9);
            }
        }
    }
}

/// The best of n by a score without ties has the distribution of a maximum: P(at most as good)ⁿ.
#[test]
fn the_winner_has_the_distribution_of_a_maximum() {
    let (lm, prompts, none) = (table(4, 5), [PROMPT.to_vec()], TokenControls::new());
    let rank = |ids: &[i64]| ids.iter().fold(1.0, |sum, &id| sum * 4.0 + id as f64);
    let mut each = all(&lm, true, &|_, _| ());
    each.sort_by(|a, b| rank(&a.0).total_cmp(&rank(&b.0)));
    let mut below = 0.0f64;
    let expected: Vec<(Vec<i64>, f64)> = each
        .into_iter()
        .map(|(ids, log_p)| {
            let upto = below + log_p.exp();
            let p = upto.powi(4) - below.powi(4);
            below = upto;
            (ids, p)
        })
        .collect();
    let draw = |seed| {
        let search = BestOf::new(4, seed).unwrap().by(move |h| Ok(rank(&said(h))));
        said(&search.run(&task(&lm, &prompts, &none), &mut ()).unwrap()[0])
    };
    let p = p_value(&(0..4000).map(draw).collect::<Vec<_>>(), &expected);
    println!("p = {p:.3}");
    assert!(p > 0.001, "{p}");
}

#[test]
fn what_cannot_be_run_is_refused() {
    assert!(matches!(BestOf::new(0, 1), Err(Error::Value { .. })));
    let (lm, none, prompts) = (table(6, 1), TokenControls::new(), [vec![0], vec![0, 2]]);
    let run = |search: BestOf, controls: &TokenControls, n| {
        search.run(&Task { n, ..task(&lm, &prompts, controls) }, &mut ()).unwrap_err()
    };
    let few = || BestOf::new(4, 1).unwrap();
    let many = run(few(), &none, 5).to_string();
    assert!(many.contains("at most num_samples = 4") && many.contains('5'), "{many}");
    assert!(run(BestOf::new(usize::MAX, 1).unwrap(), &none, 1).to_string().contains("num_samples"));
    for bad in [f64::NAN, f64::INFINITY] {
        let error =
            run(few().by(move |h| Ok(if h.prompt == 1 && h.sample == 2 { bad } else { 0.0 })), &none, 1);
        assert!(error.to_string().contains("sample 2 of prompt 1"), "{error}");
    }
    let error = run(few().by_energy(Energy::from_fn(|_: &Text| Ok(Tensor::from(1.0)))), &none, 1);
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let banned = TokenControls::new().with(Suppress::new(0..6).unwrap());
    assert!(matches!(run(few(), &banned, 1), Error::AllBanned { .. }));
    // What is never wanted comes last, and is given all the same.
    let worst = few().by(|_| Ok(f64::NEG_INFINITY));
    let found = worst.run(&task(&lm, &prompts, &none), &mut ()).unwrap();
    assert!(found.iter().all(|h| h.score == f64::NEG_INFINITY) && found.len() == 2);
}
