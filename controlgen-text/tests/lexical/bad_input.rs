//! Clauses that are none.

use controlgen_core::{Error, TokenControl};
use controlgen_text::controls::LexicalConstraints;
use controlgen_text::search::{BeamSearch, NeuroLogic};

use super::*;

fn refused(clauses: impl IntoIterator<Item = Clause>) -> String {
    let error = Clauses::new(&trie(), clauses).unwrap_err();
    assert!(matches!(error, Error::Value { .. }), "{error}");
    error.to_string()
}

#[test]
fn empty_ones() {
    assert!(refused([]).contains("1 ..= 128"));
    assert!(refused(vec![Clause::from("a"); 129]).contains("129"));
    assert!(refused([Clause::from("a"), Clause::default()]).contains("literals of clause 1"));
    for bad in ["", " ", "!", "! "] {
        assert!(refused([Clause::from(bad)]).contains("at least one character"), "{bad:?}");
    }
    assert!(Literal::said::<&str>([]).is_err() && Literal::never([" "]).is_err());
    assert!(Literal::at_least(0, ["a"]).is_err() && Literal::at_most(u16::MAX, ["a"]).is_err());
}

#[test]
fn contradictions() {
    for (formula, clause) in [
        (vec![vec![Least(1, "a")], vec![Most(0, "a")]], 1),
        (vec![vec![Least(1, "b")], vec![Least(3, "a")], vec![Most(2, "a")]], 2),
        // Every occurrence of "a b" is one of "b".
        (vec![vec![Most(0, "b")], vec![Least(1, "a b")]], 1),
        (vec![vec![Least(1, "a"), Least(1, "b")], vec![Most(0, "a")], vec![Most(0, "b")]], 2),
        (vec![vec![Before("a", "b")], vec![Before("b", "a")], vec![Least(1, "a")]], 2),
        (vec![vec![Before("a", "b")], vec![Most(0, "a")], vec![Least(1, "b")]], 2),
    ] {
        let error = refused(formula.iter().map(|clause| made(clause)));
        assert!(error.contains(&format!("clause {clause}, `{}`", made(&formula[clause]))), "{error}");
        assert!(error.contains("contradicts"), "{error}");
    }
    // These only look like it.
    clauses(&[vec![Most(0, "a")], vec![Least(1, "ab")]]);
    clauses(&[vec![Before("a", "b")], vec![Before("b", "a")]]);
    clauses(&[vec![Least(1, "a")], vec![Most(0, "a"), Least(1, "b")]]);
    clauses(&[vec![Least(2, "a")], vec![Most(2, "a")]]);
}

#[test]
fn words_that_no_tokens_spell() {
    let error = refused([Clause::from("a"), Clause::any(["c", "abc"])]);
    assert!(error.contains("clause 1") && error.contains("`c or abc`"), "{error}");
    // Not to be said, or not the only way.
    Clauses::new(&trie(), [Clause::any(["!c"]), Clause::any(["c", "ab"])]).unwrap();
}

#[test]
fn parameters_out_of_their_ranges() {
    let clauses = clauses(&formulas()[0]);
    assert!(LexicalConstraints::new(&clauses, []).is_err());
    assert!(LexicalConstraints::new(&clauses, [-1]).is_err());
    let control = LexicalConstraints::new(&clauses, [EOS]).unwrap();
    let neurologic = NeuroLogic::new(BeamSearch::new(2).unwrap(), &clauses);
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(control.clone().reward(bad).is_err(), "{bad}");
        assert!(neurologic.clone().reward(bad).is_err(), "{bad}");
        assert!(neurologic.clone().look_ahead(1, bad).is_err(), "{bad}");
    }
    assert!(neurologic.look_ahead(0, 1.0).is_err());
    let two = LexicalConstraints::new(vec![clauses.clone(), clauses.clone()], [EOS]).unwrap();
    assert!(two.start(&[vec![0]]).is_err());
    let mut state = control.start(&[vec![0]]).unwrap();
    let narrow = tch::Tensor::zeros([1, 3], tch::kind::FLOAT_CPU);
    assert!(matches!(control.score(&mut state, narrow), Err(Error::Value { .. })));
}
