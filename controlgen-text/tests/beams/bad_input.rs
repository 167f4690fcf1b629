//! What cannot be searched.

use controlgen_core::{Error, LanguageModel, TokenControls};
use controlgen_text::controls::Suppress;
use controlgen_text::search::{BeamSearch, DiverseBeamSearch, Task};

use crate::{Search, table, task};

#[test]
fn parameters_out_of_their_ranges() {
    let beams = |n| BeamSearch::new(n);
    assert!(matches!(beams(0), Err(Error::Value { .. })));
    for bad in [f64::NAN, f64::INFINITY, -50.1, 50.1] {
        assert!(matches!(beams(2).unwrap().length_penalty(bad), Err(Error::Value { .. })), "{bad}");
    }
    for (groups, penalty) in [(0, 1.0), (1, 1.0), (3, 1.0), (8, 1.0), (2, 0.0), (2, -1.0), (2, f64::NAN)] {
        let made = DiverseBeamSearch::new(beams(4).unwrap(), groups, penalty);
        assert!(matches!(made, Err(Error::Value { .. })), "{groups}, {penalty}");
    }
    assert!(DiverseBeamSearch::new(beams(4).unwrap(), 4, 1e300).is_ok());
}

#[test]
fn tasks_that_cannot_be_run() {
    let (lm, none) = (table(6, 1), TokenControls::new());
    for search in [Search::beams(4), Search::groups(4, 2, 0.5)] {
        let refused = |prompts: &[Vec<i64>], n, eos: &[i64]| {
            search.run(&Task { n, eos, ..task(&lm, prompts, &none) }, &mut ()).unwrap_err()
        };
        assert!(matches!(refused(&[], 1, &[]), Error::Value { .. }));
        assert!(matches!(refused(&[vec![]], 1, &[]), Error::Value { .. }));
        assert!(matches!(refused(&[vec![0, 6]], 1, &[]), Error::Value { .. }));
        assert!(matches!(refused(&[vec![0]], 0, &[]), Error::Value { .. }));
        assert!(matches!(refused(&[vec![0]], 1, &[6]), Error::Value { .. }));
        assert!(matches!(refused(&[vec![0; 65]], 1, &[]), Error::Context { limit: 64, needed: 65 }));
        let many = refused(&[vec![0]], 5, &[]).to_string();
        assert!(many.contains("at most num_beams = 4") && many.contains('5'), "{many}");
        // The whole vocabulary ends hypotheses.
        let (all, prompts) = ([0, 1, 2, 3, 4, 5], [vec![0]]);
        let found = search.run(&Task { eos: &all, n: 4, ..task(&lm, &prompts, &none) }, &mut ()).unwrap();
        assert!(found.iter().all(|h| h.ids.is_empty()) && found.len() == 4, "{found:?}");
    }
    let huge = Search::beams(usize::MAX).run(&task(&lm, &[vec![0]], &none), &mut ()).unwrap_err();
    assert!(huge.to_string().contains("1048576"), "{huge}");
}

#[test]
fn all_banned_names_the_prompt_and_the_step() {
    let (lm, prompts) = (table(6, 1), [vec![0], vec![0, 2]]);
    let controls = TokenControls::new().with(Suppress::new(0..6).unwrap());
    for search in [Search::beams(4), Search::groups(4, 2, 0.5)] {
        let error = search.run(&task(&lm, &prompts, &controls), &mut ()).unwrap_err();
        assert!(matches!(error, Error::AllBanned { row: 0, step: 0 }), "{error}");
    }
}

#[test]
fn weights_that_are_no_numbers() {
    let lm = table(6, 1).map_weights(&mut |_, w| Ok(Some(w * f64::NAN))).unwrap();
    let (prompts, none) = ([vec![0], vec![0, 2]], TokenControls::new());
    let error = Search::beams(3).run(&task(&*lm, &prompts, &none), &mut ()).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert!(error.to_string().contains("prompt 0, step 0"), "{error}");
}
