//! What every adapter keeps.

use std::fs;
use std::path::Path;

use tch::{Kind, Tensor};

use super::{
    Breach, Check, Clause, Options, Violation, breach, check, close, demand, different, equal, finite, noise,
    on_thread, refused,
};
use crate::noise::Stream;
use crate::{
    Adapter, Control, Controls, EnableGrad, Error, LanguageModel, LmInput, Pass, Result, SiteMap, Source,
};

/// A way to make the adapter, and the model to run it on.
pub struct Case<'a> {
    make: &'a dyn Fn() -> Result<Box<dyn Adapter>>,
    lm: &'a dyn LanguageModel,
    options: &'a Options,
    /// Token ids `[2, 5]`.
    ids: Tensor,
    /// The model's own logits of them.
    plain: Tensor,
}

pub fn clauses<'a>() -> Vec<Clause<Case<'a>>> {
    vec![
        ("parameters", parameters),
        ("identity", identity),
        ("effect", effect),
        ("gradients", gradients),
        ("handle", handle),
        ("bind", bind),
        ("save and load", save_and_load),
        ("damaged", damaged),
        ("merged", merged),
        ("unmerged", unmerged),
    ]
}

impl Options {
    /// [`adapter`](super::adapter) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn adapter(
        &self,
        lm: &dyn LanguageModel,
        make: impl Fn() -> Result<Box<dyn Adapter>>,
    ) -> Result<(), Violation> {
        let _no_gradients = tch::no_grad_guard();
        let case = || -> Result<_, Breach> {
            let spec = lm.spec();
            let mut stream = Stream::new(self.seed, 0);
            let draw = |_| stream.index(spec.vocab as usize) as i64;
            let ids: Vec<i64> = (0..10).map(draw).collect();
            let ids = Tensor::f_from_slice(&ids)?.f_view([2, 5])?.f_to_device(spec.placement.device)?;
            let plain = logits(lm, &ids, None)?;
            Ok(Case { make: &make, lm, options: self, ids, plain })
        };
        let case = case().map_err(|b| b.in_clause("adapter", "parameters"))?;
        check("adapter", &clauses(), &case)
    }
}

/// The logits of ids under a control.
fn logits(lm: &dyn LanguageModel, ids: &Tensor, control: Option<Box<dyn Control>>) -> Result<Tensor> {
    let controls = control.map(|control| Controls::bind(lm.sites(), vec![control])).transpose()?;
    let pass = Pass { controls: controls.as_ref(), ..Pass::default() };
    let mut state = lm.start(Source::Rows(ids.size()[0]), &pass)?;
    Ok(lm.forward(LmInput::ids(ids), &mut state, &pass)?.logits)
}

impl Case<'_> {
    fn run(&self, adapter: &dyn Adapter) -> Result<Tensor> {
        logits(self.lm, &self.ids, Some(adapter.handle()))
    }

    /// Another one whose parameters were moved, as by training.
    fn trained(&self) -> Result<Box<dyn Adapter>> {
        let adapter = (self.make)()?;
        self.train(&*adapter)?;
        Ok(adapter)
    }

    /// Moves the parameters, each by a tenth of standard normals.
    fn train(&self, adapter: &dyn Adapter) -> Result<()> {
        for (salt, (_, mut parameter)) in (1..).zip(adapter.parameters()) {
            let by = noise(self.options.seed, salt, &parameter.size(), (Kind::Float, parameter.device()))?;
            let _ = parameter.f_add_(&by.f_mul_scalar(0.1)?)?;
        }
        Ok(())
    }

    fn close(&self, what: &str, found: &Tensor, expected: &Tensor) -> Check {
        close(what, found, expected, self.options.tolerance(self.lm.spec().placement.kind))
    }
}

/// Names and copies of the values.
fn values(adapter: &dyn Adapter) -> Result<Vec<(String, Tensor)>> {
    adapter.parameters().into_iter().map(|(name, t)| Ok((name, t.f_detach()?.f_add_scalar(0)?))).collect()
}

fn same_values(what: &str, found: &dyn Adapter, expected: &[(String, Tensor)]) -> Check {
    let found = values(found)?;
    let names = |of: &[(String, Tensor)]| of.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    demand(
        names(&found) == names(expected),
        format!("{what}: parameters {:?}", names(expected)),
        format!("{:?}", names(&found)),
    )?;
    found.iter().zip(expected).try_for_each(|((name, a), (_, b))| equal(&format!("{what}: `{name}`"), a, b))
}

