//! Adapters against peft's logits, and its directories both ways.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{ADAPTERS, Cases, difference, folder, logits, model};
use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_peft::open;

#[test]
fn logits_equal_pefts() {
    let mut worst: f64 = 0.0;
    for name in ADAPTERS {
        let cases = Cases::open(name);
        let lm = model(&cases.model());
        let adapter = open(folder(name), lm.sites()).unwrap_or_else(|error| panic!("{name}: {error}"));
        for case in ["plain", "left"] {
            let (ids, keep, expected) = cases.case(case);
            let diff = difference(&logits(&*lm, &[&*adapter], &ids, keep.as_ref()), &expected);
            assert!(diff <= 1e-4, "{name}, {case}: {diff}");
            worst = worst.max(diff);
            // Without the adapter it is another model.
            assert!(difference(&logits(&*lm, &[], &ids, keep.as_ref()), &expected) > 0.1, "{name}");
        }
    }
    println!("largest difference from peft: {worst:.2e}");
}

/// What is written is what was read: the same names, shapes and bits; the same logits.
#[test]
fn directories_go_both_ways() {
    for name in ADAPTERS {
        let cases = Cases::open(name);
        let lm = model(&cases.model());
        let adapter = open(folder(name), lm.sites()).unwrap();
        let temporary = tempfile::tempdir().unwrap();
        let written = temporary.path().join("deep/adapter");
        adapter.save(&written).unwrap();
        let [theirs, ours] = [folder(name), written.clone()]
            .map(|at| Safetensors::open(at.join("adapter_model.safetensors")).unwrap());
        let sorted = |file: &Safetensors| {
            let mut names = file.names();
            names.sort();
            names.into_iter().map(|name| (file.info(&name), name)).collect::<Vec<_>>()
        };
        assert_eq!(sorted(&theirs), sorted(&ours), "{name}");
        assert_eq!(ours.metadata("format").unwrap().as_deref(), Some("pt"));
        let again = open(&written, lm.sites()).unwrap();
        for ((_, a), (key, b)) in adapter.parameters().iter().zip(again.parameters()) {
            assert!(a.equal(&b), "{name}: {key}");
        }
        let (ids, keep, _) = cases.case("left");
        let [a, b] = [&adapter, &again].map(|it| logits(&*lm, &[&**it], &ids, keep.as_ref()));
        assert!(a.equal(&b), "{name}: what the configuration says was lost");
        // Nothing but the two files is left behind.
        assert_eq!(std::fs::read_dir(&written).unwrap().count(), 2, "{name}");
    }
}
