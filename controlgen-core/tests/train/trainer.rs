//! The loop: what a step is, what stops it, what is refused.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::train::{
    Best, Checkpoint, Schedule, Spikes, StepReport, Summary, Trainer, TrainerConfig,
};
use controlgen_core::{Error, Result};

use crate::toy::{STEPS, Toy, config, plain, trainer};

fn run(trainer: &mut Trainer, toy: &mut Toy) -> Result<Summary> {
    trainer.run(toy, &mut (), &CancelToken::new())
}

/// Runs to the end and gives the parameters.
fn end(mut toy: Toy, config: TrainerConfig) -> Vec<u32> {
    let mut trainer = trainer(&toy, "AdamW", config);
    assert!(run(&mut trainer, &mut toy).unwrap().finished);
    toy.bits()
}

#[test]
fn a_step_of_several_batches_is_that_of_one_large_batch() {
    let ends = [(12, 1), (4, 3), (5, 3)].map(|(batch_size, accumulation)| {
        let mut toy = Toy::new();
        // Noise is drawn batch by batch; without it the loss is a mean over the examples.
        let config = TrainerConfig { batch_size, accumulation, spikes: None, ..plain() };
        let mut trainer = trainer(&toy, "SGD", config);
        let mut losses = Vec::new();
        let mut watch = |report: &StepReport| {
            losses.push(report.loss);
            Flow::Continue
        };
        toy.noise = 0.0;
        trainer.run(&mut toy, &mut watch, &CancelToken::new()).unwrap();
        (losses, toy)
    });
    let [(large, one), (summed, three), (_, other)] = &ends;
    for (a, b) in large.iter().zip(summed) {
        assert!((a - b).abs() < 1e-6 * a.abs(), "{a} and {b}");
    }
    assert!(one.table.allclose(&three.table, 1e-5, 1e-6, false));
    assert!(!one.table.allclose(&other.table, 1e-5, 1e-6, false), "steps of 15 examples");
    // 50 examples in steps of 12: the fifth takes two, and the sixth begins a new epoch.
    let of = |step: u64| -> Vec<usize> {
        one.asked.iter().filter(|(s, _)| *s == step).flat_map(|(_, e)| e.clone()).collect()
    };
    assert_eq!((of(3).len(), of(4).len(), of(5).len()), (12, 2, 12));
    let mut epoch: Vec<usize> = (0..5).flat_map(of).collect();
    epoch.sort_unstable();
    assert!(epoch.into_iter().eq(0..50));
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    assert_eq!(end(Toy::new(), plain()), end(Toy::new(), plain()));
    assert_ne!(end(Toy::new(), plain()), end(Toy::new(), TrainerConfig { seed: 12, ..plain() }));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_at_the_last_checkpoint() {
    let whole = tempfile::tempdir().unwrap();
    let expected = end(Toy::new(), config(whole.path()));
    for (wrong, found) in [(f64::NAN, "NaN"), (f64::INFINITY, "infinity")] {
        let parts = tempfile::tempdir().unwrap();
        let mut toy = Toy::new();
        toy.factor = Box::new(move |step| if step == 12 { wrong } else { 1.0 });
        let mut trainer = trainer(&toy, "AdamW", config(parts.path()));
        let error = run(&mut trainer, &mut toy).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }));
        let text = format!("loss: {found} at step 12 (the run is back at its checkpoint after 10 steps)");
        assert_eq!(error.to_string(), text);
        assert_eq!(trainer.steps_done(), 10);
        let saved = Checkpoint::open(parts.path().join("last.safetensors")).unwrap();
        let table = &saved.parameters().into_iter().find(|(name, _)| name == "table").unwrap().1;
        assert!(table.equal(&toy.table));
        // What was wrong is put right, and it goes on as if nothing had been.
        toy.factor = Box::new(|_| 1.0);
        assert!(run(&mut trainer, &mut toy).unwrap().finished);
        assert_eq!(toy.bits(), expected);
    }
}

#[test]
fn without_a_checkpoint_a_loss_that_is_no_number_moves_nothing() {
    let reference = end(Toy::new(), TrainerConfig { steps: 7, ..plain() });
    let mut toy = Toy::new();
    toy.factor = Box::new(|step| if step == 7 { f64::NAN } else { 1.0 });
    let mut trainer = trainer(&toy, "AdamW", plain());
    assert_eq!(run(&mut trainer, &mut toy).unwrap_err().to_string(), "loss: NaN at step 7");
    assert_eq!((toy.bits(), trainer.steps_done()), (reference, 7));
}

