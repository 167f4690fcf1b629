//! Controls that act at sites, inside a forward pass.

use std::sync::atomic::{AtomicU64, Ordering};

use tch::Tensor;

use crate::pass::Pass;
use crate::{Attn, Error, Lanes, Result, Rows, SiteId, SiteMap, is_recording};

/// Where a hook is called: the site, the slot that the control gave it when it was bound, and the pass.
#[derive(Clone, Copy)]
pub struct At<'a> {
    /// The site.
    pub site: SiteId,
    /// The number that the control itself chose in [`Control::bind`], usually an index into its tensors.
    pub slot: usize,
    /// The pass: its lanes, taps and step.
    pub pass: &'a Pass<'a>,
}

/// A function at sites of a model: an adapter, an attention edit, a tap.
///
/// Every method defaults to the identity. A control is an owned handle over shared storage: [`Control::handle`]
/// makes another one, for another stack or thread, in microseconds.
pub trait Control: Send {
    /// Another handle over the same storage.
    fn handle(&self) -> Box<dyn Control>;

    /// Says at which sites it acts; called once for each model. Names are resolved here and nowhere else.
    ///
    /// # Errors
    /// [`Error::NoSite`] for a selector that matches nothing; [`Error::Shape`] where a site's dimensions are not
    /// those of the control's tensors.
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()>;

    /// How many positions it puts before the first token (a prefix): positions then count from there.
    ///
    /// # Errors
    /// The control's own: lanes that it cannot read.
    fn position_offset(&self, lanes: Option<&Lanes>) -> Result<Offset> {
        let _ = lanes;
        Ok(Offset::default())
    }

    /// Before a linear site's product: x `[.., inputs]`.
    ///
    /// # Errors
    /// The control's own.
    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        let _ = at;
        Ok(x)
    }

    /// After a linear site's or a convolution's product y = W x + b.
    ///
    /// # Errors
    /// The control's own.
    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let _ = (at, x);
        Ok(y)
    }

    /// After one product of which several linear sites are the parts (queries, keys and values; gate and up): what
    /// [`Control::linear`] does at each of `parts`, in order; y `[.., Σ outputs]`. A control that can do them together
    /// saves calls.
    ///
    /// # Errors
    /// The control's own.
    fn linear_parts(&self, parts: &[Part<'_>], x: &Tensor, y: Tensor) -> Result<Tensor> {
        part_by_part(self, parts, x, y)
    }

    /// Around an attention: run `next` zero times, once or twice. The control bound last is outermost.
    ///
    /// # Errors
    /// The control's own.
    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> Result<Tensor> {
        let _ = at;
        next.run(attn)
    }

    /// A branch h of the residual stream, before it is added to `residual`.
    ///
    /// # Errors
    /// The control's own.
    fn hidden(&self, at: At<'_>, h: Tensor, residual: &Tensor) -> Result<Tensor> {
        let _ = (at, residual);
        Ok(h)
    }

    /// The embeddings e `[B, T, width]` of `ids` `[B, T]`; no ids where embeddings were given to the model.
    ///
    /// # Errors
    /// The control's own.
    fn embed(&self, at: At<'_>, ids: Option<&Tensor>, e: Tensor) -> Result<Tensor> {
        let _ = (at, ids);
        Ok(e)
    }
}

/// A linear site that is a range of one product's outputs.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The site and the slot.
    pub at: At<'a>,
    /// The first of its outputs.
    pub start: i64,
    /// How many there are.
    pub len: i64,
}

