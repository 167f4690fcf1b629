//! What every denoiser keeps.

use tch::{Kind, Tensor};

use super::probe::{Act, Probe, Where, copied, names_are_unique};
use super::{
    Breach, Check, Clause, Options, Violation, by_differences, check, close, demand, different, equal,
    finite, noise, on_thread, recording, refused, sized,
};
use crate::{
    Condition, Controls, Denoiser, EnableGrad, Error, Lanes, Pass, Prediction, Prepared, Result, SiteId,
};

/// The model, and what it is asked.
pub struct Case<'a> {
    model: &'a dyn Denoiser,
    conditions: &'a [Condition],
    tolerance: f64,
    seed: u64,
    /// `[3, C, H, W]`, f64 for a model in f64, otherwise f32.
    x: Tensor,
    /// `[3]`, not all of them equal.
    t: Tensor,
    /// Which condition each row is under.
    of: [usize; 3],
}

pub fn clauses<'a>() -> Vec<Clause<Case<'a>>> {
    vec![
        ("spec", spec),
        ("repeatable", repeatable),
        ("rows", rows),
        ("select", select),
        ("handle", handle),
        ("gradients", gradients),
        ("no gradients", no_gradients),
        ("conditions", conditions),
        ("prepared", prepared),
        ("bad input", bad_input),
        ("lanes", lanes),
        ("foreign sites", foreign_sites),
        ("sites", sites),
        ("hooks", hooks),
        ("identity control", identity),
        ("effect", effect),
        ("map_weights", map_weights),
    ]
}

impl Options {
    /// [`denoiser`](super::denoiser) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn denoiser(
        &self,
        model: &dyn Denoiser,
        conditions: &[Condition],
        timesteps: &[f64],
    ) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let case = || -> Result<_, Breach> {
            demand(conditions.len() >= 2, "at least two conditions to be told apart", conditions.len())?;
            demand(timesteps.len() >= 2, "at least two timesteps", timesteps.len())?;
            let spec = model.spec();
            let kind = if spec.placement.kind == Kind::Double { Kind::Double } else { Kind::Float };
            let shape = [3, spec.channels, spec.size[0], spec.size[1]];
            let x = noise(self.seed, 0, &shape, (kind, spec.placement.device))?;
            let t = Tensor::f_from_slice(&[timesteps[0], timesteps[1], timesteps[1]])?;
            let t = t.f_to_kind(kind)?.f_to_device(spec.placement.device)?;
            let tolerance = self.tolerance(spec.placement.kind);
            Ok(Case { model, conditions, tolerance, seed: self.seed, x, t, of: [0, 1, 0] })
        };
        let case = case().map_err(|b| b.in_clause("denoiser", "spec"))?;
        check("denoiser", &clauses(), &case)
    }
}

impl Case<'_> {
    /// The conditions of these rows.
    fn conditions(&self, rows: &[usize]) -> Vec<Condition> {
        rows.iter().map(|&row| self.conditions[self.of[row]].handle()).collect()
    }

    fn prepare(&self, rows: &[usize]) -> Result<Prepared> {
        self.model.prepare(&self.conditions(rows), &Pass::default())
    }

    fn predict(&self, prepared: &Prepared) -> Result<Prediction> {
        self.model.predict(&self.x, &self.t, prepared, &Pass::default())
    }

    /// All three rows.
    fn all(&self) -> Result<Tensor> {
        Ok(self.predict(&self.prepare(&[0, 1, 2])?)?.value)
    }

    /// All three rows under controls.
    fn under(&self, controls: &Controls) -> Result<Tensor> {
        let lanes = Lanes::samples(3);
        let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(controls) };
        let prepared = self.model.prepare(&self.conditions(&[0, 1, 2]), &pass)?;
        Ok(self.model.predict(&self.x, &self.t, &prepared, &pass)?.value)
    }

    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        close(what, found, expected, self.tolerance)
    }
}

fn spec(c: &Case<'_>) -> Check {
    let spec = c.model.spec();
    let prepared = c.prepare(&[0, 1, 2])?;
    demand(prepared.rows() == 3, "3 rows of 3 conditions", prepared.rows())?;
    for kind in [Kind::Float, Kind::Double] {
        let x = c.x.f_to_kind(kind)?;
        let made = c.model.predict(&x, &c.t, &prepared, &Pass::default())?;
        demand(
            made.parameterisation == spec.parameterisation,
            format!("a prediction of {}, as spec says", spec.parameterisation.name()),
            made.parameterisation.name(),
        )?;
        let learned = if spec.learned_variance { "a learned variance" } else { "no learned variance" };
        demand(
            made.variance.is_some() == spec.learned_variance,
            format!("{learned}, as spec says"),
            "otherwise",
        )?;
        for value in std::iter::once(&made.value).chain(&made.variance) {
            sized("the prediction", value, &x.size())?;
            let found = value.f_kind()?;
            demand(found == kind, format!("a prediction in {kind:?}, as the sample"), format!("{found:?}"))?;
            finite("the prediction", value)?;
        }
    }
    Ok(())
}

