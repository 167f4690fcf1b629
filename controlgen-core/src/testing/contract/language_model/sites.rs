//! Sites, the controls at them, and their weights.

use super::Case;
use crate::testing::contract::probe::{Act, Probe, Where, names_are_unique};
use crate::testing::contract::{Breach, Check, breach, demand, different, equal, refused};
use crate::{Dims, Error, LmInput, Pass, SiteId, SiteKind};
use tch::Tensor;

pub fn names(c: &Case<'_>) -> Check {
    names_are_unique(c.lm.sites())
}

pub fn hooks(c: &Case<'_>) -> Check {
    let sites = c.lm.sites();
    for place in [Where::Sites, Where::Inputs] {
        let probe = Probe::new(sites, place, Act::Identity);
        let _ = c.under(&c.ids, &Pass::with_controls(&probe.bind(sites)?))?;
        probe.came_by_all(sites)?;
    }
    Ok(())
}

pub fn identity(c: &Case<'_>) -> Check {
    let (sites, plain) = (c.lm.sites(), c.read(&c.ids)?);
    let run = |place| -> Result<Tensor, Breach> {
        let controls = Probe::new(sites, place, Act::Identity).bind(sites)?;
        Ok(c.under(&c.ids, &Pass::with_controls(&controls))?)
    };
    equal("logits under a control that does nothing", &run(Where::Sites)?, &plain)?;
    // A control before a part of a fused product splits it: roundings may differ.
    c.close("logits under a control that does nothing to inputs", &run(Where::Inputs)?, &plain)
}

pub fn effect(c: &Case<'_>) -> Check {
    let sites = c.lm.sites();
    let ids = c.ids.f_narrow(0, 0, 1)?;
    for place in [Where::Sites, Where::Inputs] {
        let acts = |kind| place == Where::Sites || kind == SiteKind::Linear;
        let idle = Probe::new(sites, place, Act::Identity).bind(sites)?;
        let plain = c.under(&ids, &Pass::with_controls(&idle))?;
        for (id, site) in sites.iter().filter(|(_, site)| acts(site.kind())) {
            let controls = Probe::new(sites, place, Act::Alter(id)).bind(sites)?;
            let found = c.under(&ids, &Pass::with_controls(&controls))?;
            let before = if place == Where::Inputs { "before" } else { "at" };
            different(&format!("logits under a control {before} `{}`", site.name), &found, &plain)?;
        }
    }
    Ok(())
}

/// What a weight's shape should be, where the site's dimensions say.
fn shape(dims: Dims) -> Option<Vec<i64>> {
    match dims {
        Dims::Linear { inputs, outputs } => Some(vec![outputs, inputs]),
        Dims::Embedding { rows, width } => Some(vec![rows, width]),
        _ => None,
    }
}

pub fn map_weights(c: &Case<'_>) -> Check {
    let (sites, before) = (c.lm.sites(), c.read(&c.ids)?);
    let (mut offered, mut wrong) = (Vec::new(), None);
    let mut look = |id: SiteId, w: &Tensor| {
        let mut expected = sites.get(id).and_then(|site| shape(site.dims));
        // After its weight a linear site may offer its bias, `[outputs]`.
        if w.dim() == 1 && offered.contains(&id) {
            expected.iter_mut().for_each(|shape| shape.truncate(1));
        }
        if expected.as_deref() != Some(w.size().as_slice()) && wrong.is_none() {
            wrong = Some((
                format!("{expected:?} for the weight of site {}", id.index()),
                format!("{:?}", w.size()),
            ));
        }
        offered.push(id);
        Ok(None)
    };
    let same = c.lm.map_weights(&mut look)?;
    if let Some((expected, found)) = wrong {
        return breach(expected, found);
    }
    for (id, site) in sites.of_kind(SiteKind::Linear) {
        demand(offered.contains(&id), format!("the weight of `{}` to be offered", site.name), "it was not")?;
    }
    let read = |lm: &dyn crate::LanguageModel| -> Result<Tensor, Breach> {
        let mut state = super::start(lm, 3, &Pass::default())?;
        Ok(lm.forward(LmInput::ids(&c.ids), &mut state, &Pass::default())?.logits)
    };
    equal("logits after a map without an answer", &read(&*same)?, &before)?;
    let Some(&last) = offered.last() else { return breach("a weight to be offered", "none") };
    let mut halve = |id: SiteId, w: &Tensor| {
        if id == last { Ok(Some(w.f_mul_scalar(0.5)?)) } else { Ok(None) }
    };
    let mapped = c.lm.map_weights(&mut halve)?;
    different("logits with another weight", &read(&*mapped)?, &before)?;
    // It is a handle: controls bound to the model run on it.
    let probe = Probe::new(sites, Where::Sites, Act::Identity).bind(sites)?;
    let pass = Pass::with_controls(&probe);
    let mut state = super::start(&*mapped, 3, &pass)?;
    let found = mapped.forward(LmInput::ids(&c.ids), &mut state, &pass)?.logits;
    equal("logits of the mapped model under the model's controls", &found, &read(&*mapped)?)?;
    let mut narrow = |id: SiteId, w: &Tensor| {
        if id == last { Ok(Some(w.f_narrow(0, 0, w.size()[0] - 1)?)) } else { Ok(None) }
    };
    refused!("a weight of another shape", c.lm.map_weights(&mut narrow), Error::Shape { .. })?;
    drop(mapped);
    equal("logits of the original", &c.read(&c.ids)?, &before)
}