/// [`Control::linear_parts`] by [`Control::linear`], part by part. Parts are in the order of their outputs; one may be
/// there several times, under several slots.
///
/// # Errors
/// The control's and LibTorch's.
pub fn part_by_part<C: Control + ?Sized>(
    control: &C,
    parts: &[Part<'_>],
    x: &Tensor,
    y: Tensor,
) -> Result<Tensor> {
    let (mut end, mut changed, mut out) = (0, false, Vec::with_capacity(2 * parts.len() + 1));
    for slots in parts.chunk_by(|a, b| (a.start, a.len) == (b.start, b.len)) {
        let Part { start, len, .. } = slots[0];
        if start > end {
            out.push(y.f_narrow(-1, end, start - end)?);
        }
        end = start + len;
        let view = y.f_narrow(-1, start, len)?;
        let mut part = view.shallow_clone();
        for slot in slots {
            part = control.linear(slot.at, x, part)?;
        }
        // What stops or starts a gradient is a change, though no number is.
        let graph = part.requires_grad() || view.requires_grad();
        changed |= !same_view(&part, &view)? || (graph && is_recording());
        out.push(part);
    }
    if !changed {
        return Ok(y);
    }
    let width = y.size().last().copied().unwrap_or(0);
    if width > end {
        out.push(y.f_narrow(-1, end, width - end)?);
    }
    Ok(Tensor::f_cat(&out, -1)?)
}

/// Whether two tensors are the same elements of the same storage.
fn same_view(a: &Tensor, b: &Tensor) -> Result<bool> {
    let alike = a.size() == b.size() && a.stride() == b.stride() && a.f_kind()? == b.f_kind()?;
    Ok(alike && a.device() == b.device() && a.data_ptr() == b.data_ptr())
}

/// How many positions controls put before the first token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offset {
    /// As many in every row.
    All(i64),
    /// Of each row.
    Rows(Vec<i64>),
}

impl Default for Offset {
    fn default() -> Self {
        Self::All(0)
    }
}

impl Offset {
    /// The most of any row.
    pub fn most(&self) -> i64 {
        match self {
            Self::All(n) => *n,
            Self::Rows(rows) => rows.iter().copied().max().unwrap_or(0),
        }
    }

    /// The sum of both, row by row.
    ///
    /// # Errors
    /// [`Error::Value`] for different numbers of rows.
    fn and(self, other: Self) -> Result<Self> {
        Ok(match (self, other) {
            (Self::All(a), Self::All(b)) => Self::All(a + b),
            (Self::All(n), Self::Rows(rows)) | (Self::Rows(rows), Self::All(n)) => {
                Self::Rows(rows.into_iter().map(|row| row + n).collect())
            }
            (Self::Rows(a), Self::Rows(b)) => {
                if a.len() != b.len() {
                    return Err(Error::value("rows of a position offset", a.len(), b.len()));
                }
                Self::Rows(a.into_iter().zip(b).map(|(a, b)| a + b).collect())
            }
        })
    }
}

/// One call to make at a site.
#[derive(Clone, Copy)]
struct Hook {
    control: usize,
    slot: usize,
}

#[derive(Clone, Default)]
struct SiteHooks {
    input: Vec<Hook>,
    main: Vec<Hook>,
}

/// Where a control says at which sites it acts.
pub struct Binding<'b> {
    control: usize,
    hooks: &'b mut [SiteHooks],
}

impl Binding<'_> {
    /// Calls the control at this site: the method that belongs to the site's kind.
    pub fn at(&mut self, site: SiteId, slot: usize) {
        let hook = Hook { control: self.control, slot };
        if let Some(hooks) = self.hooks.get_mut(site.index()) {
            hooks.main.push(hook);
        }
    }

    /// Calls [`Control::input`] at this linear site.
    pub fn at_input(&mut self, site: SiteId, slot: usize) {
        let hook = Hook { control: self.control, slot };
        if let Some(hooks) = self.hooks.get_mut(site.index()) {
            hooks.input.push(hook);
        }
    }
}

/// A stack of controls, bound to one model's sites.
pub struct Controls {
    id: u64,
    sites: u64,
    controls: Vec<Box<dyn Control>>,
    hooks: Vec<SiteHooks>,
}

