//! What every encoder of text keeps.

use tch::{Kind, Tensor};

use super::probe::{Act, FAILS, Probe, Where, copied, names_are_unique};
use super::{
    Breach, Check, Clause, Options, Violation, breach, by_differences, check, close, demand, different,
    equal, finite, noise, on_thread, recording, refused, sized,
};
use crate::noise::Stream;
use crate::testing::right_padded;
use crate::{
    EnableGrad, Encoder, EncoderInput, Error, Features, Lanes, Pass, Reads, Result, SiteId, SiteKind, Tokens,
};

/// The encoder, and what it reads.
pub struct Case<'a> {
    encoder: &'a dyn Encoder,
    tolerance: f64,
    seed: u64,
    vocab: i64,
    context: Option<i64>,
    table: Tensor,
    /// Three rows of 6 tokens.
    rows: Vec<Vec<i64>>,
    /// The same, `[3, 6]`.
    ids: Tensor,
}

pub fn clauses<'a>() -> Vec<Clause<Case<'a>>> {
    vec![
        ("spec", spec),
        ("repeatable", repeatable),
        ("embeddings", embeddings),
        ("rows", rows),
        ("padding", padding),
        ("gradients", gradients),
        ("no gradients", no_gradients),
        ("handle", handle),
        ("sites", sites),
        ("hooks", hooks),
        ("identity control", identity),
        ("effect", effect),
        ("map_weights", map_weights),
        ("failing control", failing_control),
        ("foreign sites", foreign_sites),
        ("lanes", lanes),
        ("bad input", bad_input),
        ("context", context),
    ]
}

impl Options {
    /// [`encoder`](super::encoder) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn encoder(&self, encoder: &dyn Encoder) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let case = Case::new(encoder, self).map_err(|b| b.in_clause("encoder", "spec"))?;
        check("encoder", &clauses(), &case)
    }
}

fn text<'t>(tokens: Tokens<'t>, keep: Option<&'t Tensor>) -> EncoderInput<'t> {
    EncoderInput::Text { tokens, keep }
}

impl<'a> Case<'a> {
    fn new(encoder: &'a dyn Encoder, options: &Options) -> Result<Self, Breach> {
        let spec = encoder.spec();
        let Reads::Text { vocab, context } = spec.reads else {
            return breach("an encoder of text", format!("{:?}", spec.reads));
        };
        demand(vocab >= 8, "a vocabulary of at least 8", vocab)?;
        demand(context.is_none_or(|n| n >= 6), "a context of at least 6", context.unwrap_or(0))?;
        let Some(table) = encoder.embeddings() else { return breach("a table of embeddings", "none") };
        let mut stream = Stream::new(options.seed, 0);
        // The first tokens are often special: padding, which some encoders count no position for.
        let mut draw = |_| 3 + stream.index((vocab - 3) as usize) as i64;
        let rows: Vec<Vec<i64>> =
            (0..3).map(|row| std::iter::once(3 + row).chain((1..6).map(&mut draw)).collect()).collect();
        let ids = Tensor::f_from_slice(&rows.concat())?.f_view([3, 6])?.f_to_device(spec.placement.device)?;
        let (tolerance, seed) = (options.tolerance(spec.placement.kind), options.seed);
        Ok(Self { encoder, tolerance, seed, vocab, context, table: table.shallow_clone(), rows, ids })
    }

    fn encode(&self, input: EncoderInput<'_>) -> Result<Features> {
        self.encoder.encode(input, &Pass::default())
    }

    /// The features of ids `[B, T]`: all positions', and the whole's after them where there is one, `[B, T (+ 1), ..]`.
    fn read(&self, ids: &Tensor) -> Result<Tensor> {
        self.under(ids, &Pass::default())
    }

    fn under(&self, ids: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        joined(self.encoder.encode(text(Tokens::Ids(ids), None), pass)?)
    }

    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        close(what, found, expected, self.tolerance)
    }

    fn look_up(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.size2()?;
        Ok(self.table.f_index_select(0, &ids.f_flatten(0, -1)?)?.f_view([b, t, self.encoder.spec().width])?)
    }
}

/// Everything in one row each, `[B, n]`: so that no feature is forgotten.
fn joined(features: Features) -> Result<Tensor> {
    let hidden = features.hidden.f_flatten(1, -1)?;
    Ok(match features.pooled {
        None => hidden,
        Some(pooled) => Tensor::f_cat(&[&hidden, &pooled], 1)?,
    })
}

