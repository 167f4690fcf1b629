//! Running a stack of guidance around a denoiser.

use tch::{Kind, Tensor};

use super::outputs::describe;
use super::{Branch, Grad, Guidance, Guided, Memory, Outputs, Step, in_stage};
use crate::energy::checks;
use crate::{
    Condition, Controls, Denoiser, EnableGrad, Error, Lane, Lanes, Pass, Prediction, Prepared, Result,
};

/// A denoiser, its conditions, and a stack of guidance: from (x, step) to a [`Guided`] prediction.
///
/// Conditions are numbered as [`Branch::condition`] names them; each is one for all samples, or one a sample. Graphs
/// are numbered too: each is a stack of controls under which the conditions are prepared once, when it is added.
/// Where samples are made together, an edit along with its source, x has rows of several *roles*
/// ([`Guider::with_roles`]). What changes from step to step is in [`GuiderRun`].
pub struct Guider {
    denoiser: Box<dyn Denoiser>,
    base: Branch,
    roles: u32,
    stages: Vec<Box<dyn Guidance>>,
    conditions: Vec<Condition>,
    /// For each numbered condition its range of `conditions`, which are the rows of what is prepared.
    ranges: Vec<(i64, usize)>,
    graphs: Vec<Graph>,
}

/// A stack of controls, and the conditions prepared under it.
struct Graph {
    controls: Option<Controls>,
    prepared: Prepared,
}

/// What one sampling run keeps from step to step: the stages' memories, and the rows of conditions last used.
#[derive(Default)]
pub struct GuiderRun {
    memories: Vec<Memory>,
    selected: Vec<Option<(Vec<i64>, Prepared)>>,
}

/// What all stages together need in a step.
struct Plan {
    branches: Vec<Branch>,
    grad: Grad,
}

impl Guider {
    /// A denoiser under `controls`, which are graph 0, with no stage around it: its prediction is that of condition
    /// `base`. `conditions[i]` is condition i: one entry for all samples, or one a row of x.
    ///
    /// # Errors
    /// [`Error::Value`] for no conditions, or a `base` that is none of them; those of [`Denoiser::prepare`].
    pub fn new(
        denoiser: Box<dyn Denoiser>,
        conditions: Vec<Vec<Condition>>,
        controls: Option<Controls>,
        base: u32,
    ) -> Result<Self> {
        let (mut ranges, mut flat) = (Vec::new(), Vec::new());
        for (i, condition) in conditions.into_iter().enumerate() {
            if condition.is_empty() {
                return Err(Error::value(format!("entries of condition {i}"), "one, or one a sample", 0));
            }
            ranges.push((i64::try_from(flat.len()).unwrap_or(i64::MAX), condition.len()));
            flat.extend(condition);
        }
        if usize::try_from(base).map_or(true, |base| base >= ranges.len()) {
            return Err(Error::value("base condition", format!("0 .. {}", ranges.len()), base));
        }
        let base = Branch::of(base);
        let mut guider = Self {
            denoiser,
            base,
            roles: 1,
            stages: Vec::new(),
            conditions: flat,
            ranges,
            graphs: Vec::new(),
        };
        guider.push_graph(controls)?;
        Ok(guider)
    }

    /// Adds a stage, which acts after those already there.
    #[must_use]
    pub fn with(mut self, stage: impl Guidance + 'static) -> Self {
        self.stages.push(Box::new(stage));
        self
    }

    /// Rows of x are of `roles` roles, all of the first before all of the second: row r · S + s of S samples is role r
    /// of sample s. A condition may then have an entry a role, and the [`Lane`] of a row has the sample s and the
    /// condition c · roles + r for a branch of condition c. With roles source and edit, and branches 0
    /// (unconditional) and 1, the lanes' conditions are \[unconditional source, unconditional edit, source, edit\].
    ///
    /// # Errors
    /// [`Error::Value`] for no roles.
    pub fn with_roles(self, roles: u32) -> Result<Self> {
        if roles == 0 {
            return Err(Error::value("roles", ">= 1", roles));
        }
        Ok(Self { roles, ..self })
    }

    /// Adds another graph: the denoiser under these controls. Graphs are numbered in the order of their adding,
    /// from 1.
    ///
    /// # Errors
    /// [`Error::ForeignSites`]; those of [`Denoiser::prepare`].
    pub fn with_graph(mut self, controls: Option<Controls>) -> Result<Self> {
        self.push_graph(controls)?;
        Ok(self)
    }