impl Controls {
    /// Binds controls to a model's sites, in order: at one site the first acts first; around an attention the
    /// last is outermost.
    ///
    /// # Errors
    /// The first control's that cannot be bound.
    pub fn bind(sites: &SiteMap, controls: Vec<Box<dyn Control>>) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut hooks = vec![SiteHooks::default(); sites.len()];
        for (control, it) in controls.iter().enumerate() {
            it.bind(sites, &mut Binding { control, hooks: &mut hooks })?;
        }
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, sites: sites.id(), controls, hooks })
    }

    /// These controls and `more`, which act after them, as a stack of its own.
    ///
    /// # Errors
    /// Those of [`Controls::bind`].
    pub fn with(&self, sites: &SiteMap, more: Vec<Box<dyn Control>>) -> Result<Self> {
        Self::bind(sites, self.controls.iter().map(|control| control.handle()).chain(more).collect())
    }

    /// Another handle over the same storage.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            id: self.id,
            sites: self.sites,
            controls: self.controls.iter().map(|control| control.handle()).collect(),
            hooks: self.hooks.clone(),
        }
    }

    /// What tells this stack, and its handles, from any other of the process.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// How many controls there are.
    pub fn len(&self) -> usize {
        self.controls.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.controls.is_empty()
    }
}

/// What is left of an attention's chain. It may be run any number of times.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    site: SiteId,
    pass: &'a Pass<'a>,
    controls: &'a Controls,
    rest: &'a [Hook],
}

impl Next<'_> {
    /// Runs the remaining controls, then the attention itself.
    ///
    /// # Errors
    /// Theirs.
    pub fn run(&self, attn: Attn) -> Result<Tensor> {
        let Some((hook, rest)) = self.rest.split_last() else { return attn.sdpa() };
        let at = At { site: self.site, slot: hook.slot, pass: self.pass };
        self.controls.controls[hook.control].attention(at, attn, Next { rest, ..*self })
    }

    /// The same for `attn` of these rows of the batch alone ([`Attn::select`]): the remaining controls see their lanes.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is no row; the remaining controls'.
    pub fn run_rows(&self, rows: &[i64], attn: Attn) -> Result<Tensor> {
        let mut lanes = self.pass.lanes.cloned();
        lanes.iter_mut().try_for_each(|lanes| lanes.reorder(rows))?;
        let pass = Pass { lanes: lanes.as_ref(), ..*self.pass };
        Next { pass: &pass, site: self.site, controls: self.controls, rest: self.rest }.run(attn)
    }
}

/// What models call. With no controls each costs a branch.
impl<'a> Pass<'a> {
    /// Refuses controls that were bound to another model, and lanes of another number of rows than the batch's; a
    /// model calls it once a pass.
    ///
    /// # Errors
    /// [`Error::ForeignSites`]; [`Error::Value`] for lanes that are not one a row.
    pub fn check(&self, sites: &SiteMap, rows: i64) -> Result<()> {
        self.check_sites(sites)?;
        match self.lanes {
            Some(lanes) if i64::try_from(lanes.rows().len()) != Ok(rows) => {
                Err(Error::value("lanes", format!("{rows}, one a row of the batch"), lanes.rows().len()))
            }
            _ => Ok(()),
        }
    }

    /// Refuses controls that were bound to another model.
    ///
    /// # Errors
    /// [`Error::ForeignSites`].
    pub fn check_sites(&self, sites: &SiteMap) -> Result<()> {
        match self.controls {
            Some(controls) if controls.sites != sites.id() => Err(Error::ForeignSites),
            _ => Ok(()),
        }
    }

    /// How many positions controls put before the first token, all together.
    ///
    /// # Errors
    /// The controls'.
    pub fn position_offset(&self) -> Result<Offset> {
        let controls = self.controls.map_or(&[][..], |controls| &controls.controls);
        controls
            .iter()
            .try_fold(Offset::default(), |sum, control| sum.and(control.position_offset(self.lanes)?))
    }

    #[inline]
    fn hooks(&self, site: SiteId) -> Option<(&'a Controls, &'a SiteHooks)> {
        let controls = self.controls?;
        controls.hooks.get(site.index()).map(|hooks| (controls, hooks))
    }