#[test]
fn a_gradient_that_is_no_number_moves_nothing() {
    let mut toy = Toy::new();
    toy.infinite_gradient = Some(3);
    let mut trainer = trainer(&toy, "AdamW", TrainerConfig { clip_value: None, ..plain() });
    let error = run(&mut trainer, &mut toy).unwrap_err().to_string();
    assert!(error.starts_with("norm of the gradients: ") && error.ends_with(" at step 3"), "{error}");
    assert_eq!(toy.bits(), end(Toy::new(), TrainerConfig { steps: 3, clip_value: None, ..plain() }));
}

#[test]
fn a_spike_is_skipped_and_counted() {
    let spiked = || {
        let mut toy = Toy::new();
        toy.factor = Box::new(|step| if step == 9 || step == 15 { 1e4 } else { 1.0 });
        toy
    };
    let mut toy = spiked();
    let mut trainer = trainer(&toy, "AdamW", plain());
    let mut skipped = Vec::new();
    let (mut before, mut moved) = (Vec::new(), Vec::new());
    let table = toy.table.shallow_clone();
    let mut watch = |report: &StepReport| {
        let now: Vec<f32> = Vec::try_from(table.detach().view([-1])).unwrap();
        if report.skipped {
            skipped.push(report.step);
            moved.push(now != before);
        }
        before = now;
        Flow::Continue
    };
    let summary = trainer.run(&mut toy, &mut watch, &CancelToken::new()).unwrap();
    assert_eq!((summary.skipped, summary.finished), (2, true));
    assert_eq!((skipped, moved), (vec![9, 15], vec![false, false]));

    let mut toy = spiked();
    let stop = Spikes { stop_after: Some(2), ..plain().spikes.unwrap() };
    let mut trainer = crate::toy::trainer(&toy, "AdamW", TrainerConfig { spikes: Some(stop), ..plain() });
    let error = run(&mut trainer, &mut toy).unwrap_err().to_string();
    assert!(error.starts_with("loss at step 15: ") && error.ends_with("spike number 2"), "{error}");
}

#[test]
fn a_run_that_is_stopped_is_saved_and_goes_on() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = end(Toy::new(), config(whole.path()));
    let mut toy = Toy::new();
    let mut first = trainer(&toy, "AdamW", config(parts.path()));
    assert!(!first.resume(&toy).unwrap(), "there is nothing yet");
    let mut watch = |report: &StepReport| {
        assert!(report.rate > 0.0 && report.steps == STEPS);
        if report.step == 6 { Flow::Stop } else { Flow::Continue }
    };
    let summary = first.run(&mut toy, &mut watch, &CancelToken::new()).unwrap();
    assert_eq!((summary.steps, summary.finished), (7, false));

    let mut toy = Toy::new();
    let mut second = trainer(&toy, "AdamW", config(parts.path()));
    assert!(second.resume(&toy).unwrap());
    let cancel = CancelToken::new();
    cancel.cancel();
    assert_eq!(second.run(&mut toy, &mut (), &cancel).unwrap().steps, 8);

    let mut toy = Toy::new();
    let mut third = trainer(&toy, "AdamW", config(parts.path()));
    assert!(third.resume(&toy).unwrap());
    let summary = run(&mut third, &mut toy).unwrap();
    assert!(summary.finished);
    assert_eq!(toy.bits(), expected);
    let read = |directory: &Path, name: &str| std::fs::read(directory.join(name)).unwrap();
    for name in ["last.safetensors", "best.safetensors", "train.csv", "evaluation.csv"] {
        assert!(read(whole.path(), name) == read(parts.path(), name), "{name}");
    }
    // All is done: nothing more to do.
    assert_eq!(run(&mut third, &mut toy).unwrap().steps, STEPS);
    // A run that begins anew does not write over it.
    let error = run(&mut trainer(&toy, "AdamW", config(parts.path())), &mut toy).unwrap_err();
    assert!(error.to_string().contains("or `resume`"), "{error}");
}

