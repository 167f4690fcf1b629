//! NeuroLogic and grid beam search against all texts that there are.

use controlgen_core::{Pass, TokenControls};
use controlgen_text::controls::NoRepeatNgram;
use controlgen_text::search::{
    BeamSearch, EarlyStopping, Finish, GridBeamSearch, Hypothesis, NeuroLogic, Search, Task,
};

use super::*;

const LENGTH: usize = 4;

fn run(
    lm: &TableLm,
    controls: &TokenControls,
    search: &dyn Search,
    prompts: &[Vec<i64>],
    n: usize,
) -> Vec<Hypothesis> {
    let task = Task { lm, prompts, controls, pass: Pass::default(), max_new_tokens: LENGTH, eos: &[EOS], n };
    search.run(&task, &mut ()).unwrap()
}

fn said(hypothesis: &Hypothesis) -> Vec<i64> {
    let mut ids = hypothesis.ids.clone();
    if let Finish::Eos(token) = hypothesis.finish {
        ids.push(token);
    }
    ids
}

/// All texts for which the formula holds, with their scores, best first.
fn all(lm: &TableLm, prompt: &[i64], formula: &[Vec<Lit>], ngram: bool) -> Vec<(Vec<i64>, f64)> {
    let edit = &mut |said: &[i64], scores: &mut [f64]| {
        let whole = [prompt, said].concat();
        let last = whole[whole.len() - 1];
        if ngram {
            whole.windows(2).filter(|w| w[0] == last).for_each(|w| scores[w[1] as usize] = f64::NEG_INFINITY);
        }
    };
    // Not normalised again: what is left of the model's own probability.
    let mut found: Vec<(Vec<i64>, f64)> = lm
        .enumerate_with(prompt, LENGTH, edit)
        .unwrap()
        .into_iter()
        .map(|(ids, _)| ids)
        .filter(|ids| unmet(formula, &text(prompt), &text(ids)).is_empty())
        .map(|ids| {
            let score = lm.log_prob(prompt, &ids).unwrap() / ids.len() as f64;
            (ids, score)
        })
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found
}

/// With beams for everything, nothing is pruned, and everything is found.
fn wide(clauses: &Clauses) -> [Box<dyn Search>; 3] {
    let beams = BeamSearch::new(7usize.pow(LENGTH as u32)).unwrap().early_stopping(EarlyStopping::Exhausted);
    let patient = NeuroLogic::new(beams, clauses).tolerance(100).gap(0);
    [
        Box::new(patient.clone()),
        Box::new(patient.look_ahead(2, 0.5).unwrap()),
        Box::new(GridBeamSearch::new(beams, clauses)),
    ]
}

#[test]
fn full_width_is_the_enumeration() {
    for (i, formula) in formulas().iter().enumerate() {
        let lm = table(i as u64);
        let clauses = clauses(formula);
        for ngram in [false, true] {
            let controls = if ngram {
                TokenControls::new().with(NoRepeatNgram::new(2).unwrap())
            } else {
                TokenControls::new()
            };
            let expected = all(&lm, &PROMPT, formula, ngram);
            for (which, search) in wide(&clauses).iter().enumerate() {
                let at = format!("{formula:?}, search {which}, n-grams {ngram}");
                let n = expected.len().clamp(1, 300);
                let found = run(&lm, &controls, &**search, &[PROMPT.to_vec()], n);
                if expected.is_empty() {
                    assert!(found.iter().all(|h| !h.unmet.is_empty()), "{at}: {found:?}");
                    continue;
                }
                assert_eq!(found.len(), n, "{at}");
                for (rank, (found, (_, score))) in found.iter().zip(&expected).enumerate() {
                    assert!(found.unmet.is_empty(), "{at}: {found:?}");
                    assert!((found.score - score).abs() < 1e-4, "{at}, rank {rank}: {found:?}, {score}");
                }
                let optimum = &expected[0];
                if expected.get(1).is_none_or(|second| optimum.1 - second.1 > 1e-4) {
                    assert_eq!(said(&found[0]), optimum.0, "{at}");
                }
            }
        }
    }
}