fn parameters(c: &Case<'_>) -> Check {
    let adapter = (c.make)()?;
    let parameters = adapter.parameters();
    demand(!parameters.is_empty(), "parameters", "none")?;
    let (again, handle) = (adapter.parameters(), adapter.adapter_handle().parameters());
    for (i, (name, p)) in parameters.iter().enumerate() {
        let twins = parameters.iter().filter(|(other, _)| other == name).count();
        demand(twins == 1, format!("one parameter of the name `{name}`"), twins)?;
        let kind = p.f_kind()?;
        demand(kind == Kind::Float, format!("`{name}` in f32"), format!("{kind:?}"))?;
        demand(
            p.is_leaf() && p.requires_grad(),
            format!("`{name}` to be a leaf that requires gradients"),
            "it is not",
        )?;
        finite(name, p)?;
        for (who, others) in [("the second time", &again), ("of a handle", &handle)] {
            let other = others.get(i).map(|(name, _)| name.as_str());
            demand(other == Some(name), format!("`{name}` as parameter {i} {who}"), other.unwrap_or("none"))?;
        }
    }
    // What is written through one is seen through all.
    c.train(&*adapter)?;
    for (what, others) in [("the second time", again), ("of a handle", handle)] {
        for ((name, p), (_, other)) in adapter.parameters().iter().zip(&others) {
            equal(&format!("`{name}` {what}, after a change"), other, p)?;
        }
    }
    Ok(())
}

fn identity(c: &Case<'_>) -> Check {
    if !c.options.identity {
        return Ok(());
    }
    equal("logits under an adapter just made", &c.run(&*(c.make)()?)?, &c.plain)
}

fn effect(c: &Case<'_>) -> Check {
    let adapter = c.trained()?;
    let first = c.run(&*adapter)?;
    finite("logits under a trained adapter", &first)?;
    different("logits under a trained adapter", &first, &c.plain)?;
    equal("logits under a trained adapter, the second time", &c.run(&*adapter)?, &first)?;
    equal("logits without it, after it was run", &logits(c.lm, &c.ids, None)?, &c.plain)
}

fn gradients(c: &Case<'_>) -> Check {
    let adapter = c.trained()?;
    let _gradients = EnableGrad::new();
    let (names, leaves): (Vec<String>, Vec<Tensor>) = adapter.parameters().into_iter().unzip();
    let logits = c.run(&*adapter)?;
    let w = noise(c.options.seed, 0, &logits.size(), (Kind::Double, logits.device()))?;
    let loss = logits.f_to_kind(Kind::Double)?.f_mul(&w)?.f_sum(None::<Kind>)?;
    demand(loss.requires_grad(), "logits that depend on the parameters by gradient", "no graph")?;
    let found = Tensor::f_run_backward(&[&loss], &leaves, false, false)?;
    let mut largest: f64 = 0.0;
    for (name, gradient) in names.iter().zip(&found) {
        demand(gradient.defined(), format!("a gradient at `{name}`"), "none")?;
        finite(&format!("the gradient at `{name}`"), gradient)?;
        largest = largest.max(gradient.f_abs()?.f_max()?.f_double_value(&[])?);
    }
    demand(largest > 0.0, "a gradient at the parameters", "0 at all of them")
}

fn handle(c: &Case<'_>) -> Check {
    let adapter = c.trained()?;
    let (expected, handle) = (c.run(&*adapter)?, adapter.adapter_handle());
    let (id, other) = (adapter.id(), (c.make)()?.id());
    demand(handle.id() == id, format!("the adapter's {id:?} of its handle"), format!("{:?}", handle.id()))?;
    demand(other != id, format!("of another adapter another id than {id:?}"), "the same")?;
    equal("logits under a handle", &c.run(&*handle)?, &expected)?;
    let (lm, ids) = (c.lm.handle(), c.ids.shallow_clone());
    let found = on_thread(move || logits(&*lm, &ids, Some(handle.handle())))?;
    c.close("logits under a handle on another thread", &found, &expected)
}

fn bind(c: &Case<'_>) -> Check {
    let adapter = (c.make)()?;
    refused!(
        "a model without its sites",
        Controls::bind(&SiteMap::new(), vec![adapter.handle()]),
        Error::NoSite { .. }
    )
}

fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), error))
}

fn save_and_load(c: &Case<'_>) -> Check {
    let (adapter, folder) = (c.trained()?, folder()?);
    let before = values(&*adapter)?;
    adapter.save(folder.path())?;
    same_values("after saving", &*adapter, &before)?;
    let mut loaded = (c.make)()?;
    let handle = loaded.adapter_handle();
    loaded.load(folder.path())?;
    same_values("loaded", &*loaded, &before)?;
    same_values("loaded through another handle", &*handle, &before)?;
    for (name, p) in loaded.parameters() {
        demand(p.is_leaf() && p.requires_grad(), format!("`{name}` to be a leaf once loaded"), "it is not")?;
    }
    equal("logits under the adapter loaded", &c.run(&*loaded)?, &c.run(&*adapter)?)
}

/// What is done to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Removed,
    Emptied,
    Halved,
    Overwritten,
}

fn damaged(c: &Case<'_>) -> Check {
    let (saved, whole) = (c.trained()?, folder()?);
    saved.save(whole.path())?;
    let saved = values(&*saved)?;
    let files = files_in(whole.path())?;
    demand(!files.is_empty(), "files in the folder", "none")?;
    let nowhere = whole.path().join("nowhere");
    loads_all_or_nothing(c, &nowhere, "from a folder that is not there", None)?;
    let empty = folder()?;
    loads_all_or_nothing(c, empty.path(), "from an empty folder", None)?;
    for (damaged, _) in &files {
        for damage in [Damage::Removed, Damage::Emptied, Damage::Halved, Damage::Overwritten] {
            let folder = folder()?;
            for (name, bytes) in &files {
                let half = bytes.len().div_euclid(2);
                let bytes = match damage {
                    _ if name != damaged => bytes.clone(),
                    Damage::Removed => continue,
                    Damage::Emptied => Vec::new(),
                    Damage::Halved => bytes[..half].to_vec(),
                    Damage::Overwritten => vec![0xff; bytes.len()],
                };
                let path = folder.path().join(name);
                fs::write(&path, bytes).map_err(|error| Error::io(&path, error))?;
            }
            // A file that is only for people may be damaged.
            loads_all_or_nothing(c, folder.path(), &format!("with `{damaged}` {damage:?}"), Some(&saved))?;
        }
    }
    Ok(())
}

fn files_in(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if path.is_file() {
            files.push((name.to_owned(), fs::read(&path).map_err(|error| Error::io(&path, error))?));
        }
    }
    Ok(files)
}

/// Loading fails and changes nothing, or gives all that was saved.
fn loads_all_or_nothing(
    c: &Case<'_>,
    folder: &Path,
    what: &str,
    saved: Option<&[(String, Tensor)]>,
) -> Check {
    let mut adapter = (c.make)()?;
    let before = values(&*adapter)?;
    match (adapter.load(folder), saved) {
        (Err(_), _) => same_values(&format!("after a load that failed, {what}"), &*adapter, &before),
        (Ok(()), Some(saved)) => same_values(&format!("after a load that passed, {what}"), &*adapter, saved),
        (Ok(()), None) => breach(format!("an error of a load {what}"), "none"),
    }
}

/// A model with the adapter merged into it; `None` for one that changes no weights.
fn merge(c: &Case<'_>, adapter: &dyn Adapter) -> Result<Option<Box<dyn LanguageModel>>> {
    match adapter.merged(c.lm.sites()) {
        Ok(mut weights) => Ok(Some(c.lm.map_weights(&mut *weights)?)),
        Err(Error::Unsupported { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

fn merged(c: &Case<'_>) -> Check {
    let adapter = c.trained()?;
    let expected = c.run(&*adapter)?;
    if let Some(model) = merge(c, &*adapter)? {
        c.close("logits of the merged model", &logits(&*model, &c.ids, None)?, &expected)?;
    }
    Ok(())
}

fn unmerged(c: &Case<'_>) -> Check {
    let adapter = c.trained()?;
    let (before, under) = (values(&*adapter)?, c.run(&*adapter)?);
    drop(merge(c, &*adapter)?);
    equal("logits once the merged model was dropped", &logits(c.lm, &c.ids, None)?, &c.plain)?;
    same_values("after merging", &*adapter, &before)?;
    equal("logits under the adapter, after merging", &c.run(&*adapter)?, &under)
}