fn spec(c: &Case<'_>) -> Check {
    let spec = c.encoder.spec();
    let found = c.encode(text(Tokens::Ids(&c.ids), None))?;
    sized("features of the positions", &found.hidden, &[3, 6, spec.width])?;
    finite("features", &found.hidden)?;
    let kind = found.hidden.f_kind()?;
    demand(
        kind == spec.placement.kind,
        format!("features of type {:?}", spec.placement.kind),
        format!("{kind:?}"),
    )?;
    sized("embeddings", &c.table, &[c.vocab, spec.width])?;
    match (spec.pooled, found.pooled) {
        (Some(width), Some(pooled)) => sized("the pooled feature", &pooled, &[3, width]),
        (None, None) => Ok(()),
        (said, found) => {
            breach(format!("pooled as the spec says, {said:?}"), format!("{:?}", found.map(|t| t.size())))
        }
    }
}

fn repeatable(c: &Case<'_>) -> Check {
    equal("features, the second time", &c.read(&c.ids)?, &c.read(&c.ids)?)
}

fn embeddings(c: &Case<'_>) -> Check {
    let found = joined(c.encode(text(Tokens::Embeds(&c.look_up(&c.ids)?), None))?)?;
    c.close("features of embeddings", &found, &c.read(&c.ids)?)
}

fn rows(c: &Case<'_>) -> Check {
    let whole = c.read(&c.ids)?;
    (0..3).try_for_each(|i| {
        let alone = c.read(&c.ids.f_narrow(0, i, 1)?)?;
        c.close(&format!("row {i} of a batch"), &whole.f_narrow(0, i, 1)?, &alone)
    })
}

fn padding(c: &Case<'_>) -> Check {
    let kept = [&c.rows[0][..], &c.rows[1][..3], &c.rows[2][..1]];
    for pad in [0, c.vocab - 1] {
        let rows: Vec<Vec<i64>> = kept.iter().map(|row| row.to_vec()).collect();
        let (ids, keep) = right_padded(&rows, pad)?;
        let (ids, keep) = (ids.f_to_device(c.ids.device())?, keep.f_to_device(c.ids.device())?);
        let found = c.encode(text(Tokens::Ids(&ids), Some(&keep)))?;
        for (i, row) in (0i64..).zip(kept) {
            let alone = c.encode(text(Tokens::Ids(&Tensor::f_from_slice(row)?.f_unsqueeze(0)?), None))?;
            let len = i64::try_from(row.len()).unwrap_or(0);
            let what = format!("row {i}, padded on the right with {pad}");
            c.close(&what, &found.hidden.f_narrow(0, i, 1)?.f_narrow(1, 0, len)?, &alone.hidden)?;
            if let (Some(found), Some(alone)) = (&found.pooled, &alone.pooled) {
                c.close(&format!("{what}, pooled"), &found.f_narrow(0, i, 1)?, alone)?;
            }
        }
    }
    Ok(())
}

/// A weighted sum of each row's features, so that no symmetry hides an error.
fn functional(c: &Case<'_>, embeds: &Tensor) -> Result<Tensor> {
    let features = joined(c.encode(text(Tokens::Embeds(embeds), None))?)?.f_to_kind(Kind::Double)?;
    let weights = noise(c.seed, 9, &[1, features.size()[1]], (Kind::Double, c.ids.device()))?;
    Ok(features.f_mul(&weights)?.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)
}

fn gradients(c: &Case<'_>) -> Check {
    let e = c.look_up(&c.ids)?;
    let gradient = {
        let _gradients = EnableGrad::new();
        let leaf = e.f_detach()?.f_set_requires_grad(true)?;
        let f = functional(c, &leaf)?;
        demand(f.requires_grad(), "features that depend on embeddings by gradient", "no graph")?;
        Tensor::f_run_backward(&[&f.f_sum(None::<Kind>)?], &[&leaf], false, false)?.pop()
    };
    let Some(gradient) = gradient.filter(Tensor::defined) else {
        return breach("a gradient at the embeddings", "none");
    };
    finite("gradient at the embeddings", &gradient)?;
    if !matches!(e.f_kind()?, Kind::Float | Kind::Double) {
        return Ok(()); // half the digits are too few for differences
    }
    by_differences("gradient at the embeddings", &e, &gradient, c.seed, &|e| functional(c, e))
}

