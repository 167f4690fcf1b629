//! A trainer's checkpoints: saving, and exact resuming.

use tch::Tensor;

use super::checkpoint::{Checkpoint, Record};
use super::metrics::Metrics;
use super::{Best, Ema, StepReport, Task, Trainer};
use crate::checkpoint::remove_left;
use crate::energy::checks::finite;
use crate::{Error, Result, copy_parameters};

const LAST: &str = "last.safetensors";
const BEST: &str = "best.safetensors";

impl Trainer {
    /// Takes up the run whose last checkpoint lies in the directory, exactly: the steps that follow are, on the CPU, to
    /// the bit those of a run that was not interrupted. Says whether there was one. How many steps the run has, what is
    /// evaluated and how often it is saved may be others than before.
    ///
    /// # Errors
    /// [`Error::Value`] without a directory; those of [`Checkpoint::open`]; [`Error::Config`] for a run with other
    /// settings, data or options of parameters, naming the differences; [`Error::Keys`] and [`Error::Shape`] for other
    /// parameters. After an error nothing has changed.
    pub fn resume(&mut self, task: &dyn Task) -> Result<bool> {
        let directory = self.config.directory.as_ref();
        let path =
            directory.ok_or_else(|| Error::value("directory", "one, to resume from", "none"))?.join(LAST);
        if !path.exists() {
            return Ok(false);
        }
        let checkpoint = Checkpoint::open(path)?;
        checkpoint.same_parameters(self.optimizer.parameters())?;
        checkpoint.same_configuration(&self.configuration(task))?;
        self.take_up(&checkpoint)?;
        Ok(true)
    }

    /// What follows a step: evaluation, rows of the tables, checkpoints.
    pub(super) fn after(
        &mut self,
        task: &mut dyn Task,
        report: &mut StepReport,
        tables: &mut Option<Metrics>,
    ) -> Result<()> {
        let due = |every: Option<u64>| every.is_some_and(|every| self.step.is_multiple_of(every));
        let (evaluate, save) = (due(self.config.evaluate_every), due(self.config.save_every));
        if evaluate || (self.config.evaluate_every.is_some() && self.step == self.config.steps) {
            report.evaluation = Some(self.evaluate(task)?);
        }
        if let Some(tables) = tables {
            tables.add(report)?;
        }
        if let Some(found) = &report.evaluation
            && self.is_best(found)?
        {
            self.save_as(task, BEST)?;
        }
        if save { self.save(task) } else { Ok(()) }
    }

    /// Writes the last checkpoint.
    pub(super) fn save(&mut self, task: &dyn Task) -> Result<()> {
        self.save_as(task, LAST)?;
        self.saved = Some(self.step);
        Ok(())
    }

    /// Writes a checkpoint, if there is a directory.
    fn save_as(&self, task: &dyn Task, name: &str) -> Result<()> {
        let Some(directory) = &self.config.directory else { return Ok(()) };
        let parameters = self.optimizer.parameters();
        for parameter in parameters.iter() {
            let what = format!("parameter `{}` after step {}", parameter.name, self.step);
            finite(&what, &parameter.value.f_detach()?)?;
        }
        let list = |name: &str, values: &[f64]| -> Result<_> {
            Ok((name.to_owned(), Tensor::f_from_slice(values)?))
        };
        let best: Vec<f64> = self.best.iter().map(|(_, value)| *value).collect();
        let parts = [
            ("parameter", parameters.named()),
            ("optimizer", self.optimizer.state()?),
            ("ema", self.ema.as_ref().map(Ema::state).transpose()?.unwrap_or_default()),
            (
                "trainer",
                vec![list("losses", &self.last[0])?, list("norms", &self.last[1])?, list("best", &best)?],
            ),
        ];
        let best = self.best.map(|(step, _)| step);
        let record = Record::new(self.step, self.skipped, best, self.configuration(task));
        Checkpoint::write(&directory.join(name), &record, parts)
    }