#[test]
fn the_best_evaluation_is_kept_with_its_averages() {
    let directory = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    let mut trainer = trainer(&toy, "AdamW", config(directory.path()));
    let mut evaluations = Vec::new();
    let mut watch = |report: &StepReport| {
        evaluations.extend(report.evaluation.as_ref().map(|found| (report.step + 1, found[0].1)));
        Flow::Continue
    };
    let summary = trainer.run(&mut toy, &mut watch, &CancelToken::new()).unwrap();
    assert_eq!(evaluations.len(), 8);
    let lowest = *evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(summary.best, Some(lowest));
    let best = Checkpoint::open(directory.path().join("best.safetensors")).unwrap();
    assert_eq!(best.step(), lowest.0);
    best.load_into(&toy.parameters()).unwrap();
    let again = controlgen_core::train::Task::evaluate(&mut toy).unwrap();
    assert_eq!(again[0].1, lowest.1, "the averages are what was evaluated");

    let csv = std::fs::read_to_string(directory.path().join("train.csv")).unwrap();
    assert!(csv.starts_with("step,epoch,loss,gradient_norm,learning_rate,skipped,twice\n0,0,"));
    assert_eq!(csv.lines().count() as u64, STEPS + 1);

    let config = TrainerConfig { best: Some(Best::Highest("other".into())), ..plain() };
    let mut toy = Toy::new();
    let error = run(&mut crate::toy::trainer(&toy, "AdamW", config), &mut toy).unwrap_err();
    assert!(error.to_string().contains("`other` among them"), "{error}");
}

#[test]
fn another_run_is_refused_and_the_differences_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    run(&mut trainer(&toy, "AdamW", TrainerConfig { steps: 5, ..config(directory.path()) }), &mut toy)
        .unwrap();
    let refused = |toy: Toy, kind: &str, config: TrainerConfig| {
        let before = toy.bits();
        let mut trainer = trainer(&toy, kind, config);
        let error = trainer.resume(&toy).unwrap_err();
        assert_eq!((toy.bits(), trainer.steps_done()), (before, 0));
        error
    };
    let config = || config(directory.path());
    let differing = TrainerConfig { seed: 5, batch_size: 8, ..config() };
    match refused(Toy::new(), "AdamW", differing) {
        Error::Config { field, expected, found, .. } => {
            assert_eq!(field, "trainer.batch_size`, `trainer.seed");
            assert_eq!((expected.as_str(), found.as_str()), ("4, 11", "8, 5"));
        }
        other => panic!("{other}"),
    }
    let schedule = Schedule::cosine(0.02, STEPS).unwrap().with_warmup(3).unwrap();
    let error = refused(Toy::new(), "AdamW", TrainerConfig { schedule, ..config() }).to_string();
    assert!(error.contains("`trainer.schedule.peak`: expected 0.03, found 0.02"), "{error}");
    let error = refused(Toy::new(), "SGD", config()).to_string();
    assert!(error.contains("optimizer.AdamW.beta1") && error.contains("optimizer.SGD.momentum"), "{error}");
    let error = refused(Toy { name: "other", ..Toy::new() }, "AdamW", config()).to_string();
    assert!(error.contains("`task.name`: expected \"toy\", found \"other\""), "{error}");
    let error = refused(Toy { examples: 49, ..Toy::new() }, "AdamW", config()).to_string();
    assert!(error.contains("`examples`: expected 50, found 49"), "{error}");

    // Other parameters.
    let mut toy = Toy::new();
    toy.unused = tch::Tensor::zeros([4], tch::kind::FLOAT_CPU).set_requires_grad(true);
    assert!(matches!(refused(toy, "AdamW", config()), Error::Shape { .. }));
    let mut toy = Toy::new();
    toy.unused_name = "renamed";
    match refused(toy, "AdamW", config()) {
        Error::Keys { missing, unexpected, .. } => {
            assert_eq!((missing, unexpected), (vec!["renamed".into()], vec!["unused".into()]));
        }
        other => panic!("{other}"),
    }

    // What does not change the numbers of a step may be another.
    let mut toy = Toy::new();
    let config = TrainerConfig { steps: 9, save_every: None, evaluate_every: Some(1), ..config() };
    let mut trainer = trainer(&toy, "AdamW", config);
    assert!(trainer.resume(&toy).unwrap());
    assert_eq!(run(&mut trainer, &mut toy).unwrap().steps, 9);
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("last.safetensors");
    let mut toy = Toy::new();
    run(&mut trainer(&toy, "AdamW", TrainerConfig { steps: 5, ..config(directory.path()) }), &mut toy)
        .unwrap();
    let whole = std::fs::read(&path).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let record = file.metadata("controlgen.training").unwrap().unwrap();
    let tensors: Vec<_> = file
        .names()
        .into_iter()
        .map(|name| (name.clone(), crate::common::read(&file, &name, file.info(&name).unwrap().kind)))
        .collect();
    drop(file);
    let refused = || {
        let toy = Toy::new();
        let before = toy.bits();
        let mut trainer = trainer(&toy, "AdamW", config(directory.path()));
        let error = trainer.resume(&toy).unwrap_err();
        assert_eq!((toy.bits(), trainer.steps_done()), (before, 0));
        error
    };
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(refused(), Error::Format { .. }));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(refused(), Error::Format { .. }));
    let with = |record: &str, drop: &str| {
        let tensors: Vec<_> = tensors
            .iter()
            .filter(|(name, _)| name != drop)
            .map(|(n, t)| (n.clone(), t.shallow_clone()))
            .collect();
        save(&path, &tensors, &[("controlgen.training", record)]).unwrap();
        refused()
    };
    save(&path, &tensors, &[]).unwrap();
    assert!(matches!(refused(), Error::Format { .. }));
    assert!(matches!(with("{", ""), Error::Format { .. }));
    assert!(matches!(with("{\"version\": 1}", ""), Error::Format { .. }));
    assert!(matches!(with(&record.replace("\"step\":5", "\"step\":-5"), ""), Error::Format { .. }));
    assert!(matches!(with(&record.replace("\"version\":1", "\"version\":2"), ""), Error::Unsupported { .. }));
    assert!(matches!(with(&record, "parameter.table"), Error::Keys { .. }));
    assert!(matches!(with(&record, "optimizer.exp_avg.table"), Error::Keys { .. }));
    assert!(matches!(with(&record, "ema.average.table"), Error::Keys { .. }));
    assert!(matches!(with(&record, "trainer.losses"), Error::Format { .. }));
    std::fs::write(&path, &whole).unwrap();
    let toy = Toy::new();
    assert!(trainer(&toy, "AdamW", config(directory.path())).resume(&toy).unwrap());
}

