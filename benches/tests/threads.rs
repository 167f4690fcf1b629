//! Handles of one model on many threads: the right answers, and one set of weights.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Barrier;
use std::thread;

use benches::device_suite::random_llama;
use controlgen_core::{LanguageModel, Placement, TokenControls};
use controlgen_text::controls::NoRepeatNgram;
use controlgen_text::search::{Choice, Search, Task};

const THREADS: i64 = 8;

/// Megabytes of memory that this process holds.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// What the model says after a prompt of the thread's own, under a control, and how probable it is.
fn answer(model: &dyn LanguageModel, controls: &TokenControls, thread: i64) -> (Vec<i64>, f64) {
    let prompts = [(0..20).map(|i| (thread * 4099 + i * 7919).rem_euclid(49152)).collect::<Vec<i64>>()];
    let pass = controlgen_core::Pass::default();
    let task = Task { lm: model, prompts: &prompts, controls, pass, max_new_tokens: 3, eos: &[], n: 1 };
    let found = Choice::Greedy.run(&task, &mut ()).unwrap().remove(0);
    (found.ids, found.score)
}

#[test]
#[cfg(target_os = "linux")]
fn eight_threads_share_one_set_of_weights() {
    let before = resident();
    let model = random_llama::open(Placement::CPU).unwrap();
    let controls = TokenControls::new().with(NoRepeatNgram::new(2).unwrap());
    let alone: Vec<_> = (0..THREADS).map(|thread| answer(&*model, &controls, thread)).collect();
    let (weights, one) = (134_515_008.0 * 4.0 / 1048576.0, resident());
    assert!(one - before > 0.9 * weights, "the weights are there: {before:.0} to {one:.0} MB");

    let barrier = Barrier::new(usize::try_from(THREADS).unwrap());
    let together: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                // A handle each: made here, sent there.
                let (model, controls, barrier) = (model.handle(), controls.clone(), &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    answer(&*model, &controls, thread)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for ((ids, score), (expected, expected_score)) in together.iter().zip(&alone) {
        assert_eq!(ids, expected);
        assert!((score - expected_score).abs() < 1e-3, "{score} {expected_score}");
    }
    assert!(alone.iter().any(|answer| answer.0 != alone[0].0), "different prompts, different answers");
    let eight = resident();
    println!("{before:.0} MB before, {one:.0} MB with one handle, {eight:.0} MB with eight on eight threads");
    // What they need beside the weights: caches, activations, stacks, the allocator's arenas.
    assert!(eight - one < 0.5 * weights, "{one:.0} MB with one handle, {eight:.0} MB with eight");
}