/// Nothing is kept from call to call, and what was prepared serves any number of them.
fn repeatable(c: &Case<'_>) -> Check {
    let (x, prepared) = (c.x.f_add_scalar(0)?, c.prepare(&[0, 1, 2])?);
    let first = c.predict(&prepared)?.value;
    let other = c.x.f_mul_scalar(-0.5)?;
    let _ = c.model.predict(&other, &c.t, &prepared, &Pass::default())?;
    equal("the prediction, the second time", &c.predict(&prepared)?.value, &first)?;
    equal("the prediction of conditions prepared again", &c.all()?, &first)?;
    equal("the sample after it was predicted from", &c.x, &x)
}

fn rows(c: &Case<'_>) -> Check {
    let together = c.all()?;
    for row in 0..3 {
        let at = row as i64;
        let (x, t) = (c.x.f_narrow(0, at, 1)?, c.t.f_narrow(0, at, 1)?);
        let alone = c.model.predict(&x, &t, &c.prepare(&[row])?, &Pass::default())?.value;
        c.close(
            &format!("row {row} of a batch of unequal timesteps"),
            &together.f_narrow(0, at, 1)?,
            &alone,
        )?;
    }
    Ok(())
}

fn select(c: &Case<'_>) -> Check {
    let two = c.model.prepare(&[c.conditions[0].handle(), c.conditions[1].handle()], &Pass::default())?;
    let picked = two.select(&c.of.map(|row| row as i64))?;
    c.close("the prediction under rows that were selected", &c.predict(&picked)?.value, &c.all()?)?;
    let swapped = c.predict(&two.select(&[1, 0, 1])?)?.value;
    different("the prediction under other conditions", &swapped, &c.all()?)
}

fn handle(c: &Case<'_>) -> Check {
    let (expected, handle) = (c.all()?, c.model.handle());
    let found = handle.predict(&c.x, &c.t, &c.prepare(&[0, 1, 2])?, &Pass::default())?.value;
    c.close("a handle's prediction, of what the original prepared", &found, &expected)?;
    let (x, t, conditions) = (c.x.shallow_clone(), c.t.shallow_clone(), c.conditions(&[0, 1, 2]));
    let found = on_thread(move || {
        let prepared = handle.prepare(&conditions, &Pass::default())?;
        Ok(handle.predict(&x, &t, &prepared, &Pass::default())?.value)
    })?;
    c.close("a handle's prediction on another thread", &found, &expected)
}

fn gradients(c: &Case<'_>) -> Check {
    let prepared = c.prepare(&[0, 1, 2])?;
    let w = noise(c.seed, 9, &c.x.size(), (Kind::Double, c.x.device()))?;
    let f = |x: &Tensor| -> Result<Tensor> {
        let made = c.model.predict(x, &c.t, &prepared, &Pass::default())?.value;
        let each = made.f_to_kind(Kind::Double)?.f_mul(&w)?.f_flatten(1, -1)?;
        Ok(each.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)
    };
    let gradient = {
        let _gradients = EnableGrad::new();
        let leaf = c.x.f_detach()?.f_set_requires_grad(true)?;
        crate::energy::backward(&f(&leaf)?, &leaf, false)?
    };
    by_differences("the prediction's gradient at x", &c.x, &gradient, c.seed, &f)
}

fn no_gradients(c: &Case<'_>) -> Check {
    let prepared = c.prepare(&[0, 1, 2])?;
    let leaf = c.x.f_detach()?.f_set_requires_grad(true)?;
    let made = c.model.predict(&leaf, &c.t, &prepared, &Pass::default())?.value;
    demand(!made.requires_grad(), "nothing recorded under no_grad_guard", "a graph")?;
    demand(!recording()?, "gradients off after a prediction, as before it", "gradients on")?;
    let _gradients = EnableGrad::new();
    let _ = c.model.predict(&leaf, &c.t, &prepared, &Pass::default())?;
    demand(recording()?, "gradients on after a prediction, as before it", "gradients off")
}

fn conditions(c: &Case<'_>) -> Check {
    let made = c.model.prepare(&[Condition::Class(-1)], &Pass::default());
    if made.is_ok() { super::breach("class -1 to be refused", "no error") } else { Ok(()) }
}

