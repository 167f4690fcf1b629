//! The loss that classifiers are trained by, and how many they get right.

use controlgen_core::train::{Batch, Group, Loss, Parameters, Task};
use controlgen_core::{Error, Result};
use tch::{Kind, Reduction, Tensor};

/// Maximum likelihood: −log p(y | x), the mean over a batch, of whatever gives logits. A [`Task`] for
/// [`Trainer`](controlgen_core::train::Trainer), whose metric is the accuracy.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::progress::CancelToken;
/// use controlgen_core::train::{AdamW, AdamWConfig, Schedule, Trainer, TrainerConfig};
/// use controlgen_text::classifiers::{CrossEntropy, Head, trainable};
/// use tch::Tensor;
///
/// let features = Tensor::from_slice2(&[[0f32, 1.], [1., 0.], [0.2, 0.9], [0.8, 0.1]]);
/// let head = Head::new(2, None, 2, 0)?;
/// head.standardise(&features)?;
/// let mut task = CrossEntropy::new(vec![0, 1, 0, 1], |rows: &[i64]| {
///     head.logits(&features.f_index_select(0, &Tensor::f_from_slice(rows)?)?)
/// });
/// let optimizer = AdamW::new(&trainable(head.parameters())?, AdamWConfig::default())?;
/// let config = TrainerConfig::new(50, 4, Schedule::constant(0.1)?);
/// Trainer::new(config, optimizer)?.run(&mut task, &mut (), &CancelToken::new())?;
/// assert_eq!(head.logits(&features)?.argmax(-1, false), Tensor::from_slice(&[0i64, 1, 0, 1]));
/// # Ok(())
/// # }
/// ```
pub struct CrossEntropy<F> {
    labels: Vec<i64>,
    logits: F,
    evaluation: Option<Evaluation>,
}

type Evaluation = Box<dyn FnMut() -> Result<Vec<(String, f64)>>>;

impl<F: FnMut(&[i64]) -> Result<Tensor>> CrossEntropy<F> {
    /// Of examples with these labels; `logits` gives the logits `[B, K]` of the examples whose numbers it is given.
    pub fn new(labels: Vec<i64>, logits: F) -> Self {
        Self { labels, logits, evaluation: None }
    }

    /// What is measured on other texts from time to time, by name.
    #[must_use]
    pub fn evaluated(mut self, by: impl FnMut() -> Result<Vec<(String, f64)>> + 'static) -> Self {
        self.evaluation = Some(Box::new(by));
        self
    }
}

impl<F: FnMut(&[i64]) -> Result<Tensor>> Task for CrossEntropy<F> {
    fn examples(&self) -> usize {
        self.labels.len()
    }

    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss> {
        let rows: Vec<i64> = batch.examples.iter().map(|&i| i as i64).collect();
        let labels: Vec<i64> = batch.examples.iter().map(|&i| self.labels[i]).collect();
        let logits = (self.logits)(&rows)?;
        let accuracy = accuracy(&logits, &labels)?;
        let labels = Tensor::f_from_slice(&labels)?.f_to_device(logits.device())?;
        let value = logits.f_cross_entropy_loss(&labels, None::<Tensor>, Reduction::Mean, -100, 0.0)?;
        Ok(Loss { value, metrics: vec![("accuracy".into(), accuracy)] })
    }

    fn evaluate(&mut self) -> Result<Vec<(String, f64)>> {
        self.evaluation.as_mut().map_or(Ok(Vec::new()), |evaluate| evaluate())
    }
}

/// The share of rows of logits `[B, K]` whose largest is the label's.
///
/// # Errors
/// [`Error::Shape`] for logits that are not one row a label; [`Error::Value`] for no labels and for one that is no class.
pub fn accuracy(logits: &Tensor, labels: &[i64]) -> Result<f64> {
    let &[rows, classes] = logits.size().as_slice() else {
        return Err(Error::shape("logits of classes", "[B, K]", &logits.size()));
    };
    if labels.is_empty() {
        return Err(Error::value("labels", "at least one", "none"));
    }
    if rows != labels.len() as i64 {
        return Err(Error::shape(
            "logits of classes",
            format!("[{}, {classes}]", labels.len()),
            &logits.size(),
        ));
    }
    if let Some(bad) = labels.iter().find(|label| !(0..classes).contains(*label)) {
        return Err(Error::value("label", format!("0 .. {classes}"), bad));
    }
    let best = logits.f_detach()?.f_argmax(-1, false)?.f_to_device(tch::Device::Cpu)?;
    let right = best.f_eq_tensor(&Tensor::f_from_slice(labels)?)?;
    Ok(right.f_to_kind(Kind::Double)?.f_mean(None::<Kind>)?.f_double_value(&[])?)
}

/// Parameters as an optimizer takes them: those that ask for no gradient are frozen, biases do not decay.
///
/// # Errors
/// Those of [`Parameters::grouped`].
pub fn trainable(named: Vec<(String, Tensor)>) -> Result<Parameters> {
    Parameters::grouped(named, |_, value| {
        let weight_decay = (value.dim() < 2).then_some(0.0);
        Group { frozen: !value.requires_grad(), weight_decay, ..Group::default() }
    })
}