/// The clauses are those of each prompt, and what a batch finds is what each finds alone.
#[test]
fn prompts_have_their_own_clauses() {
    let (lm, none) = (table(3), TokenControls::new());
    let formulas = [formulas()[1].clone(), formulas()[3].clone(), formulas()[6].clone()];
    let sets: Vec<Clauses> = formulas.iter().map(|formula| clauses(formula)).collect();
    let prompts = [vec![0, 2, 3], vec![4], vec![0, 2, 3, 6]];
    let beams = BeamSearch::new(12).unwrap();
    let search = |of: usize| -> [Box<dyn Search>; 3] {
        let sets = if of < sets.len() { vec![sets[of].clone()] } else { sets.clone() };
        let neurologic = NeuroLogic::new(beams, sets.clone()).gap(0);
        [
            Box::new(neurologic.clone()),
            Box::new(neurologic.look_ahead(1, 1.0).unwrap()),
            Box::new(GridBeamSearch::new(beams, sets)),
        ]
    };
    for (which, together) in search(sets.len()).iter().enumerate() {
        let batch = run(&lm, &none, &**together, &prompts, 3);
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = run(&lm, &none, &*search(i)[which], std::slice::from_ref(prompt), 3);
            let of_batch: Vec<&Hypothesis> = batch.iter().filter(|h| h.prompt == i).collect();
            assert_eq!(alone.len(), of_batch.len());
            for (alone, of_batch) in alone.iter().zip(of_batch) {
                assert_eq!((said(alone), &alone.unmet), (said(of_batch), &of_batch.unmet), "search {which}");
                let missing = unmet(&formulas[i], &text(prompt), &text(&alone.ids));
                assert_eq!(missing, alone.unmet, "search {which}");
                assert_eq!(missing, [0; 0], "search {which}: {alone:?}");
            }
        }
        let task = Task {
            lm: &lm,
            prompts: &prompts[..2],
            controls: &none,
            pass: Pass::default(),
            max_new_tokens: 3,
            eos: &[EOS],
            n: 1,
        };
        let error = together.run(&task, &mut ()).unwrap_err().to_string();
        assert!(error.contains("sets of clauses") && error.contains("2, one for each prompt"), "{error}");
    }
}

/// What the length does not allow is said, and the best there is is kept.
#[test]
fn what_cannot_be_met_is_told() {
    let formula = vec![vec![Least(1, "a")], vec![Least(3, "b")], vec![Most(0, "ab")]];
    let (lm, none, clauses) = (table(5), TokenControls::new(), clauses(&formula));
    for search in wide(&clauses) {
        let found = run(&lm, &none, &*search, &[PROMPT.to_vec()], 1);
        assert_eq!(found[0].unmet, [1], "{found:?}");
        assert_eq!(unmet(&formula, &text(&PROMPT), &text(&found[0].ids)), [1]);
    }
}

/// Whoever looks ahead must not first drop those that have just said a word, however unlikely it was.
#[test]
fn looking_ahead_meets_more_with_few_beams() {
    let none = TokenControls::new();
    let clauses = clauses(&[vec![Least(1, "a")], vec![Least(1, "b")]]);
    let table = |seed| {
        let vocab = TOKENS.len() as i64;
        TableLm::new(&TableLmConfig { vocab, seed, scale: 4.0, ..TableLmConfig::default() }).unwrap()
    };
    // Ranked before they are grouped, 57 with three beams.
    for (beams, least) in [(2, 50), (3, 59), (4, 60)] {
        let neurologic = NeuroLogic::new(BeamSearch::new(beams).unwrap(), &clauses).gap(0);
        let met = |search: &NeuroLogic| {
            let met =
                |&seed: &u64| run(&table(seed), &none, search, &[PROMPT.to_vec()], 1)[0].unmet.is_empty();
            (0..60).filter(met).count()
        };
        let (plain, ahead) = (met(&neurologic), met(&neurologic.clone().look_ahead(2, 1.0).unwrap()));
        assert!(ahead > plain && ahead >= least, "{beams} beams: {plain} of 60, {ahead} with look-ahead");
    }
}