fn no_gradients(c: &Case<'_>) -> Check {
    let leaf = c.look_up(&c.ids)?.f_set_requires_grad(true)?;
    let found = joined(c.encode(text(Tokens::Embeds(&leaf), None))?)?;
    demand(!found.requires_grad(), "nothing recorded under no_grad_guard", "a graph")?;
    demand(!recording()?, "gradients off after a pass, as before it", "gradients on")?;
    let _gradients = EnableGrad::new();
    let _ = c.encode(text(Tokens::Embeds(&leaf), None))?;
    demand(recording()?, "gradients on after a pass, as before it", "gradients off")
}

fn handle(c: &Case<'_>) -> Check {
    let (handle, ids) = (c.encoder.handle(), c.ids.shallow_clone());
    let found = on_thread(move || joined(handle.encode(text(Tokens::Ids(&ids), None), &Pass::default())?))?;
    c.close("a handle's features, on another thread", &found, &c.read(&c.ids)?)
}

fn sites(c: &Case<'_>) -> Check {
    names_are_unique(c.encoder.sites())
}

fn hooks(c: &Case<'_>) -> Check {
    let sites = c.encoder.sites();
    for place in [Where::Sites, Where::Inputs] {
        let probe = Probe::new(sites, place, Act::Identity);
        let _ = c.under(&c.ids, &Pass::with_controls(&probe.bind(sites)?))?;
        probe.came_by_all(sites)?;
    }
    Ok(())
}

fn identity(c: &Case<'_>) -> Check {
    let (sites, plain) = (c.encoder.sites(), c.read(&c.ids)?);
    let run = |place| -> Result<Tensor, Breach> {
        let controls = Probe::new(sites, place, Act::Identity).bind(sites)?;
        Ok(c.under(&c.ids, &Pass::with_controls(&controls))?)
    };
    equal("features under a control that does nothing", &run(Where::Sites)?, &plain)?;
    // A control before a part of a fused product splits it: roundings may differ.
    c.close("features under a control that does nothing to inputs", &run(Where::Inputs)?, &plain)
}

fn effect(c: &Case<'_>) -> Check {
    let (sites, ids) = (c.encoder.sites(), c.ids.f_narrow(0, 0, 1)?);
    for place in [Where::Sites, Where::Inputs] {
        let idle = Probe::new(sites, place, Act::Identity).bind(sites)?;
        let plain = c.under(&ids, &Pass::with_controls(&idle))?;
        let acts = |kind| place == Where::Sites || kind == SiteKind::Linear;
        for (id, site) in sites.iter().filter(|(_, site)| acts(site.kind())) {
            let controls = Probe::new(sites, place, Act::Alter(id)).bind(sites)?;
            let found = c.under(&ids, &Pass::with_controls(&controls))?;
            let before = if place == Where::Inputs { "before" } else { "at" };
            different(&format!("features under a control {before} `{}`", site.name), &found, &plain)?;
        }
    }
    Ok(())
}

fn map_weights(c: &Case<'_>) -> Check {
    let (sites, before) = (c.encoder.sites(), c.read(&c.ids)?);
    let mut offered = Vec::new();
    let same = c.encoder.map_weights(&mut |id: SiteId, _: &Tensor| {
        offered.push(id);
        Ok(None)
    })?;
    for (id, site) in sites.of_kind(SiteKind::Linear) {
        demand(offered.contains(&id), format!("the weight of `{}` to be offered", site.name), "it was not")?;
    }
    let read =
        |encoder: &dyn Encoder| joined(encoder.encode(text(Tokens::Ids(&c.ids), None), &Pass::default())?);
    equal("features after a map without an answer", &read(&*same)?, &before)?;
    for &site in &offered {
        let mut halve = |id: SiteId, w: &Tensor| {
            if id == site && w.dim() == 2 { Ok(Some(w.f_mul_scalar(0.5)?)) } else { Ok(None) }
        };
        let mapped = c.encoder.map_weights(&mut halve)?;
        let name = sites.get(site).map_or("", |site| site.name.as_str());
        different(&format!("features with another weight of `{name}`"), &read(&*mapped)?, &before)?;
        let mut narrow = |id: SiteId, w: &Tensor| {
            if id == site { Ok(Some(w.f_narrow(0, 0, w.size()[0] - 1)?)) } else { Ok(None) }
        };
        refused!("a weight of another shape", c.encoder.map_weights(&mut narrow), Error::Shape { .. })?;
    }
    equal("features of the original", &c.read(&c.ids)?, &before)
}