    /// Whether an evaluation is the best so far, which is remembered.
    fn is_best(&mut self, found: &[(String, f64)]) -> Result<bool> {
        let Some(best) = &self.config.best else { return Ok(false) };
        let (Best::Highest(name) | Best::Lowest(name)) = best;
        let value = found.iter().find(|(other, _)| other == name).map(|(_, value)| *value);
        let value = value.ok_or_else(|| {
            let names: Vec<&String> = found.iter().map(|(name, _)| name).collect();
            Error::value("metrics of an evaluation", format!("`{name}` among them"), format!("{names:?}"))
        })?;
        let better = is_better(best, value, self.best.map(|(_, value)| value));
        if better {
            self.best = Some((self.step, value));
        }
        Ok(better)
    }

    fn evaluate(&mut self, task: &mut dyn Task) -> Result<Vec<(String, f64)>> {
        let _no_gradients = tch::no_grad_guard();
        match &mut self.ema {
            Some(ema) => ema.with_averages(|| task.evaluate()),
            None => task.evaluate(),
        }
    }

    /// The run's tables, with the rows of the steps done.
    pub(super) fn metrics(&self) -> Result<Option<Metrics>> {
        let Some(directory) = &self.config.directory else { return Ok(None) };
        std::fs::create_dir_all(directory).map_err(|error| Error::io(directory, error))?;
        if self.saved.is_none() && directory.join(LAST).exists() {
            let found = format!("`{LAST}` in {}", directory.display());
            return Err(Error::value(
                "directory",
                "one without the checkpoint of another run, or `resume`",
                found,
            ));
        }
        for name in [LAST, BEST] {
            remove_left(&directory.join(name))?;
        }
        Metrics::open(directory, self.step).map(Some)
    }

    /// What stops a run. Where a number was none, and there is a checkpoint, the run goes back to it.
    pub(super) fn stopped(&mut self, error: Error) -> Error {
        let (Error::NotFinite { what, at, found }, Some(step), Some(directory)) =
            (&error, self.saved, &self.config.directory)
        else {
            return error;
        };
        let back = Checkpoint::open(directory.join(LAST)).and_then(|last| self.take_up(&last));
        match back {
            Ok(()) => Error::NotFinite {
                what: what.clone(),
                at: format!("{at} (the run is back at its checkpoint after {step} steps)"),
                found: found.clone(),
            },
            Err(_) => error,
        }
    }

    /// What decides which numbers the steps compute, and what the parameters are.
    fn configuration(&self, task: &dyn Task) -> serde_json::Value {
        let groups: serde_json::Map<_, _> = (self.optimizer.parameters().iter())
            .map(|parameter| (parameter.name.clone(), serde_json::json!(parameter.group)))
            .collect();
        serde_json::json!({
            "trainer": self.config.json(),
            "optimizer": self.optimizer.configuration(),
            "parameters": groups,
            "examples": task.examples(),
            "task": task.configuration(),
        })
    }

    /// Makes this run what the checkpoint says. Nothing changes unless all fits.
    fn take_up(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let last = [checkpoint.numbers("trainer.losses")?, checkpoint.numbers("trainer.norms")?];
        let best = checkpoint.numbers("trainer.best")?.first().copied();
        let optimizer = self.optimizer.state()?;
        let averages = self.ema.as_ref().map(Ema::state).transpose()?;
        let all = |trainer: &mut Self| {
            trainer.optimizer.load_state(checkpoint.part("optimizer"))?;
            if let Some(ema) = &mut trainer.ema {
                ema.load_state(checkpoint.part("ema"))?;
            }
            let to = trainer.optimizer.parameters().named();
            copy_parameters(&checkpoint.what(), &checkpoint.parameters(), &to)
        };
        if let Err(error) = all(self) {
            self.optimizer.load_state(optimizer)?;
            if let (Some(ema), Some(averages)) = (&mut self.ema, averages) {
                ema.load_state(averages)?;
            }
            return Err(error);
        }
        let record = &checkpoint.record;
        (self.step, self.skipped, self.last) = (record.step, record.skipped, last);
        (self.best, self.saved) = (record.best.zip(best), Some(record.step));
        Ok(())
    }
}

/// Whether an evaluation is better than the best so far.
fn is_better(best: &Best, value: f64, so_far: Option<f64>) -> bool {
    match (best, so_far) {
        (_, None) => !value.is_nan(),
        (Best::Highest(_), Some(so_far)) => value > so_far,
        (Best::Lowest(_), Some(so_far)) => value < so_far,
    }
}
