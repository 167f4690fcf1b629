//! What is trained: named f32 leaves, and what sets groups of them apart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use tch::{Kind, Tensor};

use super::Gradients;
use crate::checkpoint::{TensorInfo, TensorSource};
use crate::{Error, Result};

/// How a parameter is trained. Parameters with the same options are what other libraries call a parameter group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Group {
    /// What the learning rate is multiplied by; ≥ 0. Default 1.
    pub rate: f64,
    /// The weight decay, ≥ 0; `None` for the optimizer's own.
    pub weight_decay: Option<f64>,
    /// Whether it stays as it is: it gets no gradient, and no state.
    pub frozen: bool,
    /// Whether weight decay leaves alone those rows (the first dimension) whose gradient is 0: the tokens of an
    /// embedding table that were not in the batch. Otherwise all words that a small data set lacks fade.
    pub decay_touched_rows: bool,
}

impl Default for Group {
    fn default() -> Self {
        Self { rate: 1.0, weight_decay: None, frozen: false, decay_touched_rows: false }
    }
}

/// A parameter.
pub struct Parameter {
    /// Its name, of which there is one.
    pub name: String,
    /// Its value: a leaf in f32. It is changed in place, so every handle of it sees the change.
    pub value: Tensor,
    /// How it is trained.
    pub group: Group,
}

/// Named f32 leaves, in a fixed order.
///
/// A leaf is held in f32 whatever the model computes in: the steps of training are smaller than the distance between
/// two numbers of bf16, and a parameter in it would not move. Models that compute in bf16 take copies in the graph
/// ([`Parameters::to_kind`]), through which gradients reach the leaves.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::train::{AdamW, AdamWConfig, Optimizer, Parameters, Schedule};
/// use tch::{Kind, Tensor, kind::FLOAT_CPU};
///
/// let weight = Tensor::zeros([1, 3], FLOAT_CPU).set_requires_grad(true);
/// let parameters = Parameters::new(vec![("weight".into(), weight.shallow_clone())])?;
/// let mut optimizer = AdamW::new(&parameters, AdamWConfig::default())?;
/// let schedule = Schedule::linear(0.1, 100)?.with_warmup(10)?;
///
/// let x = Tensor::from_slice2(&[[1f32, 0., 2.], [0., 1., 1.], [1., 1., 0.], [2., 1., 1.]]);
/// let y = x.matmul(&Tensor::from_slice(&[1f32, -2., 0.5]).view([3, 1]));
/// for step in 0..100 {
///     let loss = (x.matmul(&weight.tr()) - &y).square().mean(Kind::Float);
///     let mut gradients = parameters.gradients(&loss)?;
///     gradients.clip_norm(1.0)?;
///     optimizer.step(&gradients, schedule.at(step))?;
/// }
/// let loss = (x.matmul(&weight.tr()) - &y).square().mean(Kind::Float);
/// assert!(loss.double_value(&[]) < 0.01);
/// # Ok(())
/// # }
/// ```
pub struct Parameters {
    id: u64,
    all: Vec<Parameter>,
    index: Arc<BTreeMap<String, usize>>,
}

impl Parameters {
    /// Parameters that are all trained alike.
    ///
    /// # Errors
    /// As [`grouped`](Self::grouped).
    pub fn new(named: Vec<(String, Tensor)>) -> Result<Self> {
        Self::grouped(named, |_, _| Group::default())
    }