fn failing_control(c: &Case<'_>) -> Check {
    let sites = c.encoder.sites();
    let controls = Probe::new(sites, Where::Sites, Act::FailAt(1)).bind(sites)?;
    match c.under(&c.ids, &Pass::with_controls(&controls)) {
        Err(Error::Unsupported { what, .. }) if what == FAILS => Ok(()),
        Err(other) => breach("the control's own error", other),
        Ok(_) => breach("the control's error", "none"),
    }
}

fn foreign_sites(c: &Case<'_>) -> Check {
    let sites = copied(c.encoder.sites());
    let controls = Probe::new(&sites, Where::Sites, Act::Identity).bind(&sites)?;
    let made = c.under(&c.ids, &Pass::with_controls(&controls));
    refused!("controls bound to another model", made, Error::ForeignSites)
}

fn lanes(c: &Case<'_>) -> Check {
    for n in [0, 2, 4] {
        let lanes = Lanes::samples(n);
        let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
        refused!(format!("{n} lanes for 3 rows"), c.under(&c.ids, &pass), Error::Value { .. })?;
    }
    let lanes = Lanes::samples(3);
    let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
    c.close("features under plain lanes", &c.under(&c.ids, &pass)?, &c.read(&c.ids)?)
}

fn bad_input(c: &Case<'_>) -> Check {
    let (spec, device) = (c.encoder.spec(), c.ids.device());
    for bad in [c.vocab, -1] {
        let ids = c.ids.f_add_scalar(0)?;
        let _ = ids.f_narrow(0, 1, 1)?.f_narrow(1, 1, 1)?.f_fill_(bad)?;
        refused!(format!("token {bad}"), c.read(&ids), Error::Value { .. })?;
    }
    refused!("token ids of type f32", c.read(&c.ids.f_to_kind(Kind::Float)?), Error::Kind { .. })?;
    refused!("token ids of one dimension", c.read(&c.ids.f_view(-1)?), Error::Shape { .. })?;
    refused!("no tokens", c.read(&c.ids.f_narrow(1, 0, 0)?), Error::Value { .. })?;
    let wide = Tensor::f_zeros([3, 6, spec.width + 1], spec.placement.options())?;
    refused!("embeddings too wide", c.encode(text(Tokens::Embeds(&wide), None)), Error::Shape { .. })?;
    let masked = |keep: &Tensor| c.encode(text(Tokens::Ids(&c.ids), Some(keep)));
    let keep = |len| Tensor::f_ones([3, len], (Kind::Bool, device));
    refused!("a longer mask", masked(&keep(7)?), Error::Shape { .. })?;
    refused!("a mask of integers", masked(&keep(6)?.f_to_kind(Kind::Int64)?), Error::Kind { .. })?;
    let empty = keep(6)?;
    let _ = empty.f_narrow(0, 2, 1)?.f_fill_(0)?;
    refused!("a row of padding alone", masked(&empty), Error::Value { .. })?;
    let image = Tensor::f_zeros([3, 3, 8, 8], spec.placement.options())?;
    refused!("an image", c.encode(EncoderInput::Image(&image)), Error::Unsupported { .. })
}

fn context(c: &Case<'_>) -> Check {
    let ids =
        |len| -> Result<Tensor> { Ok(c.ids.f_narrow(1, 0, 1)?.f_expand([3, len], false)?.f_contiguous()?) };
    let Some(limit) = c.context else {
        let long = c.encode(text(Tokens::Ids(&ids(700)?), None))?.hidden;
        return demand(
            long.size()[1] == 700,
            "features of 700 positions, there being no last",
            long.size()[1],
        );
    };
    match c.read(&ids(limit + 1)?) {
        Err(Error::Context { limit: said, .. }) if said == limit => {}
        Err(other) => return breach(format!("Error::Context with a limit of {limit}"), other),
        Ok(_) => return breach(format!("{} positions of {limit} to be refused", limit + 1), "no error"),
    }
    if limit <= 1024 {
        let filled = c.encode(text(Tokens::Ids(&ids(limit)?), None))?.hidden;
        demand(filled.size()[1] == limit, format!("features of {limit} positions"), filled.size()[1])?;
    }
    Ok(())
}