#[test]
fn settings_and_tasks_that_make_no_sense_are_refused() {
    let refused = |config: TrainerConfig| {
        let toy = Toy::new();
        assert!(matches!(Trainer::boxed(config, toy.optimizer("SGD")), Err(Error::Value { .. })));
    };
    refused(TrainerConfig { batch_size: 0, ..plain() });
    refused(TrainerConfig { accumulation: 0, ..plain() });
    refused(TrainerConfig { clip_norm: Some(0.0), ..plain() });
    refused(TrainerConfig { clip_value: Some(f64::NAN), ..plain() });
    refused(TrainerConfig { evaluate_every: Some(0), ..plain() });
    refused(TrainerConfig { evaluate_every: None, ..plain() });
    refused(TrainerConfig { save_every: Some(1), ..plain() });
    refused(TrainerConfig { spikes: Some(Spikes { least: 1, ..Spikes::default() }), ..plain() });
    refused(TrainerConfig { spikes: Some(Spikes { factor: 0.0, ..Spikes::default() }), ..plain() });

    let mut toy = Toy { examples: 0, ..Toy::new() };
    let error = run(&mut trainer(&toy, "SGD", plain()), &mut toy).unwrap_err();
    assert_eq!(error.to_string(), "examples to train on: expected at least one, found 0");
    let mut toy = Toy { examples: 5, ..Toy::new() };
    let error =
        run(&mut trainer(&toy, "SGD", TrainerConfig { drop_last: true, ..plain() }), &mut toy).unwrap_err();
    assert!(matches!(error, Error::Value { .. }));
    let toy = Toy::new();
    assert!(matches!(trainer(&toy, "SGD", plain()).resume(&toy), Err(Error::Value { .. })));
    assert_eq!(plain().steps_an_epoch(50), 5);
    assert_eq!(TrainerConfig { drop_last: true, ..plain() }.steps_an_epoch(50), 4);
}

#[test]
fn a_directory_that_cannot_be_written_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let mut toy = Toy::new();
    let error = run(&mut trainer(&toy, "SGD", config(&file.join("below"))), &mut toy).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn tables_are_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    run(&mut trainer(&toy, "SGD", config(directory.path())), &mut toy).unwrap();
    let path = controlgen_core::train::plot(directory.path()).unwrap();
    let svg = std::fs::read_to_string(path).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for name in ["loss", "gradient_norm", "learning_rate", "twice", "held_out"] {
        assert!(svg.lines().any(|line| line.trim() == name), "{name}");
    }
    assert_eq!(svg.matches("#E6194B").count(), 4, "a line for each column of the training");
    assert_eq!(svg.matches("<circle").count(), 8, "one dot an evaluation");
    for wrong in ["step,loss\n0,x\n", "step,loss\n0,1,2\n"] {
        std::fs::write(directory.path().join("train.csv"), wrong).unwrap();
        assert!(matches!(controlgen_core::train::plot(directory.path()), Err(Error::Format { .. })));
    }
    std::fs::remove_file(directory.path().join("train.csv")).unwrap();
    assert!(matches!(controlgen_core::train::plot(directory.path()), Err(Error::Io { .. })));
}
