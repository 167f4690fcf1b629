//! Progress token by token against texts read whole.

use proptest::prelude::*;

use super::*;

/// Which clauses will hold, and which will not, whatever comes: looked for in all continuations of four pieces.
fn fates(formula: &[Vec<Lit>], prompt: &str, new: &str) -> (Vec<usize>, Vec<usize>) {
    let mut always = vec![true; formula.len()];
    let mut never = vec![true; formula.len()];
    let mut all = vec![new.to_owned()];
    for _ in 0..5 {
        for text in &all {
            let unmet = unmet(formula, prompt, text);
            for i in 0..formula.len() {
                let holds = !unmet.contains(&i);
                always[i] &= holds;
                never[i] &= !holds;
            }
        }
        all = all
            .iter()
            .flat_map(|text| ["a", "b", " ", "ab", " a", " b"].map(|piece| text.clone() + piece))
            .collect();
    }
    let list = |of: Vec<bool>| (0..formula.len()).filter(|&i| of[i]).collect();
    (list(always), list(never))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn progress_is_what_the_text_says(
        which in 0..formulas().len(),
        prompt in prop::collection::vec(2..7i64, 0..3),
        tokens in prop::collection::vec(2..7i64, 0..8),
    ) {
        let formula = &formulas()[which];
        let clauses = clauses(formula);
        let mut progress = clauses.start(&prompt);
        let before = text(&prompt);
        for said in 0..=tokens.len() {
            let new = text(&tokens[..said]);
            let expected = unmet(formula, &before, &new);
            let held: Vec<usize> = clauses.ended(&progress).0.iter().collect();
            let expected_held: Vec<usize> = (0..formula.len()).filter(|i| !expected.contains(i)).collect();
            prop_assert_eq!(&held, &expected_held, "{:?} after {:?}", new, before);
            prop_assert_eq!(clauses.unmet_after(&before, &new), expected);
            let (won, lost) = fates(formula, &before, &new);
            prop_assert_eq!(progress.won().iter().collect::<Vec<_>>(), won, "won: {:?} after {:?}", new, before);
            prop_assert_eq!(progress.lost().iter().collect::<Vec<_>>(), lost, "lost: {:?} after {:?}", new, before);
            // After each token, by the moves as by the token.
            for step in clauses.moves(&progress).iter() {
                let mut after = progress.clone();
                clauses.advance(&mut after, step.token);
                prop_assert_eq!(clauses.after(&progress, step), after);
            }
            if let Some(&token) = tokens.get(said) {
                clauses.advance(&mut progress, token);
            }
        }
    }
}

#[test]
fn clauses_are_written_as_they_are_meant() {
    let formula =
        [vec![Most(0, "a"), Least(1, "b")], vec![Least(2, "a")], vec![Most(3, "b"), Before("a", "b")]];
    let shown: Vec<String> = formula.iter().map(|clause| made(clause).to_string()).collect();
    assert_eq!(shown, ["!a or b", "a at least 2 times", "b at most 3 times or a before b"]);
    assert_eq!(Clause::any(["!a", "b"]), made(&formula[0]));
    assert_eq!(Clause::from("!a"), made(&[Most(0, "a")]));
}