    /// Whether any control acts at this site.
    #[inline]
    pub fn acts_at(&self, site: SiteId) -> bool {
        self.hooks(site).is_some_and(|(_, hooks)| !hooks.main.is_empty() || !hooks.input.is_empty())
    }

    /// Whether any control acts before this linear site.
    #[inline]
    pub fn acts_before(&self, site: SiteId) -> bool {
        self.hooks(site).is_some_and(|(_, hooks)| !hooks.input.is_empty())
    }

    /// Runs [`Control::input`].
    ///
    /// # Errors
    /// The controls'.
    #[inline]
    pub fn input(&self, site: SiteId, mut x: Tensor) -> Result<Tensor> {
        if let Some((controls, hooks)) = self.hooks(site) {
            for hook in &hooks.input {
                x = controls.controls[hook.control].input(At { site, slot: hook.slot, pass: self }, x)?;
            }
        }
        Ok(x)
    }

    /// Runs [`Control::linear`].
    ///
    /// # Errors
    /// The controls'.
    #[inline]
    pub fn linear(&self, site: SiteId, x: &Tensor, mut y: Tensor) -> Result<Tensor> {
        if let Some((controls, hooks)) = self.hooks(site) {
            for hook in &hooks.main {
                y = controls.controls[hook.control].linear(At { site, slot: hook.slot, pass: self }, x, y)?;
            }
        }
        Ok(y)
    }

    /// Runs [`Control::linear_parts`] after one product whose outputs are the sites' in turn, so many each.
    ///
    /// # Errors
    /// The controls'.
    pub fn linear_parts(
        &'a self,
        sites: impl IntoIterator<Item = (SiteId, i64)>,
        x: &Tensor,
        mut y: Tensor,
    ) -> Result<Tensor> {
        let Some(controls) = self.controls else { return Ok(y) };
        let (mut start, mut calls) = (0, Vec::new());
        for (site, len) in sites {
            for hook in controls.hooks.get(site.index()).map_or(&[][..], |hooks| &hooks.main) {
                let at = At { site, slot: hook.slot, pass: self };
                calls.push((hook.control, Part { at, start, len }));
            }
            start += len;
        }
        // Parts do not depend on each other: control by control is each part's order too.
        calls.sort_by_key(|(control, _)| *control);
        for of_one in calls.chunk_by(|a, b| a.0 == b.0) {
            let parts: Vec<Part<'_>> = of_one.iter().map(|(_, part)| *part).collect();
            y = controls.controls[of_one[0].0].linear_parts(&parts, x, y)?;
        }
        Ok(y)
    }

    /// Runs [`Control::hidden`].
    ///
    /// # Errors
    /// The controls'.
    #[inline]
    pub fn hidden(&self, site: SiteId, mut h: Tensor, residual: &Tensor) -> Result<Tensor> {
        if let Some((controls, hooks)) = self.hooks(site) {
            for hook in &hooks.main {
                let at = At { site, slot: hook.slot, pass: self };
                h = controls.controls[hook.control].hidden(at, h, residual)?;
            }
        }
        Ok(h)
    }

    /// Runs [`Control::embed`].
    ///
    /// # Errors
    /// The controls'.
    #[inline]
    pub fn embed(&self, site: SiteId, ids: Option<&Tensor>, mut e: Tensor) -> Result<Tensor> {
        if let Some((controls, hooks)) = self.hooks(site) {
            for hook in &hooks.main {
                e = controls.controls[hook.control].embed(
                    At { site, slot: hook.slot, pass: self },
                    ids,
                    e,
                )?;
            }
        }
        Ok(e)
    }

    /// Computes an attention, through the controls around it.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    #[inline]
    pub fn attention(&self, site: SiteId, attn: Attn) -> Result<Tensor> {
        match self.hooks(site) {
            Some((controls, hooks)) if !hooks.main.is_empty() => {
                Next { site, pass: self, controls, rest: &hooks.main }.run(attn)
            }
            _ => attn.sdpa(),
        }
    }
}
