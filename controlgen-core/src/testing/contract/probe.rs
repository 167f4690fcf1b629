//! A control that counts, alters or fails.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Kind, Tensor};

use super::{Check, breach, demand};
use crate::{At, Attn, Binding, Control, Controls, Dims, Error, Next, Result, SiteId, SiteKind, SiteMap};

/// What it does beside counting.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    Identity,
    /// Multiplies what passes at one site, each channel by a number of its own: a norm after it would take out a
    /// common factor.
    Alter(SiteId),
    /// Fails at this call, counted from 1.
    FailAt(usize),
}

/// Where it acts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// At every site, by the method of its kind.
    Sites,
    /// Before every linear site.
    Inputs,
}

/// A control at all sites.
#[derive(Clone)]
pub struct Probe {
    act: Act,
    place: Where,
    dims: Arc<Vec<Dims>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    calls: usize,
    sites: HashSet<usize>,
    /// The first value that was not of its site's dimensions.
    wrong: Option<(usize, String, String)>,
}

impl Probe {
    pub fn new(sites: &SiteMap, place: Where, act: Act) -> Self {
        let dims = sites.iter().map(|(_, site)| site.dims).collect();
        Self { act, place, dims: Arc::new(dims), seen: Arc::default() }
    }

    /// The stack of it alone.
    pub fn bind(&self, sites: &SiteMap) -> Result<Controls> {
        Controls::bind(sites, vec![Box::new(self.clone())])
    }

    /// How often it was called.
    pub fn calls(&self) -> usize {
        self.seen().calls
    }

    /// Demands a call at every site, with values of the declared dimensions.
    pub fn came_by_all(&self, sites: &SiteMap) -> Check {
        let seen = self.seen();
        let name = |index: usize| sites.iter().nth(index).map_or_else(String::new, |(_, s)| s.name.clone());
        if let Some((site, expected, found)) = &seen.wrong {
            return breach(format!("at site `{}`: {expected}", name(*site)), found);
        }
        let acts = |kind| self.place == Where::Sites || kind == SiteKind::Linear;
        for (id, site) in sites.iter().filter(|(_, site)| acts(site.kind())) {
            let what = if self.place == Where::Sites { "a call" } else { "a call before the product" };
            let expected = format!("{what} at the {} site `{}`", site.kind().name(), site.name);
            demand(seen.sites.contains(&id.index()), expected, "none")?;
        }
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, site: SiteId, checks: &[(&str, i64, Option<i64>)]) -> Result<()> {
        let mut seen = self.seen();
        seen.calls += 1;
        seen.sites.insert(site.index());
        for &(what, expected, found) in checks {
            if found != Some(expected) && seen.wrong.is_none() {
                let found = found.map_or_else(|| "none".to_owned(), |n| n.to_string());
                seen.wrong = Some((site.index(), format!("{what} {expected}"), found));
            }
        }
        if self.act == Act::FailAt(seen.calls) {
            return Err(Error::unsupported(FAILS, "nothing"));
        }
        Ok(())
    }

    fn pass_on(&self, site: SiteId, value: Tensor) -> Result<Tensor> {
        if self.act != Act::Alter(site) {
            return Ok(value);
        }
        let width = value.size().last().copied().unwrap_or(1);
        let factor = Tensor::f_arange(width, (Kind::Double, value.device()))?.f_add_scalar(1.0)?.f_sin()?;
        let factor = factor.f_mul_scalar(0.5)?.f_add_scalar(1.0)?.f_to_kind(value.f_kind()?)?;
        Ok(value.f_mul(&factor)?)
    }
}

/// What the failing control says.
pub const FAILS: &str = "a control that fails";

fn last(t: &Tensor) -> Option<i64> {
    t.size().last().copied()
}

/// A dimension, counted from 0.
fn dim(t: &Tensor, i: usize) -> Option<i64> {
    t.size().get(i).copied()
}

impl Control for Probe {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.clone())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for (id, site) in sites.iter() {
            match self.place {
                Where::Sites => to.at(id, id.index()),
                Where::Inputs if site.kind() == SiteKind::Linear => to.at_input(id, id.index()),
                Where::Inputs => {}
            }
        }
        Ok(())
    }

    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        if let Some(Dims::Linear { inputs, .. }) = self.dims.get(at.slot) {
            self.note(at.site, &[("inputs", *inputs, last(&x))])?;
        }
        self.pass_on(at.site, x)
    }

    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        match self.dims.get(at.slot) {
            Some(Dims::Linear { inputs, outputs }) => {
                self.note(at.site, &[("inputs", *inputs, last(x)), ("outputs", *outputs, last(&y))])?;
            }
            Some(Dims::Conv { inputs, outputs, .. }) => {
                let checks = [("channels in", *inputs, dim(x, 1)), ("channels out", *outputs, dim(&y, 1))];
                self.note(at.site, &checks)?;
            }
            _ => {}
        }
        self.pass_on(at.site, y)
    }

    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> Result<Tensor> {
        if let Some(Dims::Attention { heads, kv_heads, head_dim, .. }) = self.dims.get(at.slot) {
            let (q, k) = (&attn.q, &attn.k);
            let checks = [
                ("heads of the queries", *heads, dim(q, 1)),
                ("heads of the keys", *kv_heads, dim(k, 1)),
                ("width of a head", *head_dim, last(q)),
            ];
            self.note(at.site, &checks)?;
        }
        self.pass_on(at.site, next.run(attn)?)
    }

    fn hidden(&self, at: At<'_>, h: Tensor, residual: &Tensor) -> Result<Tensor> {
        if let Some(Dims::Hidden { width }) = self.dims.get(at.slot) {
            // Images keep their channels in the second dimension.
            let channels = |t: &Tensor| if t.dim() == 4 { dim(t, 1) } else { last(t) };
            let checks = [("width", *width, channels(&h)), ("width", *width, channels(residual))];
            self.note(at.site, &checks)?;
        }
        self.pass_on(at.site, h)
    }

    fn embed(&self, at: At<'_>, _ids: Option<&Tensor>, e: Tensor) -> Result<Tensor> {
        if let Some(Dims::Embedding { width, .. }) = self.dims.get(at.slot) {
            self.note(at.site, &[("width", *width, last(&e))])?;
        }
        self.pass_on(at.site, e)
    }
}

/// No two sites of a kind have a name in common, and a full name or alias selects one place.
pub fn names_are_unique(sites: &SiteMap) -> Check {
    let mut seen = HashSet::new();
    for (_, site) in sites.iter() {
        for name in std::iter::once(&site.name).chain(&site.aliases) {
            demand(
                !name.is_empty(),
                format!("a name for every {} site", site.kind().name()),
                "an empty one",
            )?;
            let expected = format!("one {} site of the name `{name}`", site.kind().name());
            demand(seen.insert((site.kind(), name)), expected, "two")?;
        }
    }
    Ok(())
}

/// Sites of the same names that are another model's.
pub fn copied(sites: &SiteMap) -> SiteMap {
    let mut copy = SiteMap::new();
    for (_, site) in sites.iter() {
        copy.add_site(site.clone());
    }
    copy
}