    /// Parameters, each with the options that `group` gives for its name and value.
    ///
    /// # Errors
    /// [`Error::Value`] if there are none, for a name or a tensor that is there twice, for a tensor that is no leaf or,
    /// if it is not frozen, requires no gradients, and for options outside their ranges; [`Error::Kind`] for a tensor
    /// that is not f32.
    pub fn grouped(
        named: Vec<(String, Tensor)>,
        mut group: impl FnMut(&str, &Tensor) -> Group,
    ) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        if named.is_empty() {
            return Err(Error::value("parameters", "one at least", "none"));
        }
        let (mut names, mut places) = (BTreeMap::new(), BTreeMap::new());
        let mut all = Vec::with_capacity(named.len());
        for (number, (name, value)) in named.into_iter().enumerate() {
            let group = check(&name, &value, group(&name, &value))?;
            if names.insert(name.clone(), number).is_some() {
                return Err(Error::value("names of parameters", "each once", format!("`{name}` twice")));
            }
            if value.numel() > 0
                && let Some(other) = places.insert(value.data_ptr() as usize, name.clone())
            {
                let found = format!("`{other}` and `{name}` lie in the same place");
                return Err(Error::value("parameters", "each tensor once", found));
            }
            all.push(Parameter { name, value, group });
        }
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), all, index: Arc::new(names) })
    }

    /// Another handle of the same parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        let share = |Parameter { name, value, group }: &Parameter| Parameter {
            name: name.clone(),
            value: value.shallow_clone(),
            group: *group,
        };
        Self { id: self.id, all: self.all.iter().map(share).collect(), index: Arc::clone(&self.index) }
    }

    /// The parameters, in their order.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.all.iter()
    }

    /// The parameter of this name.
    pub fn find(&self, name: &str) -> Option<&Parameter> {
        self.index.get(name).and_then(|&at| self.all.get(at))
    }

    /// How many parameters there are: at least one.
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// How many numbers are trained.
    pub fn trainable(&self) -> usize {
        self.all.iter().filter(|parameter| !parameter.group.frozen).map(|p| p.value.numel()).sum()
    }

    /// Names and values, handles of the leaves.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.all.iter().map(|p| (p.name.clone(), p.value.shallow_clone())).collect()
    }

    /// Copies in another floating-point type, in the graph: gradients flow through them to the leaves. So a model
    /// computes in bf16 with parameters in f32: in each pass it is run with copies made in that pass.
    ///
    /// # Errors
    /// [`Error::Kind`] for what is no floating-point type.
    pub fn to_kind(&self, kind: Kind) -> Result<Vec<(String, Tensor)>> {
        if !matches!(kind, Kind::BFloat16 | Kind::Half | Kind::Float | Kind::Double) {
            let (what, expected) = ("copies of parameters".into(), "a floating-point type".into());
            return Err(Error::Kind { what, expected, found: format!("{kind:?}") });
        }
        self.all.iter().map(|p| Ok((p.name.clone(), p.value.f_to_kind(kind)?))).collect()
    }

    /// ∇ `loss`, at all parameters that are not frozen. The graph is used up.
    ///
    /// # Errors
    /// Those of [`Gradients::of`].
    pub fn gradients(&self, loss: &Tensor) -> Result<Gradients> {
        Gradients::of(loss, self)
    }

    /// Tells these parameters and their handles from all others.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

/// A model is loaded from its parameters as from a file, but in the graph: gradients flow through all that the loader makes
/// of them (another element type, another layout, several joined to one) back to the leaves. So whatever can be loaded can
/// be trained: it is loaded anew in each step.
impl TensorSource for Parameters {
    fn what(&self) -> String {
        "parameters in training".into()
    }

    fn names(&self) -> Vec<String> {
        self.all.iter().map(|parameter| parameter.name.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let value = &self.find(name)?.value;
        Some(TensorInfo { shape: value.size(), kind: Kind::Float })
    }

    fn read(&self, name: &str, into: &mut Tensor) -> Result<()> {
        let missing = || Error::format(self.what(), format!("no tensor `{name}`"));
        let value = &self.find(name).ok_or_else(missing)?.value;
        if value.size() != into.size() {
            return Err(Error::shape(
                format!("parameter `{name}`"),
                format!("{:?}", value.size()),
                &into.size(),
            ));
        }
        into.f_copy_(value)?;
        Ok(())
    }
}

fn check(name: &str, value: &Tensor, group: Group) -> Result<Group> {
    let what = || format!("parameter `{name}`");
    if !value.defined() {
        return Err(Error::value(what(), "a tensor", "an undefined one"));
    }
    let kind = value.f_kind()?;
    if kind != Kind::Float {
        return Err(Error::Kind { what: what(), expected: "Float".into(), found: format!("{kind:?}") });
    }
    if !value.f_is_leaf()? {
        return Err(Error::value(what(), "a leaf", "the result of a computation"));
    }
    if !group.frozen && !value.requires_grad() {
        return Err(Error::value(
            what(),
            "a leaf that requires gradients, or is frozen",
            "one that requires none",
        ));
    }
    let in_range = |what: &str, value: f64| {
        if value.is_finite() && value >= 0.0 {
            return Ok(());
        }
        Err(Error::value(format!("parameter `{name}`: {what}"), "a finite number ≥ 0", value))
    };
    in_range("rate", group.rate)?;
    in_range("weight decay", group.weight_decay.unwrap_or(0.0))?;
    if group.decay_touched_rows && value.dim() < 2 {
        return Err(Error::shape(
            format!("{}, whose rows are told apart", what()),
            "[rows, ..]",
            &value.size(),
        ));
    }
    Ok(group)
}
