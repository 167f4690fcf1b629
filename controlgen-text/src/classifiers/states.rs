//! What a frozen language model makes of texts, as features.

use controlgen_core::energy::Text;
use controlgen_core::{
    At, Binding, Control, Controls, Dims, Error, LanguageModel, LmInput, Pass, Result, SiteId, SiteKind,
    SiteMap, Source, State, Taps,
};
use tch::{Kind, Tensor};

use crate::models::{self, expected_embeddings};

/// Leaves what linear sites read.
struct Tap(Vec<SiteId>);

impl Control for Tap {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0.clone()))
    }

    fn bind(&self, _sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        self.0.iter().for_each(|&site| to.at(site, 0));
        Ok(())
    }

    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        if let Some(taps) = at.pass.taps {
            taps.push(at.site, x.shallow_clone());
        }
        Ok(y)
    }
}

/// The hidden states of a frozen language model, position by position: what the linear sites of given names read, such as
/// `model.layers.12.self_attn.q_proj`, which reads the normed residual stream after 12 blocks. Of several sites the states
/// are put side by side.
///
/// Of this library's models only the blocks up to the last site are run.
///
/// *Cost*: one pass over the text of as many blocks.
pub struct LmStates {
    lm: Box<dyn LanguageModel>,
    controls: Controls,
    names: Vec<String>,
    /// In the order of the pass.
    sites: Vec<SiteId>,
    width: i64,
    /// Whether one of them is the output product, which reads what logits are asked of.
    output: bool,
}

/// Another handle over the same weights.
impl Clone for LmStates {
    fn clone(&self) -> Self {
        Self {
            lm: (*self.lm).handle(),
            controls: self.controls.handle(),
            names: self.names.clone(),
            sites: self.sites.clone(),
            width: self.width,
            output: self.output,
        }
    }
}

impl LmStates {
    /// What the sites of these names read, each name being of one linear site.
    ///
    /// # Errors
    /// [`Error::NoSite`] for a name that no linear site has; [`Error::Value`] for no names, for one that several sites have,
    /// and for one that is there twice.
    pub fn at(lm: &dyn LanguageModel, names: &[impl AsRef<str>]) -> Result<Self> {
        let names: Vec<String> = names.iter().map(|name| name.as_ref().to_owned()).collect();
        resolve(lm.sites(), &names)?;
        let lm = shortened(lm, &names)?;
        let mut sites = resolve(lm.sites(), &names)?;
        sites.sort_unstable();
        let mut width = 0;
        let mut output = false;
        for &site in &sites {
            if let Some(Dims::Linear { inputs, outputs }) = lm.sites().get(site).map(|site| site.dims) {
                width += inputs;
                output |= outputs == lm.spec().vocab;
            }
        }
        let tap: Vec<Box<dyn Control>> = vec![Box::new(Tap(sites.clone()))];
        let controls = Controls::bind(lm.sites(), tap)?;
        Ok(Self { lm, controls, names, sites, width, output })
    }

    /// The names of the sites.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// D: the sum of the widths that the sites read.
    pub fn width(&self) -> i64 {
        self.width
    }

    /// The model, cut off after the last block that is needed.
    pub fn lm(&self) -> &dyn LanguageModel {
        &*self.lm
    }

    /// The states of each position, f32 `[B, T, D]`, those of padding being of no use. Of soft tokens the expected embeddings
    /// go in; differentiable in them.
    ///
    /// # Errors
    /// Those of [`LmInput::validate`]; [`Error::Shape`] and [`Error::Kind`] for soft tokens that are none of this vocabulary;
    /// [`Error::Context`]; the model's.
    pub fn of(&self, x: &Text) -> Result<Tensor> {
        let device = self.lm.spec().placement.device;
        let keep = x.keep().map(|keep| keep.f_to_device(device)).transpose()?;
        let (ids, embeds);
        let input = match x {
            Text::Hard { ids: given, .. } => {
                ids = given.f_to_device(device)?;
                LmInput::ids(&ids)
            }
            Text::Soft { probs, .. } => {
                let expected = expected_embeddings(self.lm.embeddings(), probs)?; // (B, T, D)
                embeds = expected.f_to_kind(self.lm.spec().placement.kind)?;
                LmInput::embeds(&embeds)
            }
        };
        let input = input.keep(keep.as_ref());
        let (rows, _) = input.validate(self.lm.spec())?;
        let mut state = self.lm.start(Source::Rows(rows), &Pass::default())?;
        self.read(input, &mut state)
    }

    /// The states of these positions, f32 `[B, T, D]`, after those that `state` has read.
    ///
    /// # Errors
    /// As for [`LmStates::of`].
    pub fn read(&self, input: LmInput<'_>, state: &mut State) -> Result<Tensor> {
        let taps = Taps::new();
        let pass = Pass { taps: Some(&taps), ..Pass::with_controls(&self.controls) };
        self.lm.forward(if self.output { input } else { input.last() }, state, &pass)?;
        let seen = taps.take();
        let states = self
            .sites
            .iter()
            .map(|site| match seen.iter().find(|(at, _)| at == site) {
                Some((_, states)) => Ok(states.f_to_kind(Kind::Float)?),
                None => Err(Error::unsupported(
                    "a model that runs a linear site without calling its controls",
                    "models that call them",
                )),
            })
            .collect::<Result<Vec<Tensor>>>()?;
        match &states[..] {
            [one] => Ok(one.shallow_clone()),
            several => Ok(Tensor::f_cat(several, -1)?),
        }
    }
}

fn resolve(sites: &SiteMap, names: &[String]) -> Result<Vec<SiteId>> {
    if names.is_empty() {
        return Err(Error::value("sites of hidden states", "one or more", "none"));
    }
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        match sites.select(SiteKind::Linear, name)?[..] {
            [one] if !found.contains(&one) => found.push(one),
            [_] => return Err(Error::value("sites of hidden states", "different ones", name)),
            ref several => {
                let expected = "the name of one linear site";
                return Err(Error::value(
                    "site of hidden states",
                    expected,
                    format!("{name}, of {}", several.len()),
                ));
            }
        }
    }
    Ok(found)
}

/// The model without the blocks after those that the names speak of, where that can be had.
fn shortened(lm: &dyn LanguageModel, names: &[String]) -> Result<Box<dyn LanguageModel>> {
    let block = |name: &String| name.split('.').find_map(|part| part.parse::<usize>().ok());
    let Some(last) = names.iter().map(block).try_fold(0, |most, block| Some(most.max(block?))) else {
        return Ok(lm.handle());
    };
    match models::first_layers(lm, last + 1) {
        Err(Error::Unsupported { .. }) => Ok(lm.handle()),
        other => other,
    }
}