fn prepared(c: &Case<'_>) -> Check {
    let sites = c.model.sites();
    let plain = c.prepare(&[0, 1, 2])?;
    let tensors = || plain.tensors().iter().map(Tensor::shallow_clone).collect();
    let foreign = Prepared::new(&copied(sites), &Pass::default(), 3, tensors())?;
    refused!("what another model prepared", c.predict(&foreign), Error::ForeignState { .. })?;
    let controls = Probe::new(sites, Where::Sites, Act::Identity).bind(sites)?;
    let pass = Pass::with_controls(&controls);
    let under = c.model.predict(&c.x, &c.t, &plain, &pass);
    refused!("controls that conditions were not prepared under", under, Error::ForeignState { .. })?;
    let prepared = c.model.prepare(&c.conditions(&[0, 1, 2]), &pass)?;
    let without = c.predict(&prepared);
    refused!("conditions prepared under controls, without them", without, Error::ForeignState { .. })
}

fn bad_input(c: &Case<'_>) -> Check {
    let prepared = c.prepare(&[0, 1, 2])?;
    let predict = |x: &Tensor, t: &Tensor| c.model.predict(x, t, &prepared, &Pass::default());
    let wide = Tensor::f_cat(&[&c.x, &c.x], 1)?;
    refused!("a sample of twice the channels", predict(&wide, &c.t), Error::Shape { .. })?;
    refused!("a sample of three dimensions", predict(&c.x.f_get(0)?, &c.t), Error::Shape { .. })?;
    refused!("a sample of integers", predict(&c.x.f_to_kind(Kind::Int64)?, &c.t), Error::Kind { .. })?;
    refused!("2 timesteps for 3 rows", predict(&c.x, &c.t.f_narrow(0, 0, 2)?), Error::Shape { .. })?;
    refused!("timesteps of integers", predict(&c.x, &c.t.f_to_kind(Kind::Int64)?), Error::Kind { .. })?;
    refused!(
        "conditions of 2 rows for a batch of 3",
        c.predict(&prepared.select(&[0, 1])?),
        Error::Value { .. }
    )
}

fn lanes(c: &Case<'_>) -> Check {
    let prepared = c.prepare(&[0, 1, 2])?;
    for n in [0, 2, 4] {
        let lanes = Lanes::samples(n);
        let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
        let made = c.model.predict(&c.x, &c.t, &prepared, &pass);
        refused!(format!("{n} lanes for 3 rows"), made, Error::Value { .. })?;
    }
    let lanes = Lanes::samples(3);
    let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
    c.close(
        "the prediction under plain lanes",
        &c.model.predict(&c.x, &c.t, &prepared, &pass)?.value,
        &c.all()?,
    )
}

fn foreign_sites(c: &Case<'_>) -> Check {
    let sites = copied(c.model.sites());
    let controls = Probe::new(&sites, Where::Sites, Act::Identity).bind(&sites)?;
    let made = c.model.prepare(&c.conditions(&[0, 1, 2]), &Pass::with_controls(&controls));
    refused!("controls bound to another model", made, Error::ForeignSites)
}

fn sites(c: &Case<'_>) -> Check {
    names_are_unique(c.model.sites())
}

/// In `prepare` or in `predict`.
fn hooks(c: &Case<'_>) -> Check {
    let sites = c.model.sites();
    let probe = Probe::new(sites, Where::Sites, Act::Identity);
    let _ = c.under(&probe.bind(sites)?)?;
    probe.came_by_all(sites)
}

fn identity(c: &Case<'_>) -> Check {
    let sites = c.model.sites();
    let found = c.under(&Probe::new(sites, Where::Sites, Act::Identity).bind(sites)?)?;
    equal("the prediction under a control that does nothing", &found, &c.all()?)
}

fn effect(c: &Case<'_>) -> Check {
    let (sites, plain) = (c.model.sites(), c.all()?);
    for (id, site) in sites.iter() {
        let found = c.under(&Probe::new(sites, Where::Sites, Act::Alter(id)).bind(sites)?)?;
        different(&format!("the prediction under a control at `{}`", site.name), &found, &plain)?;
    }
    Ok(())
}

fn map_weights(c: &Case<'_>) -> Check {
    let (plain, mut unknown) = (c.all()?, None);
    let mut look = |id: SiteId, _: &Tensor| {
        if c.model.sites().get(id).is_none() {
            unknown = Some(id);
        }
        Ok(None)
    };
    let mapped = c.model.map_weights(&mut look)?;
    demand(unknown.is_none(), "weights of the model's sites", format!("{unknown:?}"))?;
    let prepared = mapped.prepare(&c.conditions(&[0, 1, 2]), &Pass::default())?;
    let found = mapped.predict(&c.x, &c.t, &prepared, &Pass::default())?.value;
    equal("the prediction after a map without an answer", &found, &plain)?;
    let mut halve = |_: SiteId, w: &Tensor| Ok(Some(w.f_mul_scalar(0.5)?));
    drop(c.model.map_weights(&mut halve)?);
    equal("the original's prediction after a map", &c.all()?, &plain)
}
