//! Contracts are tested by implementers that break them: each of them once, in the clause that is named.
#![allow(clippy::unwrap_used, clippy::panic)]

mod adapter;
mod denoiser;
mod encoder;
mod energy;
mod guidance;
mod language_model;
mod token_control;

use controlgen_core::testing::contract::{Violation, clauses};

/// Demands that each of these implementers be caught by its clause, and that no clause be without one.
fn all_caught(contract: &str, broken: &[(&'static str, Result<(), Violation>)]) {
    for (clause, result) in broken {
        match result {
            Ok(()) => panic!("{contract}: what breaks `{clause}` passed"),
            Err(violation) => {
                assert_eq!((violation.contract, violation.clause), (contract, *clause), "{violation}");
            }
        }
    }
    let all = clauses().into_iter().find(|(name, _)| *name == contract).unwrap().1;
    for clause in &all {
        assert!(broken.iter().any(|(of, _)| of == clause), "{contract}: nothing breaks `{clause}`");
    }
    println!("{contract}: {} clauses, {} broken implementers", all.len(), broken.len());
}

#[test]
fn a_violation_reads_as_a_sentence() {
    let violation = Violation {
        contract: "energy",
        clause: "rows",
        expected: "one number a row".into(),
        found: "two".into(),
    };
    let text = "contract `energy`, clause `rows`: expected one number a row; found two";
    assert_eq!((violation.to_string(), format!("{violation:?}")), (text.to_owned(), text.to_owned()));
}