    fn push_graph(&mut self, controls: Option<Controls>) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        let pass = Pass { controls: controls.as_ref(), ..Pass::default() };
        pass.check_sites(self.denoiser.sites())?;
        let prepared = self.denoiser.prepare(&self.conditions, &pass)?;
        let rows = i64::try_from(self.conditions.len()).unwrap_or(i64::MAX);
        if prepared.rows() != rows {
            return Err(Error::value("rows that the denoiser prepared", rows, prepared.rows()));
        }
        self.graphs.push(Graph { controls, prepared });
        Ok(())
    }

    /// Another handle over the same storage, for another thread.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn handle(&self) -> Result<Self> {
        let graph = |graph: &Graph| -> Result<Graph> {
            let all: Vec<i64> = (0..graph.prepared.rows()).collect();
            let controls = graph.controls.as_ref().map(Controls::handle);
            Ok(Graph { controls, prepared: graph.prepared.select(&all)? })
        };
        Ok(Self {
            denoiser: (*self.denoiser).handle(),
            base: self.base,
            roles: self.roles,
            stages: self.stages.iter().map(|stage| (**stage).handle()).collect(),
            conditions: self.conditions.iter().map(Condition::handle).collect(),
            ranges: self.ranges.clone(),
            graphs: self.graphs.iter().map(graph).collect::<Result<_>>()?,
        })
    }

    /// The denoiser.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// Begins a run, once every step's plan is known to be possible: nothing is computed before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a stage that needs a branch which cannot be given, naming both.
    pub fn start(&self, steps: &[Step]) -> Result<GuiderRun> {
        steps.iter().try_for_each(|step| self.plan(step).map(drop))?;
        Ok(GuiderRun {
            memories: self.stages.iter().map(|_| Memory::default()).collect(),
            selected: self.graphs.iter().map(|_| None).collect(),
        })
    }

    /// All that is needed in this step, each branch once, the base first.
    fn plan(&self, step: &Step) -> Result<Plan> {
        let mut plan = Plan { branches: vec![self.base], grad: Grad::None };
        for stage in &self.stages {
            let needs = stage.needs(step);
            plan.grad = plan.grad.max(needs.grad);
            for branch in needs.branches {
                self.check(branch, stage.name())?;
                if !plan.branches.contains(&branch) {
                    plan.branches.push(branch);
                }
            }
        }
        Ok(plan)
    }

    fn check(&self, branch: Branch, stage: &str) -> Result<()> {
        let condition = usize::try_from(branch.condition).unwrap_or(usize::MAX);
        let refuse = |why: String| {
            Err(Error::unsupported(format!("{stage}: the branch of {}", describe(branch)), why))
        };
        if condition >= self.ranges.len() {
            return refuse(format!("conditions 0 .. {}", self.ranges.len()));
        }
        match self.graphs.get(usize::from(branch.graph)) {
            None => refuse(format!("graphs 0 .. {}", self.graphs.len())),
            Some(graph) if branch.variant > 0 && graph.controls.as_ref().is_none_or(Controls::is_empty) => {
                refuse("variants under controls; this graph has none, so that all variants are equal".into())
            }
            Some(_) => Ok(()),
        }
    }

    /// The guided prediction for x `[B, ..]`: one call of the denoiser for each graph that the step needs.
    ///
    /// Nothing is recorded of it for the caller's gradients; those that stages need are turned on and off here.
    ///
    /// # Errors
    /// Those of [`Self::start`] and [`Denoiser::predict`]; [`Error::Value`] where a condition is neither one for all
    /// nor one a row or role; [`Error::ForeignState`] for a run of another guider; the stages' own.
    /// [`Error::NotFinite`] of a stage names stage, rows and step.
    pub fn predict(&self, x: &Tensor, step: &Step, run: &mut GuiderRun) -> Result<Guided> {
        if run.memories.len() != self.stages.len() || run.selected.len() != self.graphs.len() {
            return Err(Error::ForeignState { expected: "a run that this guider started" });
        }
        checks::floating("sample", x)?;
        let _no_gradients = tch::no_grad_guard();
        let shape = x.size();
        let mut x = x.f_detach()?;
        for stage in &self.stages {
            x = stage.before(step, x).map_err(|error| in_stage(error, &**stage, step))?;
            if x.size() != shape {
                let what = format!("{}: the sample", stage.name());
                return Err(Error::shape(what, format!("{shape:?}"), &x.size()));
            }
        }
        let plan = self.plan(step)?;
        let _gradients = (plan.grad != Grad::None).then(EnableGrad::new);
        let leaf = match plan.grad {
            Grad::None => x.shallow_clone(),
            Grad::AtX | Grad::ThroughDenoiser => x.f_detach()?.f_set_requires_grad(true)?,
        };
        let mut predictions = Vec::with_capacity(plan.branches.len());
        for graph in 0..self.graphs.len() {
            let of_graph = |branch: &&Branch| usize::from(branch.graph) == graph;
            let branches: Vec<Branch> = plan.branches.iter().filter(of_graph).copied().collect();
            if !branches.is_empty() {
                let made = self.run(&leaf, step, &branches, plan.grad, &mut run.selected[graph])?;
                predictions.extend(branches.into_iter().zip(made));
            }
        }
        let late = |x: &Tensor, branch: Branch| -> Result<Prediction> {
            self.check(branch, "a late prediction")?;
            let mut made = self.run(x, step, &[branch], plan.grad, &mut None)?;
            Ok(made.swap_remove(0))
        };
        let out = Outputs::new(leaf, predictions).with_late(&late);
        let prediction = out.base()?.handle();
        let mut guided = Guided { x: out.x().shallow_clone(), prediction, shift: None };
        for (stage, memory) in self.stages.iter().zip(&mut run.memories) {
            let made = stage.guide(step, &out, guided, memory).and_then(|guided| {
                guided.prediction.check(&x)?;
                match &guided.shift {
                    Some(shift) if shift.size() != shape => {
                        Err(Error::shape("shift", format!("{shape:?}"), &shift.size()))
                    }
                    _ => Ok(guided),
                }
            });
            guided = made.map_err(|error| in_stage(error, &**stage, step))?;
        }
        let shift = guided.shift.as_ref().map(Tensor::f_detach).transpose()?;
        Ok(Guided { x, prediction: guided.prediction.detach()?, shift })
    }

    /// One call of the denoiser for these branches, which are of one graph: rows are branch by branch.
    fn run(
        &self,
        x: &Tensor,
        step: &Step,
        branches: &[Branch],
        grad: Grad,
        selected: &mut Option<(Vec<i64>, Prepared)>,
    ) -> Result<Vec<Prediction>> {
        let _no_gradients = (grad != Grad::ThroughDenoiser).then(tch::no_grad_guard);
        let (Some(&batch), Some(first)) = (x.size().first(), branches.first()) else {
            return Err(Error::shape("sample", "[B, ..]", &x.size()));
        };
        let Some(graph) = self.graphs.get(usize::from(first.graph)) else {
            return Err(Error::value("graph", format!("0 .. {}", self.graphs.len()), first.graph));
        };
        let roles = i64::from(self.roles);
        if batch % roles != 0 {
            let expected = format!("a multiple of {roles}, the number of roles");
            return Err(Error::value("rows of the sample", expected, batch));
        }
        let samples = batch.div_euclid(roles);
        let number = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
        let (mut rows, mut lanes) = (Vec::new(), Vec::new());
        for branch in branches {
            for row in 0..batch {
                let (role, sample) = (row.div_euclid(samples), row % samples);
                rows.push(self.row(branch.condition, row, role, batch)?);
                let condition = branch.condition.saturating_mul(self.roles).saturating_add(number(role));
                lanes.push(Lane { sample: number(sample), condition, variant: branch.variant });
            }
        }
        let prepared = match selected {
            Some((of, prepared)) if *of == rows => prepared,
            _ => {
                let prepared = graph.prepared.select(&rows)?;
                &mut selected.insert((rows, prepared)).1
            }
        };
        let lanes = Lanes::new(lanes);
        let pass = Pass {
            controls: graph.controls.as_ref(),
            lanes: Some(&lanes),
            step: step.index,
            ..Pass::default()
        };
        let n = i64::try_from(branches.len()).unwrap_or(i64::MAX);
        let xs = if n == 1 { x.shallow_clone() } else { Tensor::f_cat(&vec![x; branches.len()], 0)? };
        let t = Tensor::f_full([batch * n], step.timestep, (Kind::Double, x.device()))?;
        let prediction = self.denoiser.predict(&xs, &t, prepared, &pass)?;
        prediction.check(&xs)?;
        prediction.chunk(n)
    }

    /// The row of the prepared conditions for a row of x.
    fn row(&self, condition: u32, row: i64, role: i64, batch: i64) -> Result<i64> {
        let (first, len) = self.ranges[usize::try_from(condition).unwrap_or(usize::MAX)];
        match i64::try_from(len) {
            Ok(1) => Ok(first),
            Ok(len) if len == batch => Ok(first + row),
            Ok(len) if len == i64::from(self.roles) => Ok(first + role),
            _ => {
                let of_roles = if self.roles > 1 {
                    format!("1, {} or {batch}", self.roles)
                } else {
                    format!("1 or {batch}")
                };
                Err(Error::value(format!("entries of condition {condition}"), of_roles, len))
            }
        }
    }
}
